"""Langevin moves: one move by hand, the law of a chain with moves, counts, draws of members, and what is refused."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdeblend import (
    Ancestral,
    BackwardSDE,
    Blend,
    BrownianNoise,
    Corrector,
    CountingStack,
    EulerMaruyama,
    OneMemberPerStep,
    PerSampleNoise,
    Stack,
    VPLinear,
    place_moves,
    solve,
    time_grid,
    trajectory,
)
from tests.support.core import Z, moment_z, seeded

SCHEDULE = VPLinear()
GRID = time_grid(SCHEDULE, 12)
STACK = Stack([lambda x, t: -x, lambda x, t: 1 - 2 * x, lambda x, t: -3 * x])
WEIGHTS = torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64)


def start(batch=7, dim=2):
    return SCHEDULE.prior((batch, dim), generator=seeded(1), dtype=torch.float64)


def blend(stack=STACK):
    return BackwardSDE(SCHEDULE, Blend(stack, WEIGHTS))


def one_member(stack=STACK, batch=7):
    return BackwardSDE(SCHEDULE, OneMemberPerStep(stack, WEIGHTS, GRID, batch, generator=seeded(5)))


class Recorded:
    """A noise source that keeps what it was asked for and what it gave."""

    def __init__(self):
        self.asked, self.given, self.generator = [], [], seeded(3)

    def __call__(self, n, t, s, like):
        self.asked.append((n, float(t), float(s)))
        self.given.append(torch.randn(like.shape, generator=self.generator, dtype=like.dtype))
        return self.given[-1]


@pytest.mark.rng_untouched
@pytest.mark.parametrize("sde", [blend(), one_member(), BackwardSDE(SCHEDULE, lambda x, t: -2 * x)])
def test_a_step_and_its_moves_by_hand(sde):
    noise, grid = Recorded(), GRID[4:6]
    end = solve(sde, start(), grid, noise=noise, step=Ancestral(), corrector=Corrector(2, 0.3)).samples
    t, s = float(grid[0]), float(grid[1])
    assert noise.asked == [(0, t, s), (1, s, s), (2, s, s)]  # numbered after the noise of all steps
    score = sde.score if not isinstance(sde.score, OneMemberPerStep) else Blend(STACK, WEIGHTS)
    x = Ancestral()(sde, start(), t, s, noise.given[0])
    d = 0.3 * float(SCHEDULE.sigma(s)) ** 2
    for z in noise.given[1:]:
        x = x + d * score(x, grid[1]) + (2 * d) ** 0.5 * z
    torch.testing.assert_close(end, x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", [blend, one_member])
def test_a_move_by_one_member_is_the_members_own(make):
    noise = Recorded()
    states = list(
        trajectory(make(), start(), GRID, noise=noise, corrector=Corrector(2, members="one", generator=seeded(9)))
    )
    plain = list(trajectory(make(), start(), GRID, noise=Recorded()))
    assert [len(noise.asked), noise.asked[1][0], noise.asked[2][0]] == [11 + 22, 12, 13]
    x = plain[1].x  # the first step saw the same noise
    s, d = GRID[1], 0.2 * float(SCHEDULE.sigma(GRID[1])) ** 2
    ends = [x]
    for z in noise.given[1:3]:
        scores = STACK(x, s)
        ends = [e + d * score + (2 * d) ** 0.5 * z for e in ends for score in (-e, -3 * e)]
        assert len(scores) == 3
    # each row is at one of the 2 x 2 ends that its members can lead to, and the rows do not all choose alike
    gaps = torch.stack([(e - states[1].x).abs().amax(1) for e in ends])
    assert float(gaps.amin(0).max()) < 1e-12 and len(gaps.argmin(0).unique()) > 1


def test_members_of_moves_take_turns():
    seen = []
    scores = Stack([lambda x, t, k=k: (seen.append((k, float(t))), -x)[1] for k in range(2)])
    sde = BackwardSDE(SCHEDULE, Blend(scores, [0.5, 0.5]))
    for seed in range(4):
        seen.clear()
        corrector = Corrector(2, members="one", generator=seeded(seed))
        solve(sde, start(1), GRID, noise=seeded(2), corrector=corrector)
        moved = [k for n, (k, t) in enumerate(seen) if n % 4 > 1][: 2 * 11]  # two by the step, then two moves
        assert len(moved) == 22 and all(a != b for a, b in pairwise(moved))


def test_the_law_of_a_chain_with_moves():
    # For the score S = -P x the chain is Gaussian, and its covariance follows from the maps applied to it.
    precision = torch.tensor([[1.5, 0.4], [0.4, 0.8]], dtype=torch.float64)
    sde = BackwardSDE(SCHEDULE, lambda x, t: -x @ precision)
    grid, eye = time_grid(SCHEDULE, 8, to_zero=False), torch.eye(2, dtype=torch.float64)

    def covariance(kappa):
        cov = eye
        for move in EulerMaruyama().plan(SCHEDULE, grid):
            step, d = move.a * eye - move.b * precision, kappa * float(SCHEDULE.sigma(move.s)) ** 2
            cov = step @ cov @ step + move.g**2 * eye
            for _ in range(2):
                cov = (eye - d * precision) @ cov @ (eye - d * precision) + 2 * d * eye
        return cov

    x = start(40_000)
    samples = solve(sde, x, grid, noise=seeded(2), corrector=Corrector(2, 0.3)).samples
    zero = torch.zeros(2, dtype=torch.float64)
    assert moment_z(samples, zero, covariance(0.3)) < Z < moment_z(samples, zero, covariance(0.2))


def test_moves_bring_the_chain_back_to_its_law_up_to_their_size():
    # The fixed point of x' = (1 - d P) x + sqrt(2 d) z has variance 1 / (P (1 - d P / 2)): 1 / P up to O(d).
    t, p = 0.2, 2.0
    grid = torch.tensor([t + 1e-9, t], dtype=torch.float64)
    for kappa in (0.2, 0.4):
        d = kappa * float(SCHEDULE.sigma(t)) ** 2
        samples = solve(
            BackwardSDE(SCHEDULE, lambda x, t: -p * x), 3 + start(20_000, 1), grid, noise=seeded(2),
            corrector=Corrector(80, kappa),
        ).samples  # fmt: skip
        stationary = torch.tensor([[1 / (p * (1 - d * p / 2))]], dtype=torch.float64)
        zero = torch.zeros(1, dtype=torch.float64)
        assert moment_z(samples, zero, stationary) < Z < moment_z(samples, zero, 1.08 * stationary)


@pytest.mark.parametrize("corrector", [Corrector(2), Corrector(2, members="one"), Corrector(2, within=(0.3, 0.8))])
@pytest.mark.parametrize("make", [blend, one_member])
def test_evaluations_are_counted_as_they_are(make, corrector):
    stack = CountingStack(STACK)
    solution = solve(make(stack), start(), GRID, noise=seeded(2), corrector=corrector)
    assert stack.evaluations == 7 * solution.evaluations
    moves = 2 * sum((corrector.within or (0, 1))[0] <= float(s) <= 0.8 for s in GRID[1:-1]) if corrector.within else 22
    each = 1 if corrector.members == "one" else 2
    assert solution.evaluations == (24 if make is blend else 12) + each * moves


def test_moves_by_step_follow_their_steps():
    noise, counts = Recorded(), [0, 3, *[0] * 8, 1, 5]
    solve(blend(), start(), GRID, noise=noise, corrector=Corrector(counts))
    still = [t for n, t, s in noise.asked if t == s]
    assert still == [float(GRID[2])] * 3 + [float(GRID[11])]  # at t = 0 there are none
    every = [float(s) for s in GRID[1:-1] for _ in range(2)]
    noise = Recorded()
    solve(blend(), start(), GRID, noise=noise, corrector=Corrector(2))
    assert [t for n, t, s in noise.asked if t == s] == every
    assert [n for n, *_ in noise.asked if n >= 12] == list(range(12, 34))


def test_a_run_repeats_whatever_stands_beside_a_sample():
    def run(seeds, rows):
        noise = PerSampleNoise([seeded(i) for i in seeds])
        return solve(blend(), start()[rows], GRID, noise=noise, corrector=Corrector()).samples

    assert torch.equal(run(range(7), slice(None))[[2, 5]], run([2, 5], [2, 5]))

    def by_one(generator):
        corrector = Corrector(members="one", generator=generator)
        return solve(blend(), start(), GRID, noise=seeded(4), corrector=corrector).samples

    assert torch.equal(by_one(None), by_one(None)) and torch.equal(by_one(seeded(1)), by_one(seeded(1)))
    assert not torch.equal(by_one(seeded(1)), by_one(seeded(2)))  # the noise is the same, the members are others


def test_weights_are_those_of_the_steps():
    x = start()
    states = list(trajectory(blend(), x, GRID, noise=seeded(2), correct="certify", corrector=Corrector(3)))
    total = torch.zeros(7, dtype=torch.float64)
    for move, before in zip(EulerMaruyama().plan(SCHEDULE, GRID), states, strict=False):
        if move.g:  # scores -x and -3 x, half each: the variance is x^2
            total -= before.x.square().sum(1) * move.b**2 / (2 * move.g**2)
    torch.testing.assert_close(states[-1].log_weights, total)
    certificate = states[-1].certificates[0]
    assert len(certificate.profile) == 12


profiles = st.lists(st.floats(0, 100), min_size=1, max_size=30).filter(lambda v: sum(v) > 1e-3)


@given(profiles, st.integers(0, 500))
def test_moves_are_placed_in_proportion(profile, budget):
    counts = place_moves(profile, budget)
    assert sum(counts) == budget and len(counts) == len(profile)
    for count, share in zip(counts, profile, strict=True):
        assert abs(count - budget * share / sum(profile)) < 1 + 1e-6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"moves": -1}, "at least 0, got -1"),
        ({"moves": 1.5}, "whole numbers"),
        ({"moves": [1, True]}, "whole numbers"),
        ({"step_size": 0.0}, r"within \(0, 1\], got 0.0"),
        ({"step_size": float("nan")}, "got nan"),
        ({"within": (0.5, 0.5)}, "low < high"),
        ({"members": "two"}, "all, one, got 'two'"),
    ],
)
def test_bad_correctors_are_named(options, words):
    with pytest.raises(ValueError, match=words) as info:
        Corrector(**options)
    assert "\n" not in str(info.value)


def test_what_does_not_fit_the_run_is_named():
    def run(sde=None, noise=None, **options):
        return solve(sde or blend(), start(), GRID, noise=noise or seeded(2), corrector=Corrector(**options))

    with pytest.raises(ValueError, match="one number for each of 12 steps, got 2"):
        run(moves=[1, 2])
    with pytest.raises(ValueError, match="OneMemberPerStep, got function"):
        run(BackwardSDE(SCHEDULE, lambda x, t: -x), members="one")
    with pytest.raises(ValueError, match="got time-dependent ones"):
        run(BackwardSDE(SCHEDULE, Blend(STACK, lambda t: WEIGHTS)), members="one")
    with pytest.raises(ValueError, match=r"probabilities, got -0\.5"):
        run(BackwardSDE(SCHEDULE, Blend(STACK, [-0.5, 0.5, 1.0])), members="one")
    with pytest.raises(ValueError, match="needs a generator, got a noise source"):
        run(noise=Recorded(), members="one")
    with pytest.raises(ValueError, match="no noise for moves at one time"):
        run(noise=BrownianNoise(GRID, (7, 2), seeded(1)))
    for bad in ([], [0.0, 0.0], [-1.0, 2.0], [float("nan")]):
        with pytest.raises(ValueError, match="profile must be numbers"):
            place_moves(bad, 3)
    with pytest.raises(ValueError, match="budget of moves"):
        place_moves([1.0], -1)
