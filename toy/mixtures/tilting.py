"""Tilting Gaussian components by exp(r / alpha), one component or a batch of mixtures at once.

For a component N(mu, C) with C = L L' and r(x) = c + b.x - x'Qx/2, write g = b - Q mu (the gradient at the
mean). Then N(mu, C) exp(r / alpha) is a constant times N(mu', C') with

    C' = (C^{-1} + Q/alpha)^{-1} = L (I + L'QL/alpha)^{-1} L',        mu' = mu + C' g / alpha,
    log constant = r(mu)/alpha + g'C'g / (2 alpha^2) - log det(I + L'QL/alpha) / 2.

Written around the mean and with I + L'QL/alpha, nothing cancels: for a linear reward C' is C exactly, far from the
origin no digit is lost, and as alpha grows the constant goes to 1 like it should. The target exists if
and only if C^{-1} + Q/alpha is positive definite for every component.

Source: completing the square; Diffusion Blend 2505.18547, Proposition 1, for the tilt.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from toy.mixtures.rewards import QuadraticReward, number


@dataclass(frozen=True)
class Tilted:
    """Components after a tilt.

    Attributes:
        log_factors: log of each component's constant, (..., K).
        shifts: mu' - mu, (..., K, d).
        roots: L' with C' = L' L'^T, (K, d, d).
    """

    log_factors: Tensor
    shifts: Tensor
    roots: Tensor


def check_kl_weight(kl_weight: float) -> float:
    """Return ``kl_weight`` as a float, or raise unless it is a finite number above 0."""
    return number(kl_weight, "kl_weight", above=0)


def check_reward(reward: QuadraticReward, dim: int) -> QuadraticReward:
    """Return ``reward``, or raise unless it is one in ``dim`` dimensions."""
    if not isinstance(reward, QuadraticReward):
        raise TypeError(f"closed forms need a QuadraticReward, got {type(reward).__name__}; sample for other rewards")
    if reward.dim != dim:
        raise ValueError(f"a mixture in {dim} dimensions needs a reward in as many, got {reward.dim}")
    return reward


def tilt_components(means: Tensor, roots: Tensor, reward: QuadraticReward, kl_weight: float) -> Tilted:
    """Tilt every component.

    Args:
        means: mu, float64 (..., K, d).
        roots: L with C = L L', (K, d, d), shared over the batch.
        reward: r.
        kl_weight: alpha > 0.

    Returns:
        factors, shifts and roots.

    Raises:
        ValueError: if a tilted component is not normalisable; names it and the eigenvalue.
    """
    alpha, dim = check_kl_weight(kl_weight), means.shape[-1]
    check_reward(reward, dim)
    gradient = reward.grad(means) / alpha
    if reward.is_linear:
        new, log_det = roots, roots.new_zeros(len(roots))
    else:
        inner = roots.mT @ (reward.quadratic / alpha) @ roots
        extra, basis = torch.linalg.eigh((inner + inner.mT) / 2)
        # eigh errs by about eps times the largest entry: below that, positive and negative look alike.
        floor = 1e-14 * dim * extra.abs().amax(-1).clamp_min(1)
        bad = (1 + extra[:, 0] <= floor).nonzero().flatten()
        if len(bad):
            raise ValueError(_not_normalisable(int(bad[0]), roots, reward, alpha))
        new = (roots @ basis) / (1 + extra).sqrt().unsqueeze(-2)
        log_det = extra.log1p().sum(-1)
    half = (gradient.unsqueeze(-2) @ new).squeeze(-2)
    shifts = (new @ half.unsqueeze(-1)).squeeze(-1)
    log_factors = reward(means) / alpha + half.square().sum(-1) / 2 - log_det / 2
    return Tilted(log_factors, shifts, new)


def _not_normalisable(k: int, roots: Tensor, reward: QuadraticReward, alpha: float) -> str:
    inverse = torch.linalg.inv(roots[k])
    smallest = float(torch.linalg.eigvalsh(inverse.T @ inverse + reward.quadratic / alpha)[0])
    return (
        f"the tilt exists only if covariance^-1 + quadratic/kl_weight is positive definite, got smallest eigenvalue "
        f"{smallest:g} for component {k} at kl_weight {alpha:g}; raise kl_weight or make the reward less convex"
    )
