"""Problems drawn anew: a base mixture, rewards that pull apart, a preference and a KL weight."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from toy.mixture import GaussianMixture
from toy.rewards import QuadraticReward, combine


@dataclass(frozen=True)
class Drawn:
    """A blending problem with its closed forms.

    Attributes:
        base: the pre-trained law.
        rewards: r_i, unit variance under the base.
        weights: w, one a reward, summing to one.
        kl_weight: alpha of the members.
        strength: lambda.
    """

    base: GaussianMixture
    rewards: list[QuadraticReward]
    weights: tuple[float, ...]
    kl_weight: float
    strength: float = 1.0

    @cached_property
    def stack(self) -> list[GaussianMixture]:
        """The base, then the member tuned for each reward."""
        return [self.base, *(self.base.tilt(reward, kl_weight=self.kl_weight) for reward in self.rewards)]

    @property
    def coefficients(self) -> Tensor:
        """Coefficients over base and members, float64 (1 + m,), summing to one."""
        members = [self.strength * weight for weight in self.weights]
        return torch.tensor([1 - sum(members), *members], dtype=torch.float64)

    @property
    def reward(self) -> QuadraticReward:
        """The target's reward, lambda r(w)."""
        return combine(self.rewards, self.weights) * self.strength

    @cached_property
    def target(self) -> GaussianMixture:
        """The base tilted by lambda r(w) / alpha."""
        return self.base.tilt(self.reward, kl_weight=self.kl_weight)

    @property
    def log_normalizer(self) -> float:
        """log E[W] in closed form: log Z of the target's reward less the sum of c_i log Z_i."""
        parts = [self.base.log_normalizer(reward, kl_weight=self.kl_weight) for reward in self.rewards]
        total = self.base.log_normalizer(self.reward, kl_weight=self.kl_weight)
        return total - sum(float(c) * part for c, part in zip(self.coefficients[1:], parts, strict=True))


def uniform(generator: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    """Return float64 numbers drawn uniformly from [low, high)."""
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)


def draw_line(
    generator: torch.Generator, kl_weight: tuple[float, float] = (0.25, 1.0), strength: float = 1.0
) -> Drawn:
    """Draw a problem on the line: two or three modes, one reward pulling right and one left.

    Args:
        generator: draws it.
        kl_weight: the range that alpha is drawn from.
        strength: lambda.
    """
    count = int(torch.randint(2, 4, (), generator=generator))
    weights = uniform(generator, 0.5, 1.5, count)
    means = torch.linspace(-1.6, 1.6, count, dtype=torch.float64) + uniform(generator, -0.3, 0.3, count)
    base = GaussianMixture(weights / weights.sum(), means[:, None], uniform(generator, 0.1, 0.3, count))
    slopes, bends = uniform(generator, 0.5, 1.5, 2).tolist(), uniform(generator, 0.0, 1.0, 2).tolist()
    rewards = [
        QuadraticReward(linear=[sign * slope], quadratic=[[bend]]).normalized(base)
        for sign, slope, bend in zip((1, -1), slopes, bends, strict=True)
    ]
    share = float(uniform(generator, 0.3, 0.7))
    alpha = float(uniform(generator, *kl_weight))
    return Drawn(base, rewards, (share, 1 - share), alpha, strength)


def draw_space(generator: torch.Generator, dim: int, strength: float) -> Drawn:
    """Draw a problem in ``dim`` dimensions: full covariances, two linear and one quadratic reward.

    Args:
        generator: draws it.
        dim: dimension d.
        strength: lambda; above 1 the base's coefficient is negative.
    """
    count = int(torch.randint(2, 5, (), generator=generator))
    weights = uniform(generator, 0.5, 1.5, count)
    roots = 0.3 * torch.randn(count, dim, dim, generator=generator, dtype=torch.float64)
    covariances = roots @ roots.mT + 0.15 * torch.eye(dim, dtype=torch.float64)
    means = uniform(generator, -1.5, 1.5, count, dim)
    base = GaussianMixture(weights / weights.sum(), means, covariances)
    bend = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    directions = torch.randn(3, dim, generator=generator, dtype=torch.float64)
    raw = [
        QuadraticReward(linear=directions[0]),
        QuadraticReward(linear=directions[1]),
        QuadraticReward(linear=directions[2], quadratic=bend @ bend.T / dim),
    ]
    share = uniform(generator, 0.5, 1.5, 3)
    preference = tuple((share / share.sum()).tolist())
    return Drawn(base, [r.normalized(base) for r in raw], preference, float(uniform(generator, 0.5, 1.5)), strength)
