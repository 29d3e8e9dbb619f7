"""Metrics: against brute force and closed forms, with errors that cover and distances that notice."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.strategies import close, generator, mixtures, refuses, seeds
from toy import GaussianMixture, QuadraticReward
from toy.metrics import (
    mean_reward,
    mode_weight_tv,
    mode_weight_tv_floor,
    mode_weights,
    moments,
    sliced_w2,
    sliced_w2_floor,
)
from toy.problems import ring8

TARGET = ring8().target([0.5, 0.5])
OTHER = ring8().target([0.6, 0.4])


def normal(count, dim, seed):
    return torch.randn(count, dim, generator=generator(seed), dtype=torch.float64)


def covered(estimate_of, truth, repeats=200):
    """Return the share of |z| < 1.96 over repeats, which is near .95 if the standard error is right."""
    z = torch.stack([(e.value - truth) / e.se for e in map(estimate_of, range(repeats))])
    return float((z.abs() < 1.96).double().mean())


@pytest.mark.rng_untouched
def test_standard_errors_cover():
    reward = ring8().rewards["up"]
    truth = TARGET.mean_reward(reward)

    def sample(seed):
        return TARGET.sample(400, generator=generator(seed))

    assert 0.88 < covered(lambda i: mean_reward(sample(i), reward), truth) < 0.99
    assert 0.88 < covered(lambda i: moments(sample(i)).mean, TARGET.mean) < 0.99
    assert 0.88 < covered(lambda i: moments(sample(i)).covariance, TARGET.covariance) < 0.99
    likely = TARGET.weights > 0.05
    share = covered(
        lambda i: type(mode_weights(sample(i), TARGET))(*(v[likely] for v in mode_weights(sample(i), TARGET))),
        TARGET.weights[likely],
    )
    assert 0.88 < share < 0.99


def test_weighted_errors_cover_and_correct_the_law():
    # Samples of the base with weights exp(r / alpha) are samples of the tilt.
    base, reward = ring8().base, QuadraticReward([0.4, 0.3])
    truth = base.tilt(reward, kl_weight=1.0)

    def estimate(seed):
        x = base.sample(800, generator=generator(seed))
        return moments(x, log_weights=reward(x) + 100.0).mean

    assert 0.88 < covered(estimate, truth.mean) < 0.99
    x = base.sample(50_000, generator=generator(0))
    weighted, plain = (mode_weight_tv(x, truth, log_weights=w) for w in (reward(x), None))
    assert float(weighted.value) < 0.01 < 0.1 < float(plain.value)


def test_mode_weights_of_exact_samples_are_unbiased_though_components_overlap():
    law = GaussianMixture([0.7, 0.3], [[-0.3], [0.3]], [0.5, 0.5])
    estimate = mode_weights(law.sample(100_000, generator=generator(0)), law)
    assert float(((estimate.value - law.weights) / estimate.se).abs().max()) < 4
    assert math.isclose(float(estimate.value.sum()), 1, rel_tol=1e-12)


def test_mode_weight_tv_is_at_the_floor_for_the_law_and_above_for_another():
    floor = mode_weight_tv_floor(TARGET, 2000, generator=generator(0))
    exact = mode_weight_tv(TARGET.sample(2000, generator=generator(1)), TARGET)
    wrong = mode_weight_tv(OTHER.sample(2000, generator=generator(1)), TARGET)
    assert float(exact.value) < 3 * float(floor.value) < float(wrong.value)
    expected = float((OTHER.weights - TARGET.weights).abs().sum()) / 2
    assert abs(float(wrong.value) - expected) < 5 * float(wrong.se)


def test_sliced_w2_of_gaussians():
    # Between N(0, C) and N(m, C) every projection moves by m.u, so the mean square is |m|^2 / d.
    x = normal(500, 3, 0)
    shift = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    g = generator(5)
    directions = torch.randn(3, 64, generator=g, dtype=torch.float64)
    directions = directions / directions.norm(dim=0)
    expected = float((shift @ directions).square().mean().sqrt())
    assert math.isclose(sliced_w2(x, x + shift, generator=generator(5)), expected, rel_tol=1e-9)
    assert sliced_w2(x, x, generator=generator(0)) == 0
    many = sliced_w2(x, x + shift, generator=generator(5), projections=4000)
    assert math.isclose(many, float(shift.norm()) / math.sqrt(3), rel_tol=0.03)


@given(st.integers(1, 30), st.integers(1, 30), seeds)
def test_w2_on_a_line_by_brute_force(n, m, seed):
    g = generator(seed)
    a, b = normal(n, 1, seed), normal(m, 1, seed + 1)
    wa, wb = (torch.randn(k, generator=g, dtype=torch.float64) for k in (n, m))
    # Each sample as many times as its weight says, on a common grid of levels.
    levels = (torch.arange(40_000, dtype=torch.float64) + 0.5) / 40_000

    def quantiles(x, log_w):
        x, order = x[:, 0].sort()
        top = log_w.softmax(0)[order].cumsum(0)
        return x[torch.searchsorted(top, levels).clamp_max(len(x) - 1)]

    expected = float((quantiles(a, wa) - quantiles(b, wb)).square().mean().sqrt())
    value = sliced_w2(a, b, generator=generator(0), log_weights=wa, second_log_weights=wb)
    assert math.isclose(value, expected, rel_tol=1e-2, abs_tol=1e-2)
    even = sliced_w2(a, b, generator=generator(0), log_weights=0 * wa, second_log_weights=0 * wb)
    assert math.isclose(even, sliced_w2(a, b, generator=generator(0)), rel_tol=1e-9, abs_tol=1e-12)


@given(mixtures(), seeds)
def test_distances_are_symmetric_and_see_no_order(law, seed):
    a, b = law.sample(20, generator=generator(seed)), law.sample(30, generator=generator(seed + 1))
    order = torch.randperm(20, generator=generator(seed))

    def distance(x, y):
        return sliced_w2(x, y, generator=generator(0), projections=4)

    assert math.isclose(distance(a, b), distance(b, a), rel_tol=1e-9, abs_tol=1e-12)
    assert math.isclose(distance(a[order], b), distance(a, b), rel_tol=1e-9, abs_tol=1e-12)
    assert distance(a, a) < 1e-7 < distance(a, a + 1)
    assert distance(a + 5, b + 5) == pytest.approx(distance(a, b), rel=1e-6, abs=1e-9)


def test_sliced_w2_floor_and_a_law_that_is_off():
    floor = sliced_w2_floor(TARGET, 2000, generator=generator(0))
    apart = sliced_w2(
        *(law.sample(2000, generator=generator(i)) for i, law in enumerate((TARGET, OTHER))), generator=generator(2)
    )
    assert 0 < float(floor.value) < apart / 3
    larger = sliced_w2_floor(TARGET, 8000, generator=generator(0))
    assert float(larger.value) < float(floor.value)
    assert sliced_w2_floor(TARGET, 500, generator=generator(0), reference=5000).value > 0


def test_families_are_as_much_as_the_starts_that_they_descend_from():
    x, again = TARGET.sample(200, generator=generator(0)), torch.arange(200).repeat_interleave(3)
    found = {
        "alone": (x, {}),
        "families": (x[again], {"families": again}),
        "naive": (x[again], {}),
    }
    errors = {
        name: torch.cat(
            [
                *(part.se.flatten() for part in moments(samples, **own)),
                mode_weights(samples, TARGET, **own).se,
                mode_weight_tv(samples, TARGET, **own).se[None],
                mean_reward(samples, QuadraticReward([1.0, 2.0]), **own).se[None],
            ]
        )
        for name, (samples, own) in found.items()
    }
    torch.testing.assert_close(errors["families"], errors["alone"] * math.sqrt(199 / 200), rtol=0.01, atol=0)
    torch.testing.assert_close(errors["naive"], errors["alone"] / math.sqrt(3), rtol=0.01, atol=0)


def test_moments_of_few_samples():
    x = torch.tensor([[0.0], [2.0]])
    result = moments(x)
    close(result.mean.value, torch.ones(1, dtype=torch.float64))
    close(result.covariance.value, torch.full((1, 1), 2.0, dtype=torch.float64))
    assert bool(mean_reward(x[:1], QuadraticReward([1.0])).se.isinf())


X = torch.zeros(3, 2)
MOMENTS: Any = moments


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda: moments(torch.zeros(3)), ["(n, d)", "(3,)"]),
        (lambda: MOMENTS([1.0]), ["list"]),
        (lambda: moments(torch.zeros(0, 2)), ["none"]),
        (lambda: moments(X + math.nan), ["finite"]),
        (lambda: moments(X[:1]), ["at least two samples"]),
        (lambda: moments(X, log_weights=torch.tensor([0.0, -math.inf, -math.inf])), ["at least two samples"]),
        (lambda: moments(X, log_weights=torch.zeros(2)), ["3 samples", "(2,)"]),
        (lambda: moments(X, log_weights=torch.tensor([0.0, math.nan, 0.0])), ["log weights"]),
        (lambda: moments(X, log_weights=torch.full((3,), -math.inf)), ["log weights", "-inf"]),
        (lambda: moments(X, log_weights=torch.full((3,), math.inf)), ["log weights", "inf"]),
        (lambda: mode_weights(torch.zeros(3, 1), TARGET), ["(n, 2)", "(3, 1)"]),
        (lambda: mode_weight_tv(torch.zeros(3, 3), TARGET), ["(n, 2)", "(3, 3)"]),
        (lambda: sliced_w2(X, torch.zeros(3, 1), generator=generator(0)), ["2 and 1"]),
        (lambda: sliced_w2(X, X, generator=generator(0), projections=0), ["at least 1", "0"]),
        (lambda: sliced_w2_floor(TARGET, 10, generator=generator(0), repeats=1), ["at least 2", "1"]),
        (lambda: mode_weight_tv_floor(TARGET, 10, generator=generator(0), repeats=0), ["at least 2", "0"]),
    ],
)
def test_refuses(call, parts):
    refuses(call, *parts)
