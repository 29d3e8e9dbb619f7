"""The law of x_0 given x_t = x under a Gaussian mixture: again a mixture, one for each row of a batch.

With p_0 = sum_k pi_k N(mu_k, C_k), a = alpha(t), s = sigma(t), component k of x_0 | x_t = x has

    covariance S_k = (C_k^{-1} + a^2/s^2 I)^{-1} = U_k diag(lam s^2 / (a^2 lam + s^2)) U_k',
    mean       m_k = mu_k + a C_k (a^2 C_k + s^2 I)^{-1} (x - a mu_k),
    weight     proportional to pi_k N(x; a mu_k, a^2 C_k + s^2 I).

The S_k do not depend on x, so a batch shares them. Expectations, covariances and third cumulants of quadratic
rewards are closed forms; so is E[exp(r / alpha) | x_t = x], by tilting the posterior.

Source: Diffusion Blend 2505.18547, Proposition 1 and Lemma 1 (what the expectations are for).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from toy.mixtures.rewards import QuadraticReward
from toy.mixtures.tilting import Tilted, check_reward, tilt_components


@dataclass(frozen=True)
class Posterior:
    """A batch of mixtures that share their components' covariances.

    Attributes:
        log_weights: log of the weights, float64 (B, K).
        means: m, float64 (B, K, d).
        roots: L with S_k = L L', float64 (K, d, d).
        gain: a / s^2 of the time it belongs to; grad_x E[h(x_0) | x] = gain Cov(h, x_0 | x).
    """

    log_weights: Tensor
    means: Tensor
    roots: Tensor
    gain: float

    @property
    def dim(self) -> int:
        """Dimension d."""
        return self.means.shape[-1]

    @cached_property
    def weights(self) -> Tensor:
        """Weights of the components, (B, K)."""
        return self.log_weights.exp()

    @cached_property
    def covariances(self) -> Tensor:
        """Covariances S of the components, (K, d, d)."""
        return self.roots @ self.roots.mT

    @cached_property
    def mean(self) -> Tensor:
        """E[x_0 | x_t = x], (B, d)."""
        return self.expect(self.means)

    @cached_property
    def covariance(self) -> Tensor:
        """Cov[x_0 | x_t = x], (B, d, d)."""
        centred = self.means - self.mean.unsqueeze(1)
        between = torch.einsum("bk,bki,bkj->bij", self.weights, centred, centred)
        return between + torch.einsum("bk,kij->bij", self.weights, self.covariances)

    def expect(self, values: Tensor) -> Tensor:
        """Return sum_k w_k values_k: (B, K) -> (B,), (B, K, d) -> (B, d)."""
        weights = self.weights if values.ndim == 2 else self.weights.unsqueeze(-1)
        return (weights * values).sum(1)

    def mean_reward(self, reward: QuadraticReward) -> Tensor:
        """Return E[reward(x_0) | x_t = x], (B,)."""
        return self.expect(self._component_rewards(reward))

    def reward_covariance(self, first: QuadraticReward, second: QuadraticReward) -> Tensor:
        """Return Cov(first(x_0), second(x_0) | x_t = x), (B,)."""
        within = self._within(first, second)
        return self.expect(within + self._centred_rewards(first) * self._centred_rewards(second))

    def reward_variance(self, reward: QuadraticReward) -> Tensor:
        """Return Var(reward(x_0) | x_t = x), (B,), not negative."""
        return self.reward_covariance(reward, reward).clamp_min(0)

    def covariance_with_state(self, reward: QuadraticReward) -> Tensor:
        """Return Cov(reward(x_0), x_0 | x_t = x), (B, d)."""
        within = (self.covariances @ self._gradients(reward).unsqueeze(-1)).squeeze(-1)
        centred = self.means - self.mean.unsqueeze(1)
        return self.expect(within + self._centred_rewards(reward).unsqueeze(-1) * centred)

    def third_cumulant(self, reward: QuadraticReward) -> Tensor:
        """Return kappa_3(r, r, x_0) = Cov((r - E r)^2, x_0), all given x_t = x, (B, d).

        Under component k, with y = x_0 - m_k, r = r_k + g.y - (y'Qy - tr QS)/2 and D = r_k - E r:
        E[(r - E r)^2 y] = 2 D S g - 2 S Q S g.
        """
        gradients, distance = self._gradients(reward), self._centred_rewards(reward)
        slopes = (self.covariances @ gradients.unsqueeze(-1)).squeeze(-1)
        odd = 2 * distance.unsqueeze(-1) * slopes
        if not reward.is_linear:
            odd = odd - 2 * (self.covariances @ (slopes @ reward.quadratic).unsqueeze(-1)).squeeze(-1)
        squares = distance.square() + self._within(reward, reward)
        return self.expect(odd + squares.unsqueeze(-1) * (self.means - self.mean.unsqueeze(1)))

    def tilt(self, reward: QuadraticReward, *, kl_weight: float) -> Posterior:
        """Return the posterior times exp(reward / kl_weight), normalised row by row.

        That is the posterior of the tilted mixture at the same x and t.

        Raises:
            ValueError: kl_weight not above 0, or the tilt does not exist.
        """
        tilted = self._tilted(reward, kl_weight)
        log_weights = self.log_weights + tilted.log_factors
        log_weights = log_weights - log_weights.logsumexp(1, keepdim=True)
        return Posterior(log_weights, self.means + tilted.shifts, tilted.roots, self.gain)

    def log_normalizer(self, reward: QuadraticReward, *, kl_weight: float) -> Tensor:
        """Return log E[exp(reward(x_0) / kl_weight) | x_t = x], (B,)."""
        return (self.log_weights + self._tilted(reward, kl_weight).log_factors).logsumexp(1)

    def tilt_shift(self, reward: QuadraticReward, *, kl_weight: float) -> Tensor:
        """Return mean after the tilt minus mean before, (B, d), without taking their difference.

        Near t = 0 both means are x up to s^2; the shift keeps all its digits.
        """
        tilted = self._tilted(reward, kl_weight)
        log_ratio = tilted.log_factors - (self.log_weights + tilted.log_factors).logsumexp(1, keepdim=True)
        # The larger of the two weights carries the difference, so neither of them may overflow.
        gained = torch.where(
            log_ratio < 0,
            self.weights * log_ratio.expm1(),
            -(self.log_weights + log_ratio).exp() * (-log_ratio).expm1(),
        )
        moved = (self.log_weights + log_ratio).exp().unsqueeze(-1) * tilted.shifts
        return (moved + gained.unsqueeze(-1) * (self.means - self.mean.unsqueeze(1))).sum(1)

    def _tilted(self, reward: QuadraticReward, kl_weight: float) -> Tilted:
        return tilt_components(self.means, self.roots, reward, kl_weight)

    def _component_rewards(self, reward: QuadraticReward) -> Tensor:
        at_mean = check_reward(reward, self.dim)(self.means)
        return at_mean - (reward.quadratic * self.covariances).sum((-1, -2)) / 2

    def _centred_rewards(self, reward: QuadraticReward) -> Tensor:
        values = self._component_rewards(reward)
        return values - self.expect(values).unsqueeze(1)

    def _gradients(self, reward: QuadraticReward) -> Tensor:
        return check_reward(reward, self.dim).grad(self.means)

    def _within(self, first: QuadraticReward, second: QuadraticReward) -> Tensor:
        """Return the covariance of two rewards inside each component, (B, K)."""
        one, two = self._gradients(first), self._gradients(second)
        product = (first.quadratic @ self.covariances) * (second.quadratic @ self.covariances).mT
        return torch.einsum("bki,kij,bkj->bk", one, self.covariances, two) + product.sum((-1, -2)) / 2
