"""Three bounds on the Jensen gap Delta = u - ubar, computable on mixtures and never violated.

Given x_t = x let x_0 have mean m and covariance C; let gain = a/s^2, v = exp(r/alpha) / E[exp(r/alpha)] and
h = v - r/alpha. Then Delta = gain Cov(h, x_0), and with J = gain C:

* B1 (Cauchy-Schwarz): |Delta| <= gain sd(h) sqrt(lambda_max(C)).
* B2 (the paper's L1 L2 + L3): write x_0 - m = C psi + R with psi = -grad log p(x_0 | x). Since E[psi h] = E[grad h],
  the first part gives J Cov(v, grad r) / alpha, and Cov(R) = C (I_F - C^{-1}) C with the Fisher information I_F, so
  |Delta| <= |J| sqrt(tr Cov(grad r)) / alpha * sd(v)  +  sd(h) |J (I_F - C^{-1}) J|^{1/2}.
  The second part vanishes for a Gaussian posterior, the first for a linear reward.
* B3 (thermodynamic): Delta = gain int_0^1 (1 - th) kappa_3,th(r/alpha, r/alpha, x_0) dth, cumulants under the
  posterior tilted by th r/alpha; the norm taken inside the integral bounds it.

E[v^2] is the closed form exp(log Z(alpha/2) - 2 log Z(alpha)) of the posterior; where the tilt at alpha/2 does not
exist, B1 and B2 are infinite. I_F is by quadrature in one dimension; in more it is replaced by the larger
sum_k w_k S_k^{-1} (the Fisher information is convex), so B2 stays a bound. What rounding may take is added back.

These bound Delta of one reward. The blend's error is Delta^{r(w)} - sum_i w_i Delta^{r_i}: with conflicting rewards
it can be tens of times Delta^{r(w)}, so bound each term.

Source: Diffusion Blend 2505.18547, Lemma 1 (B2); B1 and B3 are elementary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sdeblend.schedule import NoiseSchedule, Time
from toy.mixtures.mixture import GaussianMixture
from toy.mixtures.posterior import Posterior
from toy.mixtures.rewards import QuadraticReward
from toy.mixtures.tilting import check_kl_weight

_ROUNDING = 64 * torch.finfo(torch.float64).eps
_QUADRATURE = 1e-6
# A norm has kinks where a cumulant changes sign, so its integral converges slowly; the error is added to the bound.
_NORM_QUADRATURE = 1e-3


@dataclass(frozen=True)
class JensenBounds:
    """Bounds on |Delta| at each point, float64 (B,).

    Attributes:
        cauchy_schwarz: B1.
        shift: B2, the paper's.
        thermodynamic: B3.
    """

    cauchy_schwarz: Tensor
    shift: Tensor
    thermodynamic: Tensor

    @property
    def best(self) -> Tensor:
        """The smallest of the three, (B,)."""
        return torch.minimum(torch.minimum(self.cauchy_schwarz, self.shift), self.thermodynamic)


def jensen_bounds(
    base: GaussianMixture, reward: QuadraticReward, kl_weight: float, schedule: NoiseSchedule, x: Tensor, t: Time
) -> JensenBounds:
    """Bound the norm of the Jensen gap.

    Args:
        base: p_0, the pre-trained law.
        reward: r.
        kl_weight: alpha > 0.
        schedule: the forward process.
        x: (B, d).
        t: time above 0.

    Returns:
        the three bounds; infinite where one does not exist.

    Raises:
        ValueError: the tilt at kl_weight does not exist, or t is 0.
    """
    posterior, alpha = base.posterior(x, schedule, t), check_kl_weight(kl_weight)
    variance_v, variance_h = _variances(posterior, reward, alpha)
    spread = torch.linalg.eigvalsh(posterior.covariance)[:, -1].clamp_min(0) * (1 + _ROUNDING)
    first = posterior.gain * (variance_h * spread).sqrt()
    gradient_spread = _trace_of_gradient_covariance(posterior, reward)
    # A linear reward has no gradient spread, and zero times an infinite second moment is zero here.
    product = torch.where(gradient_spread > 0, gradient_spread * variance_v, 0.0)
    parallel = posterior.gain * spread * product.sqrt() / alpha
    second = parallel + posterior.gain * (variance_h * _deficit(posterior)).sqrt()
    slack = _slack(posterior, reward, alpha)
    third = _thermodynamic(posterior, reward, alpha, slack, norm=True).squeeze(-1)
    return JensenBounds(first + slack, second + slack, third + slack)


def thermodynamic_gap(
    base: GaussianMixture, reward: QuadraticReward, kl_weight: float, schedule: NoiseSchedule, x: Tensor, t: Time
) -> Tensor:
    """Return Delta by the integral of B3 without the norm, float64 (B, d): another way to the Jensen gap.

    Arguments as ``jensen_bounds``.
    """
    posterior, alpha = base.posterior(x, schedule, t), check_kl_weight(kl_weight)
    return _thermodynamic(posterior, reward, alpha, _slack(posterior, reward, alpha), norm=False)


def _slack(posterior: Posterior, reward: QuadraticReward, alpha: float) -> Tensor:
    """Return how far rounding may move the Jensen gap, (B,): where it vanishes, only rounding is left of it."""
    tilted = posterior.tilt(reward, kl_weight=alpha)
    log_ratio = tilted.log_weights - posterior.log_weights
    both = posterior.weights + tilted.weights
    moves = (tilted.means - posterior.means).norm(dim=-1) + (posterior.means - posterior.mean.unsqueeze(1)).norm(dim=-1)
    size = 1 + posterior.mean_reward(reward).abs() / alpha + (both * log_ratio.abs()).sum(1)
    changed = (tilted.weights - posterior.weights).abs().sum(1) * posterior.means.norm(dim=-1).amax(1)
    return _ROUNDING * posterior.gain * (size * (both * moves).sum(1) + changed)


def _variances(posterior: Posterior, reward: QuadraticReward, alpha: float) -> tuple[Tensor, Tensor]:
    """Return Var(v) and Var(v - r/alpha), (B,), rounded up."""
    log_z = posterior.log_normalizer(reward, kl_weight=alpha)
    variance_r = posterior.reward_variance(reward) / alpha**2
    covariance = (posterior.tilt(reward, kl_weight=alpha).mean_reward(reward) - posterior.mean_reward(reward)) / alpha
    try:
        log_second = posterior.log_normalizer(reward, kl_weight=alpha / 2) - 2 * log_z
    except ValueError:
        infinite = torch.full_like(log_z, torch.inf)
        return infinite, infinite
    variance_v = torch.expm1(log_second).clamp_min(0)
    # Each term carries rounding of its own size, and of the rewards it was made from.
    size = posterior.mean_reward(reward).abs() / alpha + log_z.abs() + 1
    slack = _ROUNDING * (1 + variance_v + variance_r + covariance.abs()) * size
    return variance_v + slack, (variance_v - 2 * covariance + variance_r).clamp_min(0) + slack


def _trace_of_gradient_covariance(posterior: Posterior, reward: QuadraticReward) -> Tensor:
    """Return tr Cov(b - Q x_0), (B,)."""
    q = reward.quadratic
    return torch.einsum("ij,bjk,ik->b", q, posterior.covariance, q).clamp_min(0) * (1 + _ROUNDING)


def _deficit(posterior: Posterior) -> Tensor:
    """Return lambda_max(C I_F C - C), (B,), rounded up."""
    covariance = posterior.covariance
    information = torch.einsum("bk,kij->bij", posterior.weights, torch.linalg.inv(posterior.covariances))
    scales = posterior.covariances[:, 0, 0].sqrt()
    # Components narrower than a twentieth of another would fall between the nodes; the larger value serves them.
    if posterior.dim == 1 and float(scales.max()) < 20 * float(scales.min()):
        information = torch.minimum(_fisher_information_1d(posterior)[:, None, None], information)
    product = covariance @ information @ covariance
    largest = torch.linalg.eigvalsh((product + product.mT) / 2 - covariance)[:, -1]
    return largest.clamp_min(0) + _ROUNDING * torch.linalg.matrix_norm(product, 2)


def _fisher_information_1d(posterior: Posterior, nodes: int = 4001, width: float = 12.0) -> Tensor:
    """Return E[psi^2] of one-dimensional posteriors by the trapezoidal rule, (B,).

    The rule is applied about each component on its own scale, weighted by the component's density, where it
    converges faster than any power: the integrand is analytic and decays like a Gaussian.
    """
    scales = posterior.covariances[:, 0, 0].sqrt()
    y = torch.linspace(-width, width, nodes, dtype=torch.float64)
    density = torch.exp(-y.square() / 2) / math.sqrt(2 * math.pi) * (y[1] - y[0])
    total = torch.zeros(len(posterior.means), dtype=torch.float64)
    for k in range(len(scales)):
        x = posterior.means[:, k, None, :] + scales[k] * y[None, :, None]
        z = (x - posterior.means.transpose(1, 2)) / scales
        shares = (posterior.log_weights.unsqueeze(1) - scales.log() - z.square() / 2).softmax(-1)
        psi = (shares * z / scales).sum(-1)
        total = total + posterior.weights[:, k] * (psi.square() @ density)
    return total * (1 + 1e-11)


def _thermodynamic(posterior: Posterior, reward: QuadraticReward, alpha: float, slack: Tensor, *, norm: bool) -> Tensor:
    """Integrate gain (1 - th) kappa_3,th / alpha^2, (B, d), or its norm (B, 1), by refined Gauss-Legendre panels."""

    def integral(panels: int) -> Tensor:
        total = torch.zeros(len(posterior.means), 1 if norm else posterior.dim, dtype=torch.float64)
        nodes, weights = np.polynomial.legendre.leggauss(8)
        for panel in range(panels):
            for node, weight in zip(nodes, weights, strict=True):
                theta = (panel + (node + 1) / 2) / panels
                value = posterior.tilt(reward, kl_weight=alpha / theta).third_cumulant(reward)
                value = value.norm(dim=-1, keepdim=True) if norm else value
                total = total + (weight / 2 / panels * (1 - theta)) * value
        return posterior.gain / alpha**2 * total

    tolerance = _NORM_QUADRATURE if norm else _QUADRATURE
    # Coarser panels can agree with one another and both miss a swap of modes.
    panels, old = 16, integral(8)
    while True:
        new = integral(panels)
        error = (new - old).abs()
        # Modes that swap their weights within a short stretch of theta need short panels there.
        if panels >= 64 or bool((error <= tolerance * new.norm(dim=-1, keepdim=True) + slack.unsqueeze(-1)).all()):
            return new * (1 + _ROUNDING) + error if norm else new
        panels, old = 2 * panels, new
