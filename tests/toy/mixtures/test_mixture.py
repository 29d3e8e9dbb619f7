"""Closed forms of Gaussian mixtures against quadrature and autograd, and under every symmetry they have."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.special import ndtr

from tests.support.strategies import (
    SCHEDULE,
    close,
    generator,
    kl_weights,
    mixtures,
    points,
    refuses,
    rewards,
    seeds,
    times,
)
from toy import GaussianMixture, QuadraticReward

LINE = GaussianMixture([0.5, 0.3, 0.2], [[-1.5], [0.4], [2.0]], [0.2, 0.05, 0.4])
HILL = QuadraticReward([0.7], [[0.9]], 0.3)
BOWL = QuadraticReward([-0.4], [[-0.6]])


@st.composite
def tilts(draw, convex=True):
    """Draw a mixture, a KL weight and two rewards whose tilts, also by their sum, exist."""
    base, alpha = draw(mixtures()), draw(kl_weights)
    room = 0.4 * alpha if convex else 0.0
    return base, draw(rewards(base.dim, room)), draw(rewards(base.dim, room)), alpha, draw(seeds)


def integral(function):
    """Integrate over the line; pieces between the modes, so that quad sees every one of them."""
    pieces = [-12.0, -3.0, -1.5, -0.5, 0.4, 1.0, 2.0, 4.0, 14.0]
    total = 0.0
    for low, high in pairwise(pieces):
        total += quad(function, low, high, epsabs=0, epsrel=1e-13, limit=200)[0]
    return total


def on_line(function):
    return lambda x: float(function(torch.tensor([[x]], dtype=torch.float64)))


def test_density_integrates_to_one():
    assert math.isclose(integral(on_line(lambda x: LINE.log_prob(x).exp())), 1, rel_tol=1e-12)


@pytest.mark.parametrize("reward", [QuadraticReward([1.0]), HILL, BOWL])
@pytest.mark.parametrize("alpha", [0.4, 1.0, 5.0])
def test_tilt_and_moments_by_quadrature(reward, alpha):
    log_z = math.log(integral(on_line(lambda x: (LINE.log_prob(x) + reward(x) / alpha).exp())))
    assert math.isclose(LINE.log_normalizer(reward, kl_weight=alpha), log_z, rel_tol=1e-11, abs_tol=1e-11)
    # The trapezoidal rule converges faster than any power on what is analytic and vanishes at the ends.
    x = torch.linspace(-16, 18, 20_001, dtype=torch.float64).unsqueeze(-1)
    density = (LINE.log_prob(x) + reward(x) / alpha - log_z).exp()
    tilt = LINE.tilt(reward, kl_weight=alpha)
    close(tilt.log_prob(x).exp(), density, 1e-11)
    p = density * float(x[1] - x[0])
    close(tilt.mean, p @ x, 1e-10, scale=1)
    close(tilt.covariance, (p @ (x - tilt.mean).square()).unsqueeze(0), 1e-10)
    expected = float(p @ reward(x))
    assert math.isclose(tilt.mean_reward(reward), expected, rel_tol=1e-10, abs_tol=1e-11)
    assert math.isclose(tilt.reward_variance(reward), float(p @ (reward(x) - expected).square()), rel_tol=1e-10)
    kl = float(p @ (reward(x) / alpha - log_z))
    assert math.isclose(LINE.tilt_kl(reward, kl_weight=alpha), kl, rel_tol=1e-9, abs_tol=1e-12)


def test_two_dimensions_by_quadrature():
    base = GaussianMixture(
        [0.6, 0.4], [[-1.0, 0.5], [1.2, -0.3]], [[[0.5, 0.2], [0.2, 0.3]], [[0.2, -0.1], [-0.1, 0.6]]]
    )
    reward, other = QuadraticReward([0.5, -1.0], [[0.4, 0.3], [0.3, -0.2]]), QuadraticReward([1.0, 0.2], torch.eye(2))
    axis = torch.linspace(-9, 9, 721, dtype=torch.float64)
    x = torch.cartesian_prod(axis, axis)
    cell = float(axis[1] - axis[0]) ** 2
    density = (base.log_prob(x) + reward(x) / 0.8).exp() * cell
    tilt = base.tilt(reward, kl_weight=0.8)
    assert math.isclose(base.log_normalizer(reward, kl_weight=0.8), float(density.sum().log()), rel_tol=1e-11)
    p = density / density.sum()
    close(tilt.mean, p @ x, 1e-11)
    centred = x - tilt.mean
    close(tilt.covariance, (centred.T * p) @ centred, 1e-11)
    one, two = float(p @ reward(x)), float(p @ other(x))
    covariance = float(p @ ((reward(x) - one) * (other(x) - two)))
    assert math.isclose(tilt.mean_reward(other), two, rel_tol=1e-11)
    assert math.isclose(tilt.reward_covariance(reward, other), covariance, rel_tol=1e-10)


@given(tilts())
def test_tilts_compose(drawn):
    base, first, second, alpha, _ = drawn
    twice = base.tilt(first, kl_weight=alpha).tilt(second, kl_weight=alpha)
    once = base.tilt(first + second, kl_weight=alpha)
    close(twice.weights, once.weights, 1e-9, scale=1)
    close(twice.means, once.means, 1e-10)
    close(twice.covariances, once.covariances, 1e-10)
    parts = base.log_normalizer(first, kl_weight=alpha)
    parts += base.tilt(first, kl_weight=alpha).log_normalizer(second, kl_weight=alpha)
    whole = base.log_normalizer(first + second, kl_weight=alpha)
    assert math.isclose(parts, whole, rel_tol=1e-10, abs_tol=1e-10)


@given(tilts())
def test_tilt_is_base_times_exponential(drawn):
    base, reward, _, alpha, seed = drawn
    tilt, log_z = base.tilt(reward, kl_weight=alpha), base.log_normalizer(reward, kl_weight=alpha)
    x = base.sample(6, generator=generator(seed))
    close(tilt.log_prob(x), base.log_prob(x) + reward(x) / alpha - log_z, 1e-10, scale=1)
    # A control: another KL weight gives another law.
    other = base.tilt(reward, kl_weight=1.05 * alpha)
    assert float((other.log_prob(x) - tilt.log_prob(x)).abs().max()) > 1e-6


@given(tilts())
def test_undoing_a_tilt_gives_the_base(drawn):
    base, reward, _, alpha, _ = drawn
    back = base.tilt(reward, kl_weight=alpha).tilt(-reward, kl_weight=alpha)
    close(back.weights, base.weights, 1e-8)
    close(back.means, base.means, 1e-9)
    close(back.covariances, base.covariances, 1e-9)


@given(mixtures(), seeds)
def test_permuting_components_changes_nothing(base, seed):
    order = torch.randperm(base.components, generator=generator(seed))
    same = GaussianMixture(base.weights[order], base.means[order], base.covariances[order])
    x = base.sample(5, generator=generator(seed))
    reward = QuadraticReward(torch.ones(base.dim, dtype=torch.float64), torch.eye(base.dim))
    close(same.log_prob(x), base.log_prob(x), scale=1)
    close(same.score(x), base.score(x), scale=1)
    close(same.covariance, base.covariance)
    close(same.tilt(reward, kl_weight=0.5).score(x), base.tilt(reward, kl_weight=0.5).score(x), scale=1)


@given(mixtures(), times, seeds)
def test_score_is_the_gradient(base, t, seed):
    x = points(base, t, 4, seed).requires_grad_()
    law = base.noised(SCHEDULE, t)
    (expected,) = torch.autograd.grad(law.log_prob(x).sum(), x)
    close(law.score(x).detach(), expected)


@given(mixtures(), times)
def test_noised_moments(base, t):
    law = base.noised(SCHEDULE, t)
    a, s = float(SCHEDULE.alpha(t)), float(SCHEDULE.sigma(t))
    close(law.mean, a * base.mean, scale=1e-9)
    close(law.covariance, a * a * base.covariance + s * s * torch.eye(base.dim, dtype=torch.float64), 1e-12)
    assert law.components == base.components and law.isotropic == base.isotropic


def test_noised_density_is_the_convolution():
    t, x = 0.2, 0.7
    a, s = float(SCHEDULE.alpha(t)), float(SCHEDULE.sigma(t))

    def joint(y):
        return (
            LINE.log_prob(y).exp() * math.exp(-((x - a * float(y)) ** 2) / (2 * s * s)) / (s * math.sqrt(2 * math.pi))
        )

    value = float(LINE.noised(SCHEDULE, t).log_prob(torch.tensor([x], dtype=torch.float64)).exp())
    assert math.isclose(value, integral(on_line(joint)), rel_tol=1e-11)
    close(LINE.noised(SCHEDULE, 0.0).covariances, LINE.covariances, 0.0)


@given(mixtures(), seeds)
def test_marginal(base, seed):
    axes = torch.randperm(base.dim, generator=generator(seed))[: max(1, base.dim // 2)].tolist()
    part = base.marginal(axes)
    close(part.mean, base.mean[axes])
    close(part.covariance, base.covariance[axes][:, axes])


def test_marginal_density_by_quadrature():
    cov = [[[0.5, 0.2], [0.2, 0.3]], [[0.2, -0.1], [-0.1, 0.6]]]
    base = GaussianMixture([0.6, 0.4], [[-1.0, 0.5], [1.2, -0.3]], cov)
    y = torch.linspace(-8, 8, 2001, dtype=torch.float64)
    x = torch.stack([torch.full_like(y, 0.3), y], -1)
    value = float(base.log_prob(x).exp().sum() * (y[1] - y[0]))
    assert math.isclose(
        float(base.marginal([0]).log_prob(torch.tensor([0.3], dtype=torch.float64)).exp()), value, rel_tol=1e-11
    )


@pytest.mark.rng_untouched
def test_samples_have_the_moments_and_a_wrong_law_is_noticed():
    base = GaussianMixture([0.7, 0.3], [[0.0, 1.0], [2.0, -1.0]], [[[0.5, 0.3], [0.3, 0.4]], [[0.2, 0.0], [0.0, 0.3]]])
    n = 40_000
    x = base.sample(n, generator=generator(0))
    assert x.shape == (n, 2) and x.dtype == torch.float64

    def z_scores(law):
        first = (x.mean(0) - law.mean) / (law.covariance.diagonal() / n).sqrt()
        products = (x - law.mean).unsqueeze(-1) * (x - law.mean).unsqueeze(-2)
        second = (products.mean(0) - law.covariance) / (products.std(0) / math.sqrt(n))
        return torch.cat([first, second.flatten()]).abs()

    assert float(z_scores(base).max()) < 5
    wider = GaussianMixture([0.7, 0.3], base.means, base.covariances * 1.2)
    lighter = GaussianMixture([0.67, 0.33], base.means, base.covariances)
    assert all(float(z_scores(wrong).max()) > 5 for wrong in (wider, lighter))
    labels = base.sample_labels(n, generator=generator(1))
    assert abs(float((labels == 0).double().mean()) - 0.7) < 5 * math.sqrt(0.21 / n)
    assert torch.equal(base.sample(9, generator=generator(3)), base.sample(9, generator=generator(3)))
    assert base.sample(9, generator=generator(3), dtype=torch.float32).dtype == torch.float32


def test_samples_follow_the_distribution_function():
    x = LINE.sample(20_000, generator=generator(4))[:, 0].sort().values
    levels = (np.arange(20_000) + 0.5) / 20_000

    def worst(weights):
        cdf = sum(
            w * ndtr((x.numpy() - m) / math.sqrt(v))
            for w, m, v in zip(weights, LINE.means[:, 0].tolist(), [0.2, 0.05, 0.4], strict=True)
        )
        return float(np.abs(cdf - levels).max())

    assert worst([0.5, 0.3, 0.2]) < 1.95 / math.sqrt(20_000)  # Kolmogorov, one in a thousand
    assert worst([0.3, 0.5, 0.2]) > 1.95 / math.sqrt(20_000)


def test_far_from_the_origin_nothing_is_lost():
    shift = 1e6
    far = GaussianMixture(LINE.weights, LINE.means + shift, LINE.covariances)
    slope = QuadraticReward([0.7], [[0.9]])
    moved = QuadraticReward([0.7 + 0.9 * shift], [[0.9]], -0.7 * shift - 0.9 * shift**2 / 2)
    close(far.tilt(moved, kl_weight=0.5).means - shift, LINE.tilt(slope, kl_weight=0.5).means, 1e-8)
    x = torch.tensor([[0.3], [2.0]], dtype=torch.float64)
    close(far.score(x + shift), LINE.score(x), 1e-8)


def test_weights_that_underflow_keep_their_logarithms():
    base = GaussianMixture([0.5, 0.5], [[-40.0], [40.0]], [0.1, 0.1])
    there = base.tilt(QuadraticReward([20.0]), kl_weight=1.0)
    assert float(there.weights[0]) == 0 and math.isfinite(float(there.log_weights[0]))
    back = there.tilt(QuadraticReward([-20.0]), kl_weight=1.0)
    close(back.weights, base.weights, 1e-9)


def test_weights_are_normalised_and_covariances_kept_isotropic():
    base = GaussianMixture([0.5, 0.5 + 5e-7], [[0.0, 0.0], [1.0, 1.0]], [0.3, 0.2])
    assert math.isclose(float(base.weights.sum()), 1, abs_tol=1e-15)
    full = GaussianMixture([0.5, 0.5], base.means, base.covariances)
    assert base.isotropic and full.isotropic and repr(full) == "GaussianMixture(components=2, dim=2)"
    assert base.tilt(QuadraticReward([1.0, 0.0]), kl_weight=1.0).isotropic


EYE = [[1.0, 0.0], [0.0, 1.0]]
MIXTURE: Any = GaussianMixture
TWO: Any = GaussianMixture([0.5, 0.5], [[0.0, 0.0], [1.0, 1.0]], [1.0, 0.25])
FLAT = QuadraticReward([1.0, 0.0])
STEEP = QuadraticReward(quadratic=[[-3.0, 0.0], [0.0, 0.0]])


@pytest.mark.parametrize(
    ("call", "parts", "kind"),
    [
        (lambda: GaussianMixture([0.5], [[0.0], [1.0]], [1.0, 1.0]), ["(1,)", "(2, 1)"], ValueError),
        (lambda: GaussianMixture([0.5, 0.5], [0.0, 1.0], [1.0, 1.0]), ["(2,)"], ValueError),
        (lambda: GaussianMixture([], torch.zeros(0, 1), []), ["(0,)"], ValueError),
        (lambda: GaussianMixture([1.0], [[0.0]], [[1.0]]), ["(1, 1, 1)", "(1, 1)"], ValueError),
        (lambda: GaussianMixture([1.0], [[0.0, 0.0]], [[[1.0]]]), ["(1, 2, 2)", "(1, 1, 1)"], ValueError),
        (lambda: GaussianMixture([1.0, 0.0], [[0.0], [1.0]], [1.0, 1.0]), ["positive", "component 1"], ValueError),
        (lambda: GaussianMixture([1.5, -0.5], [[0.0], [1.0]], [1.0, 1.0]), ["-0.5", "component 1"], ValueError),
        (lambda: GaussianMixture([0.5, 0.6], [[0.0], [1.0]], [1.0, 1.0]), ["sum to 1", "1.1"], ValueError),
        (lambda: GaussianMixture([math.nan], [[0.0]], [1.0]), ["weights", "nan"], ValueError),
        (lambda: GaussianMixture([1.0], [[math.inf]], [1.0]), ["means", "inf"], ValueError),
        (lambda: GaussianMixture([1.0], [[0.0]], [math.nan]), ["covariances", "nan"], ValueError),
        (lambda: GaussianMixture([1.0], [[0.0]], [0.0]), ["positive", "component 0"], ValueError),
        (lambda: GaussianMixture([1.0], [[0.0, 0.0]], [[[1.0, 0.5], [0.0, 1.0]]]), ["symmetric", "0.5"], ValueError),
        (
            lambda: GaussianMixture([0.5, 0.5], [[0.0, 0.0], [1.0, 1.0]], [EYE, [[1.0, 2.0], [2.0, 1.0]]]),
            ["positive definite", "eigenvalue -1", "component 1"],
            ValueError,
        ),
        (
            lambda: GaussianMixture([1.0], [[0.0, 0.0]], [[[1.0, 1.0], [1.0, 1.0]]]),
            ["positive definite", "component 0"],
            ValueError,
        ),
        (lambda: MIXTURE(["a"], [[0.0]], [1.0]), ["weights", "numbers"], TypeError),
        (lambda: GaussianMixture([1.0], [[0.0], [1.0, 2.0]], [1.0]), ["means"], (TypeError, ValueError)),
        (lambda: TWO.tilt(FLAT, kl_weight=0.0), ["kl_weight", "above 0"], ValueError),
        (lambda: TWO.tilt(FLAT, kl_weight=-1.0), ["kl_weight", "-1"], ValueError),
        (lambda: TWO.tilt(FLAT, kl_weight=math.inf), ["kl_weight", "inf"], ValueError),
        (lambda: TWO.log_normalizer(FLAT, kl_weight="1"), ["kl_weight", "'1'"], ValueError),
        (lambda: TWO.tilt(STEEP, kl_weight=1.0), ["eigenvalue -2", "component 0", "kl_weight 1"], ValueError),
        (lambda: TWO.tilt(STEEP, kl_weight=3.0), ["eigenvalue 0", "component 0"], ValueError),
        (lambda: TWO.tilt(QuadraticReward([1.0]), kl_weight=1.0), ["2 dimensions", "1"], ValueError),
        (lambda: TWO.tilt(lambda x: x, kl_weight=1.0), ["QuadraticReward", "function"], TypeError),
        (lambda: TWO.log_prob(torch.zeros(3)), ["2 dimensions", "(3,)"], ValueError),
        (lambda: TWO.score(torch.full((1, 2), math.nan)), ["finite", "nan"], ValueError),
        (lambda: TWO.log_prob([0.0, 0.0]), ["list"], ValueError),
        (lambda: TWO.sample(0, generator=generator(0)), ["at least 1", "0"], ValueError),
        (lambda: TWO.sample(2.5, generator=generator(0)), ["2.5"], ValueError),
        (lambda: TWO.sample(2, generator=None), ["Generator"], TypeError),
        (lambda: TWO.noised(SCHEDULE, 2.0), ["times", "2"], ValueError),
        (lambda: TWO.marginal([0, 0]), ["distinct"], ValueError),
        (lambda: TWO.marginal([2]), ["0 to 1"], ValueError),
    ],
)
def test_refuses(call, parts, kind):
    refuses(call, *parts, kind=kind)


def test_a_tilt_exists_up_to_the_limit():
    assert TWO.tilt(STEEP, kl_weight=3.0001).weights.isfinite().all()
