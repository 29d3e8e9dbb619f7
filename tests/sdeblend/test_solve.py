"""The loop: dtype, layout, purity, exact moments, counts, and every bad input named before anything is spent."""

from __future__ import annotations

import pytest
import torch

from sdeblend import (
    STEPS,
    Ancestral,
    BackwardSDE,
    Blend,
    Correction,
    CountingStack,
    EulerMaruyama,
    ExponentialMultistep,
    Heun,
    KarrasVE,
    PerSampleNoise,
    RectifiedFlow,
    ReplayNoise,
    Stack,
    TrainedTable,
    VPLinear,
    solve,
    time_grid,
    trajectory,
)
from tests.support.core import Z, moment_z, seeded
from toy.mixtures.mixture import GaussianMixture
from toy.scores.stack import MixtureStack, mixture_score

SCHEDULE = VPLinear()
GAUSSIAN = GaussianMixture([1.0], [[0.5, -0.3]], [[[1.0, 0.4], [0.4, 0.6]]])
SDE = BackwardSDE(SCHEDULE, mixture_score(GAUSSIAN, SCHEDULE))
GRID = time_grid(SCHEDULE, 15)
EVERY = [factory() for factory in STEPS.values()] + [Ancestral(eta=0.0), Ancestral(eta=0.5)]


def start(batch=7, dtype=torch.float64, seed=1):
    return SCHEDULE.prior((batch, 2), generator=seeded(seed), dtype=dtype)


@pytest.mark.rng_untouched
@pytest.mark.parametrize("step", EVERY, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept_and_the_start_is_not_modified(step, dtype):
    x = start(dtype=dtype)
    before = x.clone()
    states = list(trajectory(SDE, x, GRID, noise=seeded(), step=step))
    assert all(state.x.dtype == dtype and state.x.shape == x.shape for state in states)
    assert torch.equal(x, before) and torch.equal(states[0].x, before)
    assert [state.step for state in states] == list(range(16))
    assert [state.t for state in states] == GRID.tolist()
    # earlier states are not overwritten by later ones
    copies = [state.x.clone() for state in trajectory(SDE, x, GRID, noise=seeded(), step=step)]
    assert all(torch.equal(state.x, copy) for state, copy in zip(states, copies, strict=True))


@pytest.mark.parametrize("step", EVERY, ids=repr)
def test_a_single_step_is_the_first_step_of_a_run_and_pure(step):
    x, z = start(), torch.randn(7, 2, generator=seeded(3), dtype=torch.float64)
    before, t, s = x.clone(), float(GRID[4]), float(GRID[5])
    one = step(SDE, x, t, s, z)
    assert torch.equal(x, before) and torch.equal(one, step(SDE, x, t, s, z))
    run = solve(SDE, x, GRID[4:6], noise=ReplayNoise([z]), step=step).samples
    assert torch.equal(one, run)
    if step.stochastic:
        with pytest.raises(ValueError, match="needs z of unit variance, got None"):
            step(SDE, x, t, s)
    else:
        assert torch.equal(one, step(SDE, x, t, s))


@pytest.mark.parametrize("step", EVERY, ids=repr)
def test_a_step_to_zero_is_the_posterior_mean(step):
    x = start()
    expected = GAUSSIAN.posterior(x, SCHEDULE, GRID[-2]).mean
    torch.testing.assert_close(step(SDE, x, float(GRID[-2]), 0.0), expected, rtol=1e-10, atol=1e-10)


def test_one_step_formulas():
    x, z = start(), torch.randn(7, 2, generator=seeded(3), dtype=torch.float64)
    t, s = 0.6, 0.5
    score, beta = SDE.score(x, torch.tensor(t, dtype=torch.float64)), 0.1 + 19.9 * t
    expected = x + 0.1 * (beta / 2 * x + beta * score) + (0.1 * beta) ** 0.5 * z
    torch.testing.assert_close(EulerMaruyama()(SDE, x, t, s, z), expected)
    a, a2, sd, sd2 = (float(v) for v in (*SCHEDULE.alpha(torch.tensor([t, s])), *SCHEDULE.sigma(torch.tensor([t, s]))))
    eps, x0 = -sd * score, SDE.denoised(x, t)
    for eta in (0.0, 0.3, 1.0):
        var = eta**2 * (sd2 / sd) ** 2 * (1 - (a / a2) ** 2)
        expected = a2 * x0 + (sd2**2 - var) ** 0.5 * eps + var**0.5 * z
        torch.testing.assert_close(Ancestral(eta)(SDE, x, t, s, z), expected, rtol=1e-6, atol=1e-6)


SCHEDULED = [(schedule, step) for schedule in (SCHEDULE, KarrasVE(), RectifiedFlow(), TrainedTable.stable_diffusion())
             for step in (ExponentialMultistep(), ExponentialMultistep(False), Heun())]  # fmt: skip


@pytest.mark.parametrize(("schedule", "step"), SCHEDULED, ids=lambda v: type(v).__name__)
def test_exact_moments_of_a_gaussian(schedule, step):
    sde = BackwardSDE(schedule, mixture_score(GAUSSIAN, schedule))
    noised = GAUSSIAN.noised(schedule, schedule.t_max)
    x = noised.sample(40_000, generator=seeded(1))
    grid = time_grid(schedule, 80, "log-snr")
    samples = solve(sde, x, grid, noise=seeded(2), step=step).samples
    # The last step's posterior mean lacks the posterior covariance at t_min.
    left = float((schedule.sigma(schedule.t_min) / schedule.alpha(schedule.t_min)).square())
    assert left < 1e-3
    assert moment_z(samples, GAUSSIAN.mean, GAUSSIAN.covariance) < Z
    wrong = GAUSSIAN.covariance * torch.tensor([[1.05, 1.0], [1.0, 1.05]], dtype=torch.float64)
    assert moment_z(samples, GAUSSIAN.mean, wrong) > Z


@pytest.mark.parametrize("step", [EulerMaruyama(), Ancestral(), Ancestral(eta=0.5), ExponentialMultistep()], ids=repr)
def test_the_law_of_the_chain_itself(step):
    # For a linear score S = b - P x the chain is Gaussian; its moments follow from the step applied to points.
    grid, d = time_grid(SCHEDULE, 10, to_zero=False), 2
    mean, cov = torch.zeros(2 * d, dtype=torch.float64), torch.zeros(2 * d, 2 * d, dtype=torch.float64)
    cov[:d, :d] = torch.eye(d)  # of (x, D_old)
    eye = torch.eye(d, dtype=torch.float64)
    for n, move in enumerate(step.plan(SCHEDULE, grid)):
        offset = SDE.score(torch.zeros(1, d, dtype=torch.float64), move.t)[0]
        slope = (SDE.score(eye, move.t) - offset).T
        memory = move.c * eye if n else 0 * eye
        state_row = torch.cat([move.a * eye + move.b * slope, memory], 1)
        memory_row = torch.cat([move.p * eye + move.q * slope, 0 * eye], 1)
        transition = torch.cat([state_row, memory_row])
        mean = transition @ mean + torch.cat([move.b * offset, move.q * offset])
        cov = transition @ cov @ transition.T
        cov[:d, :d] += move.g**2 * eye
    samples = solve(SDE, start(40_000), grid, noise=seeded(2), step=step).samples
    assert moment_z(samples, mean[:d], cov[:d, :d]) < Z < moment_z(samples, mean[:d], 1.06 * cov[:d, :d])


@pytest.mark.parametrize("step", EVERY, ids=repr)
def test_the_layout_of_the_state_does_not_matter(step):
    x = start(64)
    strided = x.T.contiguous().T
    assert strided.stride() != x.stride()

    def noise():
        return PerSampleNoise([seeded(i) for i in range(64)])

    for correct in (None, "certify") if step.stochastic else (None,):
        sde = BackwardSDE(SCHEDULE, Blend(MixtureStack([GAUSSIAN, GAUSSIAN], SCHEDULE), [0.4, 0.6]))
        runs = [solve(sde, v, GRID, noise=noise(), step=step, correct=correct).samples for v in (x, strided)]
        torch.testing.assert_close(*runs, rtol=1e-10, atol=1e-10)


def test_images_in_either_memory_format():
    x = torch.randn(4, 3, 5, 5, generator=seeded(), dtype=torch.float64)
    last = x.to(memory_format=torch.channels_last)
    sde = BackwardSDE(SCHEDULE, Blend([lambda x, t: -x, lambda x, t: -torch.tanh(x)], [0.5, 0.5]))
    generators = [[seeded(i) for i in range(4)] for _ in range(2)]
    one, two = (
        solve(sde, v, GRID, noise=g, correct="certify") for v, g in zip((x, last), generators, strict=True)
    )
    torch.testing.assert_close(one.samples, two.samples, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one.log_weights, two.log_weights, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("step", "calls"), [(EulerMaruyama(), 15), (ExponentialMultistep(), 15), (Heun(), 29)])
def test_evaluations_are_counted_as_they_are(step, calls):
    stack = CountingStack(Stack([lambda x, t: -x, lambda x, t: -2 * x, lambda x, t: -3 * x]))
    solution = solve(BackwardSDE(SCHEDULE, Blend(stack, [0.5, 0.0, 0.5])), start(), GRID, noise=seeded(), step=step)
    assert solution.evaluations == 2 * calls and stack.evaluations == 7 * 2 * calls
    plain = solve(SDE, start(), GRID, noise=seeded(), step=step)
    assert plain.evaluations == calls and plain.log_weights is None and plain.certificate is None


def test_progress_counts_the_steps():
    seen = []
    solve(SDE, start(), GRID, noise=seeded(), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(n, 15) for n in range(1, 16)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_state_names_step_time_and_sample(value):
    def score(x, t):
        out = -x
        if float(t) == float(GRID[5]):
            out = out.clone()
            out[3, 1] = value
        return out

    words = rf"non-finite value in sample 3 at step 6 \(t = {float(GRID[5]):g} -> {float(GRID[6]):g}\)"
    with pytest.raises(FloatingPointError, match=words):
        solve(BackwardSDE(SCHEDULE, score), start(), GRID, noise=seeded())


def test_large_but_finite_states_pass():
    # Their sum overflows, they do not; without drift and noise they stay.
    huge, schedule = torch.full((7, 2), 3e38), KarrasVE()
    sde = BackwardSDE(schedule, lambda x, t: torch.zeros_like(x))
    assert torch.equal(solve(sde, huge, time_grid(schedule, 4), noise=seeded(), step=Heun()).samples, huge)


BLEND = BackwardSDE(SCHEDULE, Blend([SDE.score, lambda x, t: -x], [0.5, 0.5]))
IN_TIME = BackwardSDE(SCHEDULE, Blend([SDE.score, SDE.score], lambda t: torch.stack([t, 1 - t])))


def change(x, value):
    out = x.clone()
    out[2, 0] = value
    return out


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"x": start().half()}, TypeError, r"float32 or float64, got float16; .*\.float\(\)"),
        ({"x": start().bfloat16()}, TypeError, "got bfloat16"),
        ({"x": start().long()}, TypeError, "got int64"),
        ({"x": [[0.0, 1.0]]}, TypeError, "torch tensor.*got list"),
        ({"x": torch.zeros(3)}, ValueError, r"\(B, \*event\) with B >= 1, got \(3,\)"),
        ({"x": torch.zeros(0, 2)}, ValueError, r"got \(0, 2\)"),
        ({"x": change(start(), float("nan"))}, ValueError, "non-finite value in sample 2"),
        ({"grid": GRID.flip(0)}, ValueError, "must decrease"),
        ({"grid": torch.tensor([1.0, 0.4, 0.4])}, ValueError, "0.4 then 0.4"),
        ({"grid": torch.tensor([1.5, 0.4])}, ValueError, "got 1.5"),
        ({"noise": None}, TypeError, "noise must be a torch.Generator.*got NoneType"),
        ({"correct": "fix"}, ValueError, "certify, resample, got 'fix'"),
        ({"correct": 1}, TypeError, "got 1"),
        ({"sde": SDE, "correct": "certify"}, ValueError, "needs a Blend with constant coefficients, got MixtureScore"),
        ({"sde": IN_TIME, "correct": "certify"}, ValueError, "time-dependent coefficients"),
        ({"correct": "certify", "step": Heun()}, ValueError, "needs a step with noise, got Heun"),
        ({"correct": "certify", "step": Ancestral(eta=0.0)}, ValueError, "needs a step with noise, got Ancestral"),
        ({"correct": "resample", "noise": ReplayNoise([])}, ValueError, "needs a generator, got a noise source"),
        ({"correct": Correction("resample")}, ValueError, "generator of its own"),
        ({"correct": Correction(groups=torch.zeros(3))}, ValueError, r"shape \(7,\), got \(3,\)"),
    ],
)
def test_bad_input_is_named(options, kind, words):
    given = {"sde": BLEND, "x": start(), "grid": GRID, "noise": seeded()} | options
    with pytest.raises(kind, match=words) as info:
        solve(**given)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_eta_is_checked(eta):
    with pytest.raises(ValueError, match="eta must lie within"):
        Ancestral(eta)
