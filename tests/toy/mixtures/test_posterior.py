"""Posterior, control and Jensen gap against quadrature, autograd and the identities they must satisfy."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdeblend import SCHEDULES
from tests.support.strategies import (
    SCHEDULE,
    close,
    generator,
    kl_weights,
    mixtures,
    points,
    preferences,
    problems,
    refuses,
    rewards,
    seeds,
    times,
)
from toy import (
    GaussianMixture,
    QuadraticReward,
    blend_gap,
    control,
    jensen_control,
    jensen_gap,
    log_mean_exp_reward,
)

LINE = GaussianMixture([0.5, 0.3, 0.2], [[-1.5], [0.4], [2.0]], [0.2, 0.05, 0.4])
HILL = QuadraticReward([0.7], [[0.9]], 0.3)


@st.composite
def cases(draw):
    """Draw a base, a reward with a tilt, a KL weight, a time and points x_t."""
    base, alpha, t = draw(mixtures()), draw(kl_weights), draw(times)
    return base, draw(rewards(base.dim, 0.4 * alpha)), alpha, t, points(base, t, 4, draw(seeds))


def gradient(function, x):
    x = x.clone().requires_grad_()
    (value,) = torch.autograd.grad(function(x).sum(), x)
    return value


@pytest.mark.parametrize("t", [1e-3, 0.1, 0.5, 1.0])
def test_posterior_by_quadrature(t):
    a, s = float(SCHEDULE.alpha(t)), float(SCHEDULE.sigma(t))
    x = torch.tensor([[-1.0], [0.3], [1.7]], dtype=torch.float64)
    posterior = LINE.posterior(x, SCHEDULE, t)
    # The trapezoidal rule about where the posterior lies; it converges faster than any power.
    width, middle = (12 * s / a, x) if t < 0.2 else (9.0, 0 * x)
    y = middle + torch.linspace(-width, width, 8001, dtype=torch.float64)
    log_p = LINE.log_prob(y.unsqueeze(-1)) - (x - a * y).square() / (2 * s * s)
    p = log_p.softmax(1)
    mean = (p * y).sum(1)
    close(posterior.mean[:, 0], mean, 1e-10)
    centred = y - mean.unsqueeze(1)
    close(posterior.covariance[:, 0, 0], (p * centred.square()).sum(1), 1e-9)
    r = HILL(y.unsqueeze(-1))
    rbar = (p * r).sum(1)
    close(posterior.mean_reward(HILL), rbar, 1e-10)
    close(posterior.reward_variance(HILL), (p * (r - rbar.unsqueeze(1)).square()).sum(1), 1e-9)
    close(posterior.covariance_with_state(HILL)[:, 0], (p * r * centred).sum(1), 1e-9)
    third = (p * (r - rbar.unsqueeze(1)).square() * centred).sum(1)
    close(posterior.third_cumulant(HILL)[:, 0], third, 1e-8, scale=1e-6)
    log_mean = (log_p + r / 0.4).logsumexp(1) - log_p.logsumexp(1)
    close(posterior.log_normalizer(HILL, kl_weight=0.4), log_mean, 1e-10)


@given(cases())
def test_scalar_identity(case):
    base, reward, alpha, t, x = case
    tilt = base.tilt(reward, kl_weight=alpha)
    log_z = base.log_normalizer(reward, kl_weight=alpha)
    densities = tilt.noised(SCHEDULE, t).log_prob(x) - base.noised(SCHEDULE, t).log_prob(x)
    # Both sides are differences of log densities and rewards: these set the scale of rounding.
    scale = 1 + abs(log_z) + float(base.noised(SCHEDULE, t).log_prob(x).abs().max())
    close(log_mean_exp_reward(base, reward, alpha, SCHEDULE, x, t), log_z + densities, 1e-10, scale)


@given(cases())
def test_control_is_the_difference_of_scores(case):
    base, reward, alpha, t, x = case
    before = base.noised(SCHEDULE, t).score(x)
    after = base.tilt(reward, kl_weight=alpha).noised(SCHEDULE, t).score(x)
    close(control(base, reward, alpha, SCHEDULE, x, t), after - before, 1e-10, scale=float(before.abs().max()))


@given(cases())
def test_controls_are_gradients(case):
    base, reward, alpha, t, x = case
    u = gradient(lambda y: log_mean_exp_reward(base, reward, alpha, SCHEDULE, y, t), x)
    ubar = gradient(lambda y: base.posterior(y, SCHEDULE, t).mean_reward(reward) / alpha, x)
    scale = float(u.abs().max()) + float(ubar.abs().max()) + 1e-3
    close(control(base, reward, alpha, SCHEDULE, x, t), u, 1e-10, scale)
    close(jensen_control(base, reward, alpha, SCHEDULE, x, t), ubar, 1e-10, scale)
    close(jensen_gap(base, reward, alpha, SCHEDULE, x, t), u - ubar, 1e-10, scale)


@given(cases())
def test_cumulants_are_gradients(case):
    base, reward, _, t, x = case
    posterior = base.posterior(x, SCHEDULE, t)
    mean = gradient(lambda y: base.posterior(y, SCHEDULE, t).mean.sum(1), x)
    close(posterior.gain * posterior.covariance.sum(1), mean, 1e-9, scale=1)
    variance = gradient(lambda y: base.posterior(y, SCHEDULE, t).reward_variance(reward), x)
    size = 1 + float(posterior.reward_variance(reward).max())
    close(posterior.gain * posterior.third_cumulant(reward), variance, 1e-8, scale=size)


@given(cases())
def test_posterior_of_the_tilt_is_the_tilted_posterior(case):
    base, reward, alpha, t, x = case
    one = base.posterior(x, SCHEDULE, t).tilt(reward, kl_weight=alpha)
    other = base.tilt(reward, kl_weight=alpha).posterior(x, SCHEDULE, t)
    close(one.weights, other.weights, 1e-9, scale=1)
    close(one.means, other.means, 1e-9, scale=1)
    close(one.covariances, other.covariances, 1e-9)


@given(cases())
def test_posterior_mean_is_the_denoised_state(case):
    base, _, _, t, x = case
    a, s = float(SCHEDULE.alpha(t)), float(SCHEDULE.sigma(t))
    close(base.posterior(x, SCHEDULE, t).mean, (x + s * s * base.noised(SCHEDULE, t).score(x)) / a, 1e-9, scale=1 / a)


@given(problems(), st.data(), times, seeds)
def test_blend_gap_is_exact_score_less_blend(problem, data, t, seed):
    preference = data.draw(preferences(problem.names))
    c = preference.coefficients(problem.names)
    x = points(problem.base, t, 3, seed)
    exact = problem.target(preference).noised(SCHEDULE, t).score(x)
    laws = [problem.base, *problem.members()]
    scores = torch.stack([law.noised(SCHEDULE, t).score(x) for law in laws])
    error = exact - torch.tensordot(c, scores, dims=1)
    weights = c[1:].tolist()
    gap = blend_gap(problem.base, problem.rewards, weights, problem.kl_weight, SCHEDULE, x, t)
    close(gap, error, 1e-9, scale=float(scores.abs().max()))


def test_gap_vanishes_for_a_gaussian_with_a_linear_reward():
    base = GaussianMixture([1.0], [[0.5, -0.3]], [[[1.0, 0.4], [0.4, 0.6]]])
    x = torch.randn(20, 2, generator=generator(0), dtype=torch.float64)
    linear, curved = QuadraticReward([2.0, -1.0]), QuadraticReward([2.0, -1.0], [[0.5, 0.0], [0.0, 0.5]])
    assert float(jensen_gap(base, linear, 0.1, SCHEDULE, x, 0.3).abs().max()) < 1e-12
    assert float(jensen_gap(base, curved, 0.1, SCHEDULE, x, 0.3).abs().max()) > 0.1


def test_gap_shrinks_with_time_and_kl_weight_as_the_theory_says():
    x = torch.tensor([[0.0], [-1.0], [1.0]], dtype=torch.float64)

    def gap(alpha, t):
        return float(jensen_gap(LINE, HILL, alpha, SCHEDULE, x, t).norm())

    variance = [float(SCHEDULE.sigma(t).square()) for t in (1e-4 * 10, 1e-3 * 10)]
    assert math.isclose(gap(1.0, 1e-3) / gap(1.0, 1e-2), variance[0] / variance[1], rel_tol=0.3)
    assert math.isclose(gap(1e3, 0.3) / gap(1e4, 0.3), 100, rel_tol=0.02)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_every_schedule(name):
    schedule = SCHEDULES[name]()
    for t in (schedule.t_min, (schedule.t_min * schedule.t_max) ** 0.5, schedule.t_max):
        x = LINE.noised(schedule, t).sample(5, generator=generator(1))
        tilt, log_z = LINE.tilt(HILL, kl_weight=0.5), LINE.log_normalizer(HILL, kl_weight=0.5)
        expected = log_z + tilt.noised(schedule, t).log_prob(x) - LINE.noised(schedule, t).log_prob(x)
        scale = float(x.abs().max()) + 1
        close(log_mean_exp_reward(LINE, HILL, 0.5, schedule, x, t), expected, 1e-9, scale)


POINT = torch.zeros(1, 1)


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda: LINE.posterior(POINT, SCHEDULE, 0.0), ["above 0"]),
        (lambda: LINE.posterior(POINT, SCHEDULE, 3.0), ["times", "3"]),
        (lambda: LINE.posterior(torch.zeros(1), SCHEDULE, 0.5), ["(B, 1)", "(1,)"]),
        (lambda: LINE.posterior(torch.zeros(1, 2), SCHEDULE, 0.5), ["(1, 2)"]),
        (lambda: LINE.posterior(POINT + math.nan, SCHEDULE, 0.5), ["finite"]),
        (lambda: control(LINE, HILL, 0.0, SCHEDULE, POINT, 0.5), ["kl_weight"]),
        (lambda: jensen_control(LINE, HILL, -1.0, SCHEDULE, POINT, 0.5), ["kl_weight"]),
        (lambda: jensen_gap(LINE, QuadraticReward([1.0, 1.0]), 1.0, SCHEDULE, POINT, 0.5), ["1 dimensions", "2"]),
        (lambda: control(LINE, QuadraticReward([0.0], [[-9.0]]), 0.1, SCHEDULE, POINT, 1.0), ["component 0"]),
        (lambda: blend_gap(LINE, [HILL], [0.5, 0.5], 1.0, SCHEDULE, POINT, 0.5), ["1 rewards", "2"]),
    ],
)
def test_refuses(call, parts):
    refuses(call, *parts)
