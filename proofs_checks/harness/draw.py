"""Problems drawn anew.

For the checks that sample: a base, rewards that pull apart, a preference and a KL weight. For those that integrate:
mixtures and rewards as numbers, with densities and rewards written out from them; nothing of ``toy`` is used but to
hand the same numbers to the side that is checked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from sdeblend import Blend, NoiseSchedule, Preference
from sdeblend.schedule import SCHEDULES
from toy import GaussianMixture, QuadraticReward
from toy.problems import Problem, random_problem

# Log signal-to-noise ratios of the states that are integrated over.
LOG_SNR = (-4.0, 4.5)


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


@dataclass(frozen=True)
class Numbers:
    """The reward c + b.x - x'Qx/2 as its numbers."""

    linear: Tensor
    quadratic: Tensor
    constant: float

    def __call__(self, x: Tensor) -> Tensor:
        """Return the reward at points (..., d)."""
        return self.constant + x @ self.linear - torch.einsum("...i,ij,...j->...", x, self.quadratic, x) / 2

    @property
    def closed(self) -> QuadraticReward:
        """The reward for the side that is checked."""
        return QuadraticReward(self.linear, self.quadratic, self.constant)


@dataclass(frozen=True)
class RawProblem:
    """A drawn problem: a mixture, rewards and a KL weight, as numbers.

    Attributes:
        weights: (K,).
        means: (K, d).
        covariances: (K, d, d).
        rewards: r_i.
        kl_weight: alpha.
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor
    rewards: tuple[Numbers, ...]
    kl_weight: float

    @property
    def dim(self) -> int:
        """Dimension d."""
        return self.means.shape[1]

    @cached_property
    def base(self) -> GaussianMixture:
        """The mixture for the side that is checked."""
        return GaussianMixture(self.weights, self.means, self.covariances)

    def with_curvature(self, quadratic: Tensor) -> RawProblem:
        """Return the problem with another Q (d, d) in its first reward."""
        return replace(self, rewards=(replace(self.rewards[0], quadratic=quadratic), *self.rewards[1:]))

    def log_density(self, x: Tensor) -> Tensor:
        """Return log p_0 at points (N, d), written out."""
        centred = x[:, None, :] - self.means
        squares = torch.einsum("nki,kij,nkj->nk", centred, torch.linalg.inv(self.covariances), centred)
        constants = self.weights.log() - torch.logdet(2 * math.pi * self.covariances) / 2
        return (constants - squares / 2).logsumexp(1)


def draw_problem(generator: torch.Generator, *, dim: int, components: int = 0, rewards: int = 1) -> RawProblem:
    """Draw a mixture with full covariances, quadratic rewards and a KL weight for which every tilt exists.

    Args:
        generator: draws everything.
        dim: d.
        components: K; 0 draws two to four.
        rewards: how many.
    """
    count = components or int(torch.randint(2, 5, (), generator=generator))
    weights = uniform(generator, 0.3, 1.0, count)
    return RawProblem(
        weights / weights.sum(),
        uniform(generator, -2.0, 2.0, count, dim),
        torch.stack([_rotated(uniform(generator, 0.25, 0.5, dim).square(), generator) for _ in range(count)]),
        tuple(draw_numbers(generator, dim) for _ in range(rewards)),
        float(uniform(generator, math.log(0.4), math.log(2.0)).exp()),
    )


def draw_numbers(generator: torch.Generator, dim: int) -> Numbers:
    """Draw a quadratic reward in ``dim`` dimensions; its curvature may have either sign."""
    linear, constant = uniform(generator, -1.2, 1.2, dim), float(uniform(generator, -1.0, 1.0))
    return Numbers(linear, _rotated(uniform(generator, -0.3, 0.8, dim), generator), constant)


def _rotated(eigenvalues: Tensor, generator: torch.Generator) -> Tensor:
    """Return a symmetric matrix with these eigenvalues and random eigenvectors."""
    shape = (len(eigenvalues),) * 2
    basis = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64)).Q
    matrix = (basis * eigenvalues) @ basis.T
    return (matrix + matrix.T) / 2


def draw_time(generator: torch.Generator, schedule: NoiseSchedule) -> Tensor:
    """Draw a time at which the noise is neither so small nor so large that the lattice misses the integrand."""
    ends = schedule.log_snr(torch.tensor([schedule.t_max, schedule.t_min], dtype=torch.float64))
    low, high = max(LOG_SNR[0], float(ends[0])), min(LOG_SNR[1], float(ends[1]))
    return schedule.time_of_log_snr(low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64))


def draw_points(
    generator: torch.Generator, problem: RawProblem, schedule: NoiseSchedule, t: Tensor, count: int
) -> Tensor:
    """Draw states (count, d) of the noised base at time t."""
    clean = problem.base.sample(count, generator=generator)
    noise = torch.randn(count, problem.dim, generator=generator, dtype=torch.float64)
    return schedule.alpha(t) * clean + schedule.sigma(t) * noise


class States(NamedTuple):
    """States x (B, d) at one time of one schedule."""

    schedule: NoiseSchedule
    t: Tensor
    x: Tensor


def draw_states(generator: torch.Generator, problem: RawProblem, count: int) -> Iterator[States]:
    """Draw a time and states of one schedule of each kind."""
    for make in SCHEDULES.values():
        schedule = make()
        t = draw_time(generator, schedule)
        yield States(schedule, t, draw_points(generator, problem, schedule, t, count))
