"""The torchsde bridge: an independent solver finds the law that ours finds, and the exact one."""

from __future__ import annotations

import math

import pytest
import torch

from sdeblend import (
    BackwardSDE,
    Blend,
    ExponentialMultistep,
    Preference,
    RectifiedFlow,
    VPLinear,
    solve,
    time_grid,
)
from sdeblend.torchsde_bridge import TorchSDE, solve_torchsde
from tests.support.core import Z, moment_z, seeded
from toy.mixtures.mixture import GaussianMixture
from toy.problems import gaussian_linear
from toy.scores.stack import mixture_score

pytest.importorskip("torchsde")

SCHEDULE = VPLinear()
PROBLEM = gaussian_linear(kl_weight=1.0)
PREFERENCE = Preference({"right": 0.5, "up": 0.5})
TARGET = PROBLEM.target(PREFERENCE)  # one Gaussian, linear rewards: the blend is exact
GRID = time_grid(SCHEDULE, 150)
BATCH = 8000


def blend():
    return BackwardSDE(SCHEDULE, Blend(PROBLEM.stack(SCHEDULE), PREFERENCE))


def start(dtype=torch.float64):
    return SCHEDULE.prior((BATCH, 2), generator=seeded(1), dtype=dtype)


class WrongSign(BackwardSDE):
    """The drift of the pre-trained model less the blend's score: the sign slip of time reversal."""

    def drift(self, x, t):
        f, g2 = float(self.schedule.drift_coef(t)), float(self.schedule.diffusion_sq(t))
        return -f * x - g2 * self.score(x, t)


@pytest.mark.rng_untouched
@pytest.mark.parametrize(
    ("method", "dtype"), [("euler", torch.float32), ("milstein", torch.float64), ("srk", torch.float64)]
)
def test_torchsde_finds_the_law(method, dtype):
    # srk needs Levy areas, drawn in Python: fewer steps, of higher order.
    grid = time_grid(SCHEDULE, 60) if method == "srk" else GRID
    samples = solve_torchsde(blend(), start(dtype), grid, seed=3, method=method)
    assert samples.dtype == dtype and samples.shape == (BATCH, 2)
    ours = solve(blend(), start(dtype), grid, noise=seeded(2)).samples
    # Euler in both: one law at finite steps too. Against the exact law the steps' bias, below 5 %, is allowed for.
    if method != "srk":
        assert moment_z(samples, ours.double().mean(0), ours.double().T.cov()) < Z * math.sqrt(2)
    assert moment_z(samples, TARGET.mean, TARGET.covariance) < Z
    assert moment_z(samples, TARGET.mean, 1.12 * TARGET.covariance) > Z
    assert moment_z(samples, TARGET.mean + 0.1, TARGET.covariance) > Z


def test_a_wrong_drift_is_found_out():
    wrong = WrongSign(SCHEDULE, blend().score)
    samples = solve_torchsde(wrong, start(), time_grid(SCHEDULE, 50), seed=3)
    assert moment_z(samples, TARGET.mean, TARGET.covariance) > 2 * Z
    off = BackwardSDE(SCHEDULE, lambda x, t: 1.1 * blend().score(x, t))
    assert moment_z(solve_torchsde(off, start(), GRID, seed=3), TARGET.mean, TARGET.covariance) > Z


def test_the_exponential_step_agrees():
    ours = solve(blend(), start(), time_grid(SCHEDULE, 60, "log-snr"), noise=seeded(2), step=ExponentialMultistep())
    assert moment_z(ours.samples, TARGET.mean, TARGET.covariance) < Z


def test_a_path_of_torchsde_is_the_euler_path_of_its_brownian_motion():
    # The same increments, read from torchsde's Brownian motion, give the same states to rounding.
    import torchsde

    sde, x, grid = blend(), start()[:50], time_grid(SCHEDULE, 20, to_zero=False)
    length = float(grid[0] - grid[-1])
    path = torchsde.BrownianInterval(0.0, length, size=(50, 2), dtype=torch.float64, entropy=7)
    times = torch.tensor([0.0, length], dtype=torch.float64)
    problem = TorchSDE(sde, float(grid[0]), (2,))
    theirs = torchsde.sdeint(problem, x, times, bm=path, method="euler", dt=length / 20)[-1]

    def noise(n, t, s, like):
        return path(n * length / 20, (n + 1) * length / 20) / math.sqrt(length / 20)

    ours = solve(sde, x, grid, noise=noise).samples
    # torchsde adds up its times, so its increments end a rounding away from ours.
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert float((solve(sde, x, grid, noise=seeded()).samples - theirs).abs().mean()) > 0.1
    # and solve_torchsde is that call
    again = solve_torchsde(sde, x, grid, seed=7)
    torch.testing.assert_close(again, theirs, rtol=1e-8, atol=1e-8)


def test_runs_repeat_and_keep_their_event_shape():
    schedule = RectifiedFlow()
    mixture = GaussianMixture([0.5, 0.5], [[-1.0] * 12, [1.0] * 12], [0.3, 0.3])
    flat = mixture_score(mixture, schedule)
    sde = BackwardSDE(schedule, lambda x, t: flat(x.flatten(1), t).reshape(x.shape))
    x = schedule.prior((5, 3, 2, 2), generator=seeded(1))
    grid, before = time_grid(schedule, 25), x.clone()
    one, two = (solve_torchsde(sde, x, grid, seed=3) for _ in range(2))
    assert torch.equal(one, two) and one.shape == x.shape and torch.equal(x, before)
    assert not torch.equal(one, solve_torchsde(sde, x, grid, seed=4))
    matrix = BackwardSDE(schedule, flat)
    torch.testing.assert_close(one.flatten(1), solve_torchsde(matrix, x.flatten(1), grid, seed=3), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"x": torch.zeros(3, 2).half()}, TypeError, "float16"),
        ({"grid": GRID.flip(0)}, ValueError, "must decrease"),
        ({"grid": GRID[-2:]}, ValueError, "at least 2 times above 0"),
        ({"grid": time_grid(SCHEDULE, 20, "log-snr")}, ValueError, "steps uniformly"),
        ({"method": "rk4"}, ValueError, "rk4|method"),
    ],
)
def test_bad_input_is_named(options, kind, words):
    given = {"sde": blend(), "x": torch.zeros(3, 2), "grid": GRID, "seed": 0} | options
    with pytest.raises(kind, match=words):
        solve_torchsde(**given)
