"""Orders of convergence: slopes over nested grids on one Brownian path against what each step declares.

The error of n steps is taken as the distance to 2 n steps on the same path, which shrinks with the same order and
needs no reference; that all steps have one limit is a test of its own.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from sdeblend import (
    STEPS,
    Ancestral,
    BackwardSDE,
    BrownianNoise,
    EulerMaruyama,
    ExponentialMultistep,
    Heun,
    VPLinear,
    solve,
)
from tests.support.core import seeded, slope
from toy.mixtures.mixture import GaussianMixture
from toy.scores.stack import mixture_score

TOLERANCE = 0.15
SCHEDULE = VPLinear()
SDE = BackwardSDE(SCHEDULE, mixture_score(GaussianMixture([0.6, 0.4], [[-1.5], [1.5]], [0.5, 0.6]), SCHEDULE))
FINEST, PATHS = 512, 2000
LEVELS = (32, 64, 128, 256)
# Down to low noise the law's error is large enough to be resolved; a path's is asymptotic from fewer steps above.
WEAK_ENDS, STRONG_ENDS = (0.7, 0.05), (0.8, 0.3)
STOCHASTIC = [EulerMaruyama(), Ancestral(eta=1.0), Ancestral(eta=0.5), ExponentialMultistep()]
DETERMINISTIC = [Ancestral(eta=0.0), ExponentialMultistep(stochastic=False), Heun()]


class Wrong(EulerMaruyama):
    """Counts the score 2 % too much."""

    def coefficients(self, schedule, grid):
        k = super().coefficients(schedule, grid)
        return type(k)(k.a, 1.02 * k.b, k.c, k.g)


def start():
    return torch.randn(PATHS, 1, generator=seeded(1), dtype=torch.float64)


def grid(steps, ends):
    return torch.linspace(*ends, FINEST + 1, dtype=torch.float64)[:: FINEST // steps]


@cache
def brownian(ends):
    return BrownianNoise(grid(FINEST, ends), (PATHS, 1), seeded(2))


@cache
def run(step, steps, ends=STRONG_ENDS):
    return solve(SDE, start(), grid(steps, ends), noise=brownian(ends), step=step).samples


def strong_errors(step):
    return [float((run(step, n) - run(step, 2 * n)).abs().mean()) for n in LEVELS]


def weak_errors(step):
    # One path for both: a difference of E x^2 far below the spread of x^2 is resolved.
    pairs = [(run(step, n, WEAK_ENDS), run(step, 2 * n, WEAK_ENDS)) for n in LEVELS]
    return [abs(float((one.square() - two.square()).mean())) for one, two in pairs]


def test_every_named_step_is_measured():
    kinds = {(type(step), step.stochastic) for step in (*STOCHASTIC, *DETERMINISTIC)}
    assert {(type(factory()), factory().stochastic) for factory in STEPS.values()} <= kinds


@pytest.mark.parametrize("step", STOCHASTIC, ids=repr)
def test_strong_order(step):
    assert step.stochastic and step.strong_order is not None
    assert slope(LEVELS, strong_errors(step)) == pytest.approx(step.strong_order, abs=TOLERANCE)


@pytest.mark.parametrize("step", STOCHASTIC, ids=repr)
def test_weak_order(step):
    assert slope(LEVELS, weak_errors(step)) == pytest.approx(step.order, abs=TOLERANCE)


@pytest.mark.parametrize("step", DETERMINISTIC, ids=repr)
def test_order_without_noise(step):
    assert step.strong_order is None and not step.stochastic
    assert slope(LEVELS, strong_errors(step)) == pytest.approx(step.order, abs=TOLERANCE)


def distance(one, other):
    return float((run(one, FINEST) - run(other, FINEST)).abs().mean())


def test_steps_of_one_process_have_one_limit():
    step, *others = EulerMaruyama(), Ancestral(eta=1.0), ExponentialMultistep()
    for other in others:
        # Each is about one last difference from its limit.
        allowed = 1.5 * (strong_errors(step)[-1] + strong_errors(other)[-1])
        assert distance(step, other) < allowed < distance(Wrong(), other)
    # eta = 1/2 is another process of the same marginals: other paths
    assert distance(step, Ancestral(eta=0.5)) > 10 * strong_errors(step)[-1]


def test_steps_without_noise_have_one_limit():
    step, *others = DETERMINISTIC
    for other in others:
        assert distance(step, other) < 1.5 * (strong_errors(step)[-1] + strong_errors(other)[-1])
    assert distance(step, Ancestral(eta=0.05)) > 2 * strong_errors(step)[-1]


def test_other_noise_on_every_grid_has_no_strong_order():
    # The control of the strong order: without the common path the differences do not shrink.
    errors = []
    for n in LEVELS:
        end = solve(SDE, start(), grid(n, STRONG_ENDS), noise=seeded(n), step=EulerMaruyama()).samples
        errors.append(float((end - run(EulerMaruyama(), 2 * n)).abs().mean()))
    assert slope(LEVELS, errors) < 0.3
