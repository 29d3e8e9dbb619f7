"""Problems drawn anew for the checks that sample: a base, rewards that pull apart, a preference and a KL weight."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sdeblend import Blend, NoiseSchedule, Preference
from toy import GaussianMixture, QuadraticReward
from toy.problems import Problem, random_problem


@dataclass(frozen=True)
class Drawn:
    """A problem and what is wanted of it."""

    problem: Problem
    preference: Preference

    @cached_property
    def laws(self) -> list[GaussianMixture]:
        """The base, then the member tuned for each reward."""
        return [self.problem.base, *self.problem.members()]

    @property
    def coefficients(self) -> Tensor:
        """Coefficients over base and members, float64 (1 + m,), summing to one."""
        return self.preference.coefficients(self.problem.names)

    @cached_property
    def target(self) -> GaussianMixture:
        """The law that is wanted."""
        return self.problem.target(self.preference)

    @property
    def log_normalizer(self) -> float:
        """log E[W] in closed form."""
        return self.problem.blend_log_normalizer(self.preference)

    def blend(self, schedule: NoiseSchedule) -> Blend:
        """Return the blend of the scores of base and members."""
        return Blend(self.problem.stack(schedule), self.preference)


def uniform(generator: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    """Return float64 numbers drawn uniformly from [low, high)."""
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)


def draw_line(generator: torch.Generator, kl_weight: tuple[float, float] = (0.25, 1.0), strength: float = 1.0) -> Drawn:
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
    problem = Problem(
        "drawn on the line", base, {"right": rewards[0], "left": rewards[1]}, float(uniform(generator, *kl_weight))
    )
    return Drawn(problem, Preference({"right": share, "left": 1 - share}, strength))


def draw_space(generator: torch.Generator, dim: int, strength: float) -> Drawn:
    """Draw a problem in ``dim`` dimensions: full covariances, three quadratic rewards.

    Args:
        generator: draws it.
        dim: dimension d.
        strength: lambda; above 1 the base's coefficient is negative.
    """
    problem = random_problem(generator, dim, 3, 3, kl_weight=float(uniform(generator, 0.5, 1.5)))
    share = uniform(generator, 0.5, 1.5, 3)
    return Drawn(problem, Preference(dict(zip(problem.names, (share / share.sum()).tolist(), strict=True)), strength))
