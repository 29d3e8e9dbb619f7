"""Control, its Jensen approximation and the gap between them, in closed form.

With expectations over x_0 given x_t = x under the pre-trained law, a = alpha(t), s = sigma(t), alpha the KL weight:

    u(x)    = grad log E[exp(r/alpha)] = (a/s^2) (m_tilted - m)          score of the tilt minus score of the base
    ubar(x) = grad E[r/alpha]          = (a/s^2) Cov(r/alpha, x_0)       linear in r
    Delta   = u - ubar                                                   the Jensen gap.

A blend with weights w replaces u of r(w) by sum_i w_i u_i; since ubar is linear, the error of the blended score is
exactly Delta^{r(w)} - sum_i w_i Delta^{r_i} (the exact score minus the blend's).

Source: Diffusion Blend 2505.18547, Proposition 1 (u), Lemma 1 (Delta), Lemma 2 (the error).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from sdeblend.schedule import NoiseSchedule, Time
from toy.mixtures.mixture import GaussianMixture
from toy.mixtures.rewards import QuadraticReward, combine, weighted_pairs
from toy.mixtures.tilting import check_kl_weight


def log_mean_exp_reward(
    base: GaussianMixture, reward: QuadraticReward, kl_weight: float, schedule: NoiseSchedule, x: Tensor, t: Time
) -> Tensor:
    """Return log E[exp(reward(x_0) / kl_weight) | x_t = x].

    It equals log Z + log p_t^tilt(x) - log p_t(x), a sharper test of a tilt than its gradient.

    Args:
        base: p_0, the pre-trained law.
        reward: r.
        kl_weight: alpha > 0.
        schedule: the forward process.
        x: (B, d).
        t: time above 0.

    Returns:
        float64 (B,).
    """
    return base.posterior(x, schedule, t).log_normalizer(reward, kl_weight=kl_weight)


def control(
    base: GaussianMixture, reward: QuadraticReward, kl_weight: float, schedule: NoiseSchedule, x: Tensor, t: Time
) -> Tensor:
    """Return u = grad_x log E[exp(reward(x_0) / kl_weight) | x_t = x], float64 (B, d); arguments as above."""
    posterior = base.posterior(x, schedule, t)
    return posterior.gain * posterior.tilt_shift(reward, kl_weight=kl_weight)


def jensen_control(
    base: GaussianMixture, reward: QuadraticReward, kl_weight: float, schedule: NoiseSchedule, x: Tensor, t: Time
) -> Tensor:
    """Return ubar = grad_x E[reward(x_0) / kl_weight | x_t = x], float64 (B, d); arguments as above."""
    posterior, alpha = base.posterior(x, schedule, t), check_kl_weight(kl_weight)
    return posterior.gain / alpha * posterior.covariance_with_state(reward)


def jensen_gap(
    base: GaussianMixture, reward: QuadraticReward, kl_weight: float, schedule: NoiseSchedule, x: Tensor, t: Time
) -> Tensor:
    """Return Delta = u - ubar, float64 (B, d); arguments as above."""
    posterior, alpha = base.posterior(x, schedule, t), check_kl_weight(kl_weight)
    shift = posterior.tilt_shift(reward, kl_weight=alpha)
    return posterior.gain * (shift - posterior.covariance_with_state(reward) / alpha)


def blend_gap(
    base: GaussianMixture,
    rewards: Mapping[str, QuadraticReward] | Sequence[QuadraticReward],
    weights: Mapping[str, float] | Sequence[float],
    kl_weight: float,
    schedule: NoiseSchedule,
    x: Tensor,
    t: Time,
) -> Tensor:
    """Return what Lemma 2 says the exact score has over the blend, Delta^{r(w)} - sum_i w_i Delta^{r_i}.

    Args:
        base: p_0.
        rewards: r_i, by name or in order.
        weights: w_i (times the strength, if it is not 1), as for ``toy.combine``.
        kl_weight: alpha of the members.
        schedule: the forward process.
        x: (B, d).
        t: time above 0.

    Returns:
        float64 (B, d).
    """
    total = jensen_gap(base, combine(rewards, weights), kl_weight, schedule, x, t)
    for weight, reward in weighted_pairs(rewards, weights):
        if weight:
            total = total - weight * jensen_gap(base, reward, kl_weight, schedule, x, t)
    return total
