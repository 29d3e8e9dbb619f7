"""Schedules: coefficients against autograd and the moment equations, inverses, the trained table against diffusers."""

from __future__ import annotations

import math

import pytest
import torch

from sdeblend import SCHEDULES, KarrasVE, NoiseSchedule, RectifiedFlow, TrainedTable, VPCosine, VPLinear
from tests.support.core import gauss_legendre, seeded

NAMES = list(SCHEDULES)
VARIANCE_PRESERVING = ["vp-linear", "vp-cosine", "stable-diffusion"]


def inner_times(schedule: NoiseSchedule, count: int = 23) -> torch.Tensor:
    """Return times between the ends, none of them a knot of the trained table."""
    share = torch.linspace(0.0137, 0.9871, count, dtype=torch.float64)
    return schedule.t_min * (schedule.t_max / schedule.t_min) ** share


def derivative(function, t: torch.Tensor) -> torch.Tensor:
    t = t.clone().requires_grad_()
    (out,) = torch.autograd.grad((function(t) + 0 * t).sum(), t)  # 0 t: some are constant
    return out


@pytest.mark.parametrize("name", NAMES)
def test_rates_are_the_derivatives(name):
    schedule = SCHEDULES[name]()
    t = inner_times(schedule)
    for rate, function in (
        (schedule.alpha_rate, schedule.alpha),
        (schedule.sigma_rate, schedule.sigma),
        (schedule.log_snr_rate, schedule.log_snr),
        (schedule.drift_coef, schedule.log_alpha),
    ):
        torch.testing.assert_close(rate(t), derivative(function, t), rtol=1e-10, atol=1e-13)
    variance_rate = derivative(lambda u: schedule.sigma(u).square(), t)
    expected = variance_rate - 2 * schedule.drift_coef(t) * schedule.sigma(t).square()
    torch.testing.assert_close(schedule.diffusion_sq(t), expected, rtol=1e-8, atol=1e-13)
    assert bool((schedule.diffusion_sq(t) > 0).all()) and bool((schedule.log_snr_rate(t) < 0).all())


def moments_by_quadrature(schedule: NoiseSchedule, factor: float = 1.0) -> tuple[float, float]:
    """Return log alpha and (sigma/alpha)^2 gained from t_min to t_max by dm = f m dt, dV = (2 f V + g^2) dt."""
    ends = schedule.log_snr(torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64)).tolist()
    edges = schedule.time_of_log_snr(torch.linspace(ends[0], ends[1], 200, dtype=torch.float64))  # panel ends
    edges[0], edges[-1] = schedule.t_min, schedule.t_max
    if isinstance(schedule, TrainedTable):
        edges = torch.arange(1, schedule.count + 1, dtype=torch.float64) / schedule.count
    t, weight = gauss_legendre(edges)
    growth = float((weight * schedule.drift_coef(t)).sum())
    noise = factor * float((weight * schedule.diffusion_sq(t) / schedule.alpha(t).square()).sum())
    return growth, noise


@pytest.mark.parametrize("name", NAMES)
def test_the_forward_process_has_these_moments(name):
    schedule = SCHEDULES[name]()
    growth, noise = moments_by_quadrature(schedule)
    ends = torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64)
    alpha, ratio = schedule.log_alpha(ends), (schedule.sigma(ends) / schedule.alpha(ends)).square()
    assert growth == pytest.approx(float(alpha[1] - alpha[0]), rel=1e-9, abs=1e-12)
    assert noise == pytest.approx(float(ratio[1] - ratio[0]), rel=1e-9)
    assert moments_by_quadrature(schedule, factor=1.05)[1] != pytest.approx(float(ratio[1] - ratio[0]), rel=1e-2)


class GeometricVE(NoiseSchedule):
    """A schedule of the user's own, from the abstract methods only: sigma grows geometrically."""

    t_min, t_max = 0.01, 1.0

    def log_alpha(self, t):
        return torch.zeros_like(torch.as_tensor(t, dtype=torch.float64))

    def sigma(self, t):
        return 1e-2 * 5e3 ** torch.as_tensor(t, dtype=torch.float64)

    def log_snr_rate(self, t):
        return torch.full_like(torch.as_tensor(t, dtype=torch.float64), -2 * math.log(5e3))

    def drift_coef(self, t):
        return self.log_alpha(t)

    def time_of_log_snr(self, log_snr):
        return (-torch.as_tensor(log_snr, dtype=torch.float64) / 2 - math.log(1e-2)) / math.log(5e3)


def test_a_schedule_of_the_users_own_gets_the_rest():
    schedule = GeometricVE()
    t = inner_times(schedule)
    torch.testing.assert_close(schedule.diffusion_sq(t), derivative(lambda u: schedule.sigma(u).square(), t))
    torch.testing.assert_close(schedule.sigma_rate(t), derivative(schedule.sigma, t))
    torch.testing.assert_close(schedule.log_snr_rate(t), derivative(schedule.log_snr, t))


@pytest.mark.parametrize("name", NAMES)
def test_time_of_log_snr_inverts(name):
    schedule = SCHEDULES[name]()
    t = torch.cat([inner_times(schedule), torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64)])
    # Near t_max the cosine schedule's l is so steep that t is known better than l, near t_min the reverse.
    torch.testing.assert_close(schedule.time_of_log_snr(schedule.log_snr(t)), t, rtol=1e-10, atol=1e-12)
    log_snr = torch.linspace(*schedule.log_snr(t[-2:]).tolist(), 40, dtype=torch.float64)
    torch.testing.assert_close(schedule.log_snr(schedule.time_of_log_snr(log_snr)), log_snr, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_time_zero_is_data(name):
    schedule = SCHEDULES[name]()
    for zero in (0, 0.0, torch.tensor(0.0), torch.zeros(3, 2)):
        alpha, sigma, log_snr = schedule.alpha(zero), schedule.sigma(zero), schedule.log_snr(zero)
        assert alpha.dtype == sigma.dtype == log_snr.dtype == torch.float64
        assert bool((alpha == 1).all()) and bool((sigma == 0).all()) and bool((log_snr == math.inf).all())
    assert float(schedule.check_time(0.0)) == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_shapes_and_dtypes(name, shape):
    schedule = SCHEDULES[name]()
    t = torch.full(shape, (schedule.t_min + schedule.t_max) / 2, dtype=torch.float64)
    names = "alpha sigma log_snr log_snr_rate drift_coef diffusion_sq alpha_rate sigma_rate"
    for method in names.split():
        value = getattr(schedule, method)(t)
        assert value.dtype == torch.float64 and value.shape == shape, method
        assert torch.equal(getattr(schedule, method)(float(t.flatten()[0])), value.flatten()[0]), method


@pytest.mark.parametrize("name", VARIANCE_PRESERVING)
def test_variance_preserving(name):
    schedule = SCHEDULES[name]()
    t = inner_times(schedule)
    total = schedule.alpha(t).square() + schedule.sigma(t).square()
    torch.testing.assert_close(total, torch.ones_like(t), rtol=1e-14, atol=0)
    torch.testing.assert_close(schedule.drift_coef(t), -schedule.diffusion_sq(t) / 2, rtol=1e-12, atol=0)


def test_named_schedules_have_their_published_formulas():
    t = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    linear = VPLinear(0.1, 20.0)
    torch.testing.assert_close(linear.diffusion_sq(t), 0.1 + 19.9 * t)
    assert float(linear.alpha(1.0)) == pytest.approx(0.0066, abs=1e-4)
    cosine = torch.cos((t + 0.008) / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)
    torch.testing.assert_close(VPCosine().alpha(t), cosine, rtol=1e-13, atol=0)
    assert torch.equal(KarrasVE().sigma(t), t) and bool((KarrasVE().alpha(t) == 1).all())
    torch.testing.assert_close(RectifiedFlow().alpha(t) + RectifiedFlow().sigma(t), torch.ones_like(t))
    torch.testing.assert_close(RectifiedFlow().sigma_rate(t) - RectifiedFlow().alpha_rate(t), torch.full_like(t, 2.0))


@pytest.mark.parametrize("schedule", [VPLinear(), VPCosine()])
def test_small_times_keep_their_digits(schedule):
    # sigma^2 = 1 - alpha^2 = g^2(0) t + O(t^2): computed as a difference it would be noise at t = 1e-12.
    rate = float(schedule.diffusion_sq(0.0))
    assert float(schedule.sigma(1e-12)) ** 2 == pytest.approx(rate * 1e-12, rel=1e-6)


def test_table_is_exact_on_the_table_and_monotone_between():
    values = torch.tensor([0.9, 0.5, 0.2, 0.03], dtype=torch.float64)
    table = TrainedTable(values)
    t = table.time_of_timestep(torch.arange(4))
    torch.testing.assert_close(table.alpha(t).square(), values, rtol=1e-14, atol=0)
    torch.testing.assert_close(table.timestep(t), torch.arange(4, dtype=torch.float64))
    middle = float(table.log_snr(0.625))
    assert middle == pytest.approx(float(table.log_snr(0.5) + table.log_snr(0.75)) / 2, rel=1e-13)
    dense = torch.linspace(0.25, 1, 301, dtype=torch.float64)
    assert bool((table.log_snr(dense).diff() < 0).all())


def test_table_equals_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    table = TrainedTable.stable_diffusion()
    index = torch.arange(1000)
    ours = table.alpha(table.time_of_timestep(index)).square()
    torch.testing.assert_close(ours, scheduler.alphas_cumprod.double(), rtol=1e-5, atol=1e-6)
    given = TrainedTable(scheduler.alphas_cumprod)
    exact = given.alpha(given.time_of_timestep(index)).square()
    torch.testing.assert_close(exact, scheduler.alphas_cumprod.double(), rtol=1e-13, atol=0)
    scheduler.set_timesteps(50)
    steps = scheduler.timesteps.double()
    torch.testing.assert_close(table.timestep(table.time_of_timestep(steps)), steps)
    assert float(table.alpha(1.0)) == pytest.approx(0.068, abs=5e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_prior(name, dtype):
    schedule = SCHEDULES[name]()
    x = schedule.prior((40_000, 2), generator=seeded(), dtype=dtype)
    assert x.dtype == dtype and x.shape == (40_000, 2)
    assert torch.equal(x, schedule.prior((40_000, 2), generator=seeded(), dtype=dtype))
    exact = float(schedule.alpha(schedule.t_max)) ** 2 + float(schedule.sigma(schedule.t_max)) ** 2
    error = exact * math.sqrt(2 / x.numel())
    assert abs(float(x.double().square().mean()) - exact) < 5 * error < abs(0.05 * exact)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: VPLinear(-1.0), "0 < beta_min"),
        (lambda: VPLinear(2.0, 1.0), "beta_min <= beta_max"),
        (lambda: VPLinear(0.1, math.inf), "beta_max"),
        (lambda: VPLinear(t_min=0.0), "t_min"),
        (lambda: VPLinear(t_min=math.nan), "t_min"),
        (lambda: VPCosine(t_max=1.0), "t_max"),
        (lambda: RectifiedFlow(t_max=1.0), "t_max < 1"),
        (lambda: KarrasVE(3.0, 2.0), "sigma_min < sigma_max"),
        (lambda: TrainedTable([0.5]), "at least two"),
        (lambda: TrainedTable([]), "at least two"),
        (lambda: TrainedTable([0.5, 0.6]), "decrease"),
        (lambda: TrainedTable([0.9, 0.5, 0.0]), "decrease within"),
        (lambda: TrainedTable([0.9, math.nan]), "decrease within"),
        (lambda: VPLinear().check_time(1.5), "1.5"),
        (lambda: VPLinear().check_time(-0.1), "-0.1"),
        (lambda: VPLinear().check_time(math.nan), "nan"),
        (lambda: VPLinear().check_time(5e-4), "0.0005"),
    ],
)
def test_bad_values_are_named(call, words):
    with pytest.raises(ValueError, match=words) as info:
        call()
    assert "\n" not in str(info.value)


def test_prior_refuses_the_global_generator():
    with pytest.raises(TypeError, match="Generator"):
        VPLinear().prior((2, 2), generator=None)
