"""Funnels: more samples at the start than are kept; the law is that of the weights, and the cost is counted."""

from __future__ import annotations

import math

import pytest
import torch

from sdeblend import (
    BackwardSDE,
    Blend,
    Correction,
    Corrector,
    CountingStack,
    ExponentialMultistep,
    PerSampleNoise,
    Preference,
    VPLinear,
    solve,
    time_grid,
    trajectory,
)
from tests.support.core import Z, seeded
from toy.problems import line2

SCHEDULE = VPLinear()
PROBLEM, PREFERENCE = line2(0.25), Preference({"right": 0.5, "left": 0.5})
GRID = time_grid(SCHEDULE, 40)
LEVELS = (-SCHEDULE.log_snr(GRID[1:]) / 2).exp().tolist()


def funnel(keep, seed=5, **options):
    return Correction("resample", generator=seeded(seed), keep=keep, **options)


def sde(stack=None, preference=PREFERENCE):
    return BackwardSDE(SCHEDULE, Blend(stack or PROBLEM.stack(SCHEDULE), preference))


def start(batch):
    return SCHEDULE.prior((batch, 1), generator=seeded(1), dtype=torch.float64)


def run(correction, batch=6400, noise=None, **options):
    return solve(sde(), start(batch), GRID, noise=noise or seeded(2), correct=correction, **options)


def left(mixture):
    z = -mixture.means[:, 0] / mixture.covariances[:, 0, 0].sqrt()
    return float(mixture.weights @ (1 + torch.erf(z / math.sqrt(2))) / 2)


@pytest.mark.parametrize("corrector", [None, Corrector(1, 0.1, members="one")])
def test_a_funnel_has_the_law_of_the_weights_for_less(corrector):
    # 100 problems of 64 samples each, of which 16 are kept
    groups, exact = torch.arange(6400) // 64, left(PROBLEM.target(PREFERENCE))

    def share(solution):
        """Return the share of the left over all problems, each weighed by its own estimate of E[W]: no bias is left."""
        weight = solution.log_weights.reshape(100, -1).softmax(1)
        own = (weight * (solution.samples.reshape(100, -1) < 0).double()).sum(1)
        scale = torch.tensor([value for value, _ in solution.log_normalizers], dtype=torch.float64).softmax(0)
        mean = float(scale @ own)
        return mean, float((scale * (own - mean)).norm())

    plain, constant, narrowed = (
        run(c, corrector=corrector)
        for c in (Correction(groups=groups), Correction("resample", generator=seeded(5), groups=groups),
                  funnel(16, groups=groups))
    )  # fmt: skip
    assert len(narrowed.samples) == 1600 and len(constant.samples) == 6400
    assert bool((narrowed.ancestors // 64 == torch.arange(100).repeat_interleave(16)).all())
    for solution in (constant, narrowed):
        mean, error = share(solution)
        assert abs(mean - exact) < Z * error < 0.15
    off = float((plain.samples < 0).double().mean())
    assert abs(off - exact) > Z * share(narrowed)[1]
    normalizers = torch.tensor(narrowed.log_normalizers, dtype=torch.float64)
    assert 0.7 < float(normalizers[:, 1].mean() / normalizers[:, 0].std()) < 1.5
    # evaluations of all that was started, for each that is kept
    total = [len(s.samples) * s.evaluations for s in (constant, narrowed)]
    assert total[1] < total[0] and narrowed.evaluations > 2 * constant.evaluations


def test_the_cost_is_counted_and_known_before():
    stack = CountingStack(PROBLEM.stack(SCHEDULE))
    level = LEVELS[24]
    solution = solve(sde(stack), start(48), GRID, noise=seeded(2), correct=funnel(12, down_to=level, threshold=1e-9))
    assert solution.resampled == [25] and len(solution.samples) == 12
    assert stack.evaluations == 12 * solution.evaluations == 2 * (25 * 48 + 15 * 12)
    assert solution.notes[-1] == "of 48 samples 12 were kept, at 230 evaluations each"
    known = Correction("resample", keep=12, down_to=level).most_evaluations(48, LEVELS, members=2)
    assert known == solution.evaluations
    moving = Correction("resample", keep=12, down_to=level).most_evaluations(
        48, LEVELS, members=2, moves=[1] * 39 + [0]
    )
    stack = CountingStack(PROBLEM.stack(SCHEDULE))
    correction = funnel(12, down_to=level, threshold=1e-9)
    solve(sde(stack), start(48), GRID, noise=seeded(2), correct=correction, corrector=Corrector())
    assert stack.evaluations == 12 * moving
    assert Correction().most_evaluations(48, LEVELS, members=2) == 80
    assert funnel(12).most_evaluations(48, LEVELS) == (39 * 48 + 12) / 12
    late = funnel(12, down_to=LEVELS[36], threshold=0.9)
    earlier = solve(sde(), start(48), GRID, noise=seeded(2), correct=late)
    assert earlier.evaluations < late.most_evaluations(48, LEVELS, members=2) and earlier.resampled[0] < 37


def test_each_that_goes_on_has_its_own_noise_members_and_coefficients():
    # what is kept continues as it would alone: the same ancestors, rows, noise
    rows = torch.stack([PREFERENCE.coefficients(), Preference([0.2, 0.8]).coefficients()])[torch.arange(32) % 2]
    level = LEVELS[24]

    def go(correction):
        noise = PerSampleNoise([seeded(i) for i in range(32)])
        blend = BackwardSDE(SCHEDULE, Blend(PROBLEM.stack(SCHEDULE), rows))
        return list(trajectory(blend, start(32), GRID, noise=noise, step=ExponentialMultistep(), correct=correction))

    states, plain = go(funnel(4, down_to=level, threshold=1e-9)), go(None)
    weights = states[-1].weights
    assert weights.resampled == [25] and len(states[-1].x) == 8
    assert torch.equal(states[24].x, plain[24].x)
    assert bool((weights.ancestors % 2 == torch.arange(8) % 2).all())  # every group keeps its first four places
    torch.testing.assert_close(states[25].x, plain[25].x[weights.ancestors])
    # one step on, by hand, from the ancestors' states with the places' own coefficients and noise
    step, place = ExponentialMultistep(), torch.arange(8)
    moves, blend = step.plan(SCHEDULE, GRID), Blend(PROBLEM.stack(SCHEDULE), rows)
    before, move = moves[24], moves[25]
    memory = before.p * plain[24].x + before.q * blend(plain[24].x, before.t)
    generators = [seeded(i) for i in range(32)]
    for _ in range(26):
        z = torch.stack([torch.randn(1, generator=g, dtype=torch.float64) for g in generators])
    x = states[25].x
    score = Blend(PROBLEM.stack(SCHEDULE), rows[place])(x, move.t)
    expected = move.a * x + move.b * score + move.c * memory[weights.ancestors] + move.g * z[place]
    torch.testing.assert_close(states[26].x, expected, rtol=1e-9, atol=1e-9)


def test_nothing_is_narrowed_below_what_is_kept_and_a_certificate_has_all_its_paths():
    solution = run(funnel(100, down_to=LEVELS[30], threshold=1e-9), batch=400)
    assert len(solution.samples) == len(solution.log_weights) == 100
    plain = run(Correction(down_to=LEVELS[30]), batch=400).certificate
    assert solution.certificate.value == pytest.approx(plain.value) and solution.certificate.samples == pytest.approx(
        400
    )
    whole = run(funnel(400), batch=400)
    assert len(whole.samples) == 400


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "certify", "keep": 2}, "with mode 'resample', got 2 with 'certify'"),
        ({"mode": "resample", "keep": 0}, "at least 1"),
        ({"mode": "resample", "keep": True}, "at least 1"),
    ],
)
def test_bad_funnels_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        Correction(**options)


def test_more_than_there_are_cannot_be_kept():
    with pytest.raises(ValueError, match="at most the 3 samples that a group begins with, got 4"):
        run(funnel(4, groups=torch.tensor([0] * 5 + [1] * 3)), batch=8)
