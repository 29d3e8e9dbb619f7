"""The bounds on the Jensen gap are never violated, not even by rounding, and half of one would be."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.strategies import SCHEDULE, close, kl_weights, mixtures, points, refuses, rewards, seeds, times
from toy import GaussianMixture, QuadraticReward, blend_gap, jensen_bounds, jensen_gap, thermodynamic_gap
from toy.problems import conflict_line

LINE = GaussianMixture([0.5, 0.3, 0.2], [[-1.5], [0.4], [2.0]], [0.2, 0.05, 0.4])
HILL = QuadraticReward([0.7], [[0.9]], 0.3)
# Each example integrates over tilts: a sixth of the usual number keeps the file quick.
FEWER = settings(max_examples=max(10, settings().max_examples // 6))


@st.composite
def cases(draw):
    base, alpha, t = draw(mixtures()), draw(kl_weights), draw(times)
    return base, draw(rewards(base.dim, 0.4 * alpha)), alpha, t, points(base, t, 4, draw(seeds))


@FEWER
@given(cases())
def test_bounds_hold(case):
    base, reward, alpha, t, x = case
    gap = jensen_gap(base, reward, alpha, SCHEDULE, x, t).norm(dim=-1)
    bounds = jensen_bounds(base, reward, alpha, SCHEDULE, x, t)
    for bound in (bounds.cauchy_schwarz, bounds.shift, bounds.thermodynamic, bounds.best):
        assert bound.shape == gap.shape and not bool(bound.isnan().any())
        assert bool((gap <= bound).all()), f"ratio {float((gap / bound).max())}"


@FEWER
@given(cases())
def test_the_integral_of_third_cumulants_is_the_gap(case):
    base, reward, alpha, t, x = case
    gap = jensen_gap(base, reward, alpha, SCHEDULE, x, t)
    close(thermodynamic_gap(base, reward, alpha, SCHEDULE, x, t), gap, 1e-4, scale=1e-6)


def test_the_bounds_are_close_enough_to_mean_something():
    x = torch.linspace(-3, 3, 31, dtype=torch.float64).unsqueeze(-1)
    tightest = dict.fromkeys(("cauchy_schwarz", "shift", "thermodynamic"), 0.0)
    for t in (0.05, 0.2, 0.5):
        gap = jensen_gap(LINE, HILL, 0.4, SCHEDULE, x, t).norm(dim=-1)
        bounds = jensen_bounds(LINE, HILL, 0.4, SCHEDULE, x, t)
        for name in tightest:
            tightest[name] = max(tightest[name], float((gap / getattr(bounds, name)).max()))
    # The control: a bound that were half as large would be violated here.
    assert all(0.5 < value <= 1 for value in tightest.values()), tightest


def test_a_wrong_reward_violates_the_bounds():
    x = torch.linspace(-2, 2, 21, dtype=torch.float64).unsqueeze(-1)
    gap = jensen_gap(LINE, HILL, 0.2, SCHEDULE, x, 0.3).norm(dim=-1)
    assert bool((gap > jensen_bounds(LINE, HILL, 0.4, SCHEDULE, x, 0.3).best).any())


def test_first_part_of_the_papers_bound_vanishes_for_linear_rewards():
    # For a linear reward and one Gaussian both parts vanish; with several components only the second is left.
    x = torch.zeros(1, 1, dtype=torch.float64)
    one = GaussianMixture([1.0], [[0.3]], [0.5])
    assert float(jensen_bounds(one, QuadraticReward([1.0]), 0.5, SCHEDULE, x, 0.3).shift) < 1e-5
    assert float(jensen_bounds(LINE, QuadraticReward([1.0]), 0.5, SCHEDULE, x, 0.3).shift) > 0.1


def test_bounds_without_a_second_moment_are_infinite():
    base = GaussianMixture([1.0], [[0.0]], [1.0])
    x, convex = torch.zeros(2, 1, dtype=torch.float64), QuadraticReward([0.0], [[-1.5]])
    bounds = jensen_bounds(base, convex, 2.0, SCHEDULE, x, 1.0)
    assert bool(bounds.cauchy_schwarz.isinf().all()) and bool(bounds.shift.isinf().all())
    assert bool(bounds.best.isfinite().all())


def test_a_second_moment_beyond_float64_is_infinite_and_not_nan():
    far = GaussianMixture([0.5, 0.5], [[-20.0], [20.0]], [1.0, 1.0])
    bounds = jensen_bounds(far, QuadraticReward([5.0]), 0.1, SCHEDULE, torch.zeros(1, 1), 0.9)
    assert bool(bounds.cauchy_schwarz.isinf()) and bool(bounds.shift.isinf()) and bool(bounds.best.isfinite())


def test_bounding_the_mean_reward_does_not_bound_the_blend():
    problem = conflict_line()
    x, weights = points(problem.base, 0.3, 50, 0), [0.5, 0.5]
    error = blend_gap(problem.base, problem.rewards, weights, problem.kl_weight, SCHEDULE, x, 0.3).norm(dim=-1)
    mean = jensen_bounds(problem.base, problem.reward(weights), problem.kl_weight, SCHEDULE, x, 0.3).best
    each = [
        jensen_bounds(problem.base, reward, problem.kl_weight, SCHEDULE, x, 0.3).best
        for reward in problem.rewards.values()
    ]
    assert float(error.max()) > 10 * float(mean.max())
    assert bool((error <= mean + 0.5 * each[0] + 0.5 * each[1]).all())


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda: jensen_bounds(LINE, HILL, 0.0, SCHEDULE, torch.zeros(1, 1), 0.3), ["kl_weight"]),
        (lambda: jensen_bounds(LINE, HILL, 1.0, SCHEDULE, torch.zeros(1, 1), 0.0), ["above 0"]),
        (
            lambda: jensen_bounds(LINE, QuadraticReward([0.0], [[-9.0]]), 1.0, SCHEDULE, torch.zeros(1, 1), 1.0),
            ["component"],
        ),
        (lambda: thermodynamic_gap(LINE, HILL, math.nan, SCHEDULE, torch.zeros(1, 1), 0.3), ["kl_weight", "nan"]),
        (lambda: thermodynamic_gap(LINE, QuadraticReward([1.0, 0.0]), 1.0, SCHEDULE, torch.zeros(1, 1), 0.3), ["2"]),
    ],
)
def test_refuses(call, parts):
    refuses(call, *parts)
