"""The correction: normaliser and weighted law against closed forms, resampling, groups, tempering, active interval."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdeblend import (
    STEPS,
    Ancestral,
    BackwardSDE,
    Blend,
    Correction,
    EulerMaruyama,
    ExponentialMultistep,
    Preference,
    VPLinear,
    effective_sample_size,
    solve,
    systematic_resample,
    time_grid,
    trajectory,
)
from sdeblend.correct import log_mean_exp
from tests.support.core import Z, moment_z, seeded
from toy.problems import line2, ring8

SCHEDULE = VPLinear()
PROBLEM = line2(kl_weight=0.25)
PREFERENCE = Preference({"right": 0.5, "left": 0.5})
BEYOND = Preference({"right": 0.5, "left": 0.5}, strength=1.3)


def blended(preference=PREFERENCE, problem=PROBLEM):
    return BackwardSDE(SCHEDULE, Blend(problem.stack(SCHEDULE), preference))


def run(correct="certify", batch=4000, steps=100, preference=PREFERENCE, seed=0, problem=PROBLEM, step=None):
    x = SCHEDULE.prior((batch, problem.base.dim), generator=seeded(1000 + seed), dtype=torch.float64)
    grid = time_grid(SCHEDULE, steps, "log-snr")
    step = step or ExponentialMultistep()
    return solve(blended(preference, problem), x, grid, noise=seeded(2000 + seed), step=step, correct=correct)


def resampling(seed=5, threshold=0.9, **options):
    return Correction("resample", generator=seeded(seed), threshold=threshold, **options)


@pytest.mark.parametrize("step", [EulerMaruyama(), Ancestral(), ExponentialMultistep()], ids=repr)
@pytest.mark.parametrize("preference", [PREFERENCE, BEYOND])
def test_log_normalizer_is_the_closed_form(step, preference):
    gentle = PROBLEM.with_kl_weight(0.5)
    solution = run(step=step, preference=preference, steps=200, problem=gentle)
    exact = gentle.blend_log_normalizer(preference)
    value, error = solution.log_normalizers[0]
    allowed = Z * error + 0.05  # steps leave a bias of first order
    assert abs(value - exact) < allowed
    wrong_sign = log_mean_exp(-solution.log_weights)[0]
    assert abs(wrong_sign - exact) > 4 * allowed
    assert abs(1.5 * value - exact) > 1.5 * allowed


def test_weighted_samples_follow_the_target_and_plain_ones_do_not():
    target, solution = PROBLEM.target(PREFERENCE), run(batch=20_000, steps=200)
    x, mean, covariance = solution.samples, target.mean, target.covariance
    assert moment_z(x, mean, covariance, solution.log_weights) < Z
    assert moment_z(x, mean, covariance) > 2 * Z
    assert moment_z(x, mean, covariance, -solution.log_weights) > 2 * Z


def test_resampled_samples_follow_the_target():
    target = PROBLEM.target(PREFERENCE)
    # Resampled particles are dependent: the error is taken from the spread over independent runs.
    runs = [run(resampling(seed), batch=1000, seed=seed) for seed in range(16)]
    assert all(solution.resampled for solution in runs)
    share = torch.stack([r.log_weights.softmax(0) @ (r.samples[:, 0] < 0).double() for r in runs])
    exact = _left(target)
    error = float(share.std()) / math.sqrt(len(runs))
    assert abs(float(share.mean()) - exact) < Z * error
    plain = torch.stack([(run(batch=1000, seed=seed).samples[:, 0] < 0).double().mean() for seed in range(4)]).mean()
    assert abs(float(plain) - exact) > Z * error


def _left(mixture):
    z = -mixture.means[:, 0] / mixture.covariances[:, 0, 0].sqrt()
    return float(mixture.weights @ (1 + torch.erf(z / math.sqrt(2))) / 2)


def test_ring8_reaches_the_floor():
    problem, preference = ring8(0.25), Preference({"right": 0.5, "up": 0.5})
    target = problem.target(preference)

    def distance(solution, weighted):
        weights = (solution.log_weights if weighted else torch.zeros(4000, dtype=torch.float64)).softmax(0)
        shares = weights @ target.responsibilities(solution.samples)
        return float((shares - target.weights).abs().sum() / 2)

    corrected = run(resampling(), steps=150, problem=problem, preference=preference)
    plain = run(steps=150, problem=problem, preference=preference)
    # Exact samples: TV of 8 modes at 4096 samples is .011 on average, its 95 % point about .02.
    assert distance(corrected, True) < 0.03 < 0.05 < distance(plain, False)
    assert corrected.log_normalizer == pytest.approx(problem.blend_log_normalizer(preference), abs=0.05)


def test_a_resampled_run_has_the_certificate_of_the_plain_blend():
    plain, resampled = run(batch=20_000), run(resampling(threshold=0.9), batch=20_000)
    assert resampled.resampled and not plain.resampled
    one, two = plain.certificate, resampled.certificate
    allowed = Z * math.hypot(one.standard_error, two.standard_error)
    assert abs(one.value - two.value) < allowed < 0.3 * one.value
    assert abs(one.ess_fraction - two.ess_fraction) < 0.1
    torch.testing.assert_close(one.profile, two.profile, rtol=0.15, atol=2e-3)
    # the control: the paths as they stand, after resampling, would say something else
    assert abs(float(one.per_sample.mean()) - float(two.profile.sum())) < allowed
    assert abs(float(one.per_sample.mean()) - float(two.per_sample.mean())) > 2 * allowed
    errors = math.hypot(plain.log_normalizers[0][1], resampled.log_normalizers[0][1])
    assert abs(plain.log_normalizer - resampled.log_normalizer) < Z * errors


log_weights = st.lists(st.floats(-30, 5), min_size=1, max_size=40).map(lambda v: torch.tensor(v, dtype=torch.float64))


@given(log_weights, st.integers(0, 10_000), st.floats(-500, 500))
def test_systematic_resampling_takes_floor_or_ceil(log_w, seed, shift):
    ancestors = systematic_resample(log_w + shift, seeded(seed))
    expected = len(log_w) * log_w.softmax(0)
    count = torch.bincount(ancestors, minlength=len(log_w)).double()
    assert ancestors.dtype == torch.long and len(ancestors) == len(log_w)
    assert bool((ancestors.diff() >= 0).all())
    assert bool((count >= (expected - 1e-6).floor()).all()) and bool((count <= (expected + 1e-6).ceil()).all())


def test_resampling_is_unbiased():
    log_w = torch.tensor([0.3, -1.0, 1.2, -0.4, -3.0, 0.0, 0.9], dtype=torch.float64)
    draws = 4000
    counts = torch.stack([torch.bincount(systematic_resample(log_w, g), minlength=7) for g in [seeded(7)] * draws])
    mean, error = counts.double().mean(0), counts.double().std(0) / math.sqrt(draws)
    expected = 7 * log_w.softmax(0)
    assert bool(((mean - expected).abs() <= Z * error + 1e-9).all())
    assert bool(((mean - 7 * (1.1 * log_w).softmax(0)).abs() > Z * error).any())


def test_effective_sample_size():
    assert float(effective_sample_size(torch.full((8,), -700.0))) == pytest.approx(8)
    assert float(effective_sample_size(torch.tensor([0.0, -math.inf, -math.inf]))) == pytest.approx(1)
    w = torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(effective_sample_size(w.log()), w.sum(1) ** 2 / w.square().sum(1))


@pytest.mark.parametrize("bad", [[0.0, math.nan], [-math.inf, -math.inf]])
def test_weights_that_are_none_are_refused(bad):
    with pytest.raises(ValueError, match="not all zero"):
        systematic_resample(torch.tensor(bad), seeded())


def test_resampling_happens_below_the_threshold_and_never_last():
    x = SCHEDULE.prior((500, 1), generator=seeded(1), dtype=torch.float64)
    grid = time_grid(SCHEDULE, 60, to_zero=False)
    for threshold in (1.0, 0.9, 0.5):
        previous = torch.zeros(500, dtype=torch.float64)
        states = list(trajectory(blended(), x, grid, noise=seeded(2), correct=resampling(threshold=threshold)))
        resampled = states[-1].weights.resampled
        assert resampled and 60 not in resampled
        for state in states[1:]:
            if state.step in resampled:
                assert bool((state.log_weights == 0).all())
            elif state.step < 60:
                assert float(effective_sample_size(state.log_weights)) >= threshold * 500
                assert not torch.equal(state.log_weights, previous)
            previous = state.log_weights
    # threshold 1: before the last step, every step with unequal weights
    rare = solve(blended(), x, grid, noise=seeded(2), correct=resampling(threshold=0.01))
    assert rare.resampled == [] and torch.equal(
        rare.samples, solve(blended(), x, grid, noise=seeded(2), correct="certify").samples
    )


@pytest.mark.rng_untouched
@pytest.mark.parametrize("name", ["euler-maruyama", "ddim-ancestral", "dpm-2m-sde"])
def test_resampled_runs_repeat_and_have_their_own_generator(name):
    one, two = (run(resampling(), batch=300, steps=40, step=STEPS[name]()) for _ in range(2))
    assert one.resampled and torch.equal(one.samples, two.samples) and torch.equal(one.log_weights, two.log_weights)
    other = run(resampling(6), batch=300, steps=40, step=STEPS[name]())
    # The noise is not touched by the ancestors' draws: until the first resampling the runs are one.
    assert other.resampled[0] == one.resampled[0] and not torch.equal(one.samples, other.samples)
    short = [run("resample", batch=300, steps=40, step=STEPS[name]()).samples for _ in range(2)]
    assert torch.equal(*short)


def test_resampling_with_memory_moves_the_memory_too():
    # A sample and its ancestors carry D_old: recompute one step after a resampling from the ancestor's own past.
    stack = PROBLEM.stack(SCHEDULE)
    sde, grid = BackwardSDE(SCHEDULE, Blend(stack, PREFERENCE)), time_grid(SCHEDULE, 30, "log-snr")
    x, draws = SCHEDULE.prior((200, 1), generator=seeded(1), dtype=torch.float64), []
    generator = seeded(2)

    def noise(n, t, s, like):
        draws.append(torch.randn(like.shape, generator=generator, dtype=like.dtype))
        return draws[-1]

    step = ExponentialMultistep()
    states = list(trajectory(sde, x, grid, noise=noise, step=step, correct=resampling(threshold=0.6)))
    k = states[-1].weights.resampled[0]
    before, after, then = states[k - 1], states[k], states[k + 1]
    moves = step.plan(SCHEDULE, grid)
    previous, move = moves[k - 1], moves[k]
    old = previous.p * before.x + previous.q * sde.score(before.x, previous.t)
    # undo the resampling by value: each state after it is one of those before it
    moved = states[k - 2]
    older = moves[k - 2].p * moved.x + moves[k - 2].q * sde.score(moved.x, moves[k - 2].t)
    candidates = previous.a * before.x + previous.b * sde.score(before.x, previous.t) + previous.c * older
    candidates = candidates + previous.g * draws[k - 1]
    ancestors = (after.x[:, 0, None] - candidates[None, :, 0]).abs().argmin(1)
    torch.testing.assert_close(candidates[ancestors], after.x, rtol=1e-10, atol=1e-10)
    assert len(ancestors.unique()) < 200
    got = move.a * after.x + move.b * sde.score(after.x, move.t) + move.c * old[ancestors] + move.g * draws[k]
    assert k + 1 not in states[-1].weights.resampled
    torch.testing.assert_close(got, then.x, rtol=1e-9, atol=1e-9)
    unmoved = got - move.c * old[ancestors] + move.c * old
    assert float((unmoved - then.x).abs().max()) > 1e-3


def test_groups_are_resampled_apart():
    groups = torch.arange(600) % 3
    x = SCHEDULE.prior((600, 1), generator=seeded(1), dtype=torch.float64)
    x[groups == 1] += 2.5  # one problem starts elsewhere, and has other weights
    x[groups == 2] = 0.1
    sde, grid = blended(), time_grid(SCHEDULE, 40)
    states = list(trajectory(sde, x, grid, noise=seeded(2), correct=resampling(groups=groups)))
    weights = states[-1].weights
    assert weights.resampled
    # every survivor of a group descends from that group
    assert bool((groups[weights.ancestors] == groups).all())
    mixed = list(trajectory(sde, x, grid, noise=seeded(2), correct=resampling()))[-1].weights
    assert mixed.resampled and not bool((groups[mixed.ancestors] == groups).all())
    solution = solve(sde, x, grid, noise=seeded(2), correct=resampling(groups=groups))
    assert len(solution.certificates) == len(solution.log_normalizers) == 3
    assert torch.equal(solution.ancestors, weights.ancestors)
    assert solve(sde, x, grid, noise=seeded(2), correct="certify").ancestors is None


def test_preferences_by_sample_are_problems_of_their_own():
    rows = torch.stack([PREFERENCE.coefficients(), Preference([0.9, 0.1]).coefficients()])[torch.arange(400) % 2]
    x = SCHEDULE.prior((400, 1), generator=seeded(1), dtype=torch.float64)
    grid, sde = time_grid(SCHEDULE, 40), BackwardSDE(SCHEDULE, Blend(PROBLEM.stack(SCHEDULE), rows))
    solution = solve(sde, x, grid, noise=seeded(2), correct="certify")
    assert len(solution.certificates) == 2
    for i in range(2):
        one = BackwardSDE(SCHEDULE, Blend(PROBLEM.stack(SCHEDULE), rows[i]))
        alone = solve(one, x, grid, noise=seeded(2), correct=Correction(groups=torch.arange(400) % 2))
        assert solution.certificates[i].value == pytest.approx(alone.certificates[i].value, rel=1e-8)
    mixed = Correction(groups=torch.zeros(400, dtype=torch.long))
    with pytest.raises(ValueError, match="share their coefficients, got several in group 0"):
        solve(sde, x, grid, noise=seeded(2), correct=mixed)
    with pytest.raises(ValueError, match=r"shape \(400,\), got \(3,\)"):
        solve(sde, x, grid, noise=seeded(2), correct=Correction(groups=torch.zeros(3)))


def test_tempering_and_active_interval_are_partial_and_say_so():
    full, tempered = run(resampling(), batch=2000), run(resampling(tempering=0.3), batch=2000)
    early = run(resampling(active=(0.5, 1.0)), batch=2000)
    assert full.notes == () and len(full.resampled) > len(tempered.resampled)
    assert tempered.notes == ("the weights were tempered by 0.3: the correction is partial",)
    assert early.notes == ("weights steered only for t in [0.5, 1]: the correction is partial",)
    # The certificate is of the full weights, whatever steers.
    plain = run(batch=2000).certificate
    for solution in (tempered, early):
        certificate = solution.certificate
        assert abs(certificate.value - plain.value) < Z * math.hypot(certificate.standard_error, plain.standard_error)
    # threshold so low that nothing is resampled: the steering weights are what they say
    path = run(batch=200).log_weights
    kept = run(resampling(tempering=0.3, threshold=1e-6), batch=200).log_weights
    torch.testing.assert_close(kept, 0.3 * path)
    outside = run(resampling(active=(0.0, 5e-4), threshold=1e-6), batch=200).log_weights
    assert float(outside.abs().max()) == 0
    everywhere = run(resampling(active=(0.0, 1.0), threshold=1e-6), batch=200).log_weights
    torch.testing.assert_close(everywhere, path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "fix"}, "certify, resample, got 'fix'"),
        ({"threshold": 0.0}, "threshold of a correction must lie within"),
        ({"threshold": 1.1}, "got 1.1"),
        ({"threshold": math.nan}, "got nan"),
        ({"tempering": -1.0}, "tempering of a correction"),
        ({"active": (0.5, 0.5)}, "low < high"),
        ({"active": (-1.0, 0.5)}, "0 <= low"),
    ],
)
def test_bad_corrections_are_named(options, words):
    with pytest.raises(ValueError, match=words) as info:
        Correction(**options)
    assert "\n" not in str(info.value)
