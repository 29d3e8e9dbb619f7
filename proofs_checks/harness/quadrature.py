"""Problems drawn anew, and the other side of every closed form: sums over a lattice.

The trapezoidal rule with spacing h on an analytic integrand that decays like a Gaussian of standard deviation sd
errs by about exp(-2 pi^2 sd^2 / h^2): below rounding once h < sd. So with nodes y_j and cells of volume h^d,

    E[f(x_0) | x_t = x] = sum_j f(y_j) p_0(y_j) N(x; a y_j, s^2 I) / sum_j p_0(y_j) N(x; a y_j, s^2 I),

and no closed form of tilt, noised law or posterior enters. Densities and rewards are written out here from their
numbers; nothing of ``toy`` is used but to hand the same numbers to the side that is checked.

Source: Trefethen and Weideman, The Exponentially Convergent Trapezoidal Rule, SIAM Review 56 (2014).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from proofs_checks.harness.draw import uniform
from sdeblend.schedule import SCHEDULES, NoiseSchedule
from toy import GaussianMixture, QuadraticReward

# Reach and spacing of the lattice, by dimension: the problems below put less than 1e-14 beyond, and the narrowest
# integrand (standard deviation .1, at the least noise drawn) is wider than the spacing.
REACH = {1: 16.0, 2: 11.2}
SPACING = {1: 0.02, 2: 0.08}
LOG_SNR = (-4.0, 4.5)


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


def draw_states(
    generator: torch.Generator, problem: RawProblem, count: int
) -> Iterator[tuple[NoiseSchedule, Tensor, Tensor]]:
    """Give, for one schedule of each kind, the schedule, a drawn time and drawn states (count, d)."""
    for make in SCHEDULES.values():
        schedule = make()
        t = draw_time(generator, schedule)
        yield schedule, t, draw_points(generator, problem, schedule, t, count)


class Lattice:
    """Sums over a lattice for one problem in one or two dimensions.

    Args:
        problem: what is integrated.

    Attributes:
        nodes: y, (N, d).
        log_cell: log h^d.
        log_base: log p_0(y), (N,).
        rewards: r_i(y), (m, N).
    """

    def __init__(self, problem: RawProblem) -> None:
        steps = round(REACH[problem.dim] / SPACING[problem.dim])
        axis = torch.arange(-steps, steps + 1, dtype=torch.float64) * SPACING[problem.dim]
        self.nodes = torch.cartesian_prod(*[axis] * problem.dim).reshape(-1, problem.dim)
        self.log_cell = problem.dim * math.log(SPACING[problem.dim])
        self.log_base = problem.log_density(self.nodes)
        self.rewards = torch.stack([reward(self.nodes) for reward in problem.rewards])

    def log_integral(self, log_values: Tensor) -> Tensor:
        """Return log of the integral of exp(log_values), (..., N) -> (...)."""
        return log_values.logsumexp(-1) + self.log_cell

    def log_kernel(self, x: Tensor, a: Tensor, s: Tensor) -> Tensor:
        """Return log N(x; a y, s^2 I), (B, N), for states x (B, d); differentiable in x."""
        # |x - a y|^2 expanded would lose digits, so one axis at a time.
        squares = torch.zeros(len(x), len(self.nodes), dtype=torch.float64)
        for i in range(x.shape[1]):
            squares = squares + (x[:, None, i] - a * self.nodes[:, i]).square()
        return -squares / (2 * s * s) - x.shape[1] * (s.log() + math.log(2 * math.pi) / 2)

    def mean(self, log_weights: Tensor, values: Tensor) -> Tensor:
        """Return the mean of ``values`` (N,) or (N, k) under exp(log_weights), (B, N) -> (B,) or (B, k)."""
        return log_weights.softmax(-1) @ values


class Given:
    """The law of x_0 given noisy states, as weights of the nodes.

    Args:
        lattice: nodes and densities.
        schedule: forward process.
        t: time.
        x: noisy states (B, d); what is computed can be differentiated in them.

    Attributes:
        gain: a / s^2.
        log_joint: log p_0(y) N(x; a y, s^2 I), (B, N).
        weights: of the nodes, (B, N).
    """

    def __init__(self, lattice: Lattice, schedule: NoiseSchedule, t: Tensor, x: Tensor) -> None:
        a, s = schedule.alpha(t), schedule.sigma(t)
        self.nodes, self.gain = lattice.nodes, a / s.square()
        self.log_joint = lattice.log_base + lattice.log_kernel(x, a, s)
        self.weights = self.log_joint.softmax(-1)

    def tilted(self, values: Tensor) -> Given:
        """Return the law tilted by exp(values), values (N,)."""
        tilted = copy(self)
        tilted.log_joint = self.log_joint + values
        tilted.weights = tilted.log_joint.softmax(-1)
        return tilted

    def log_expected(self, values: Tensor) -> Tensor:
        """Return log E[exp(values)], (B,)."""
        return (self.log_joint + values).logsumexp(-1) - self.log_joint.logsumexp(-1)

    def control(self, values: Tensor) -> Tensor:
        """Return u = (a/s^2) Cov(v, x_0), (B, d), for r/alpha at the nodes."""
        return self.gain * ((self.tilted(values).weights - self.weights) @ self.nodes)

    def gap(self, values: Tensor) -> Tensor:
        """Return Delta = (a/s^2) Cov(v - r/alpha, x_0), (B, d), for r/alpha at the nodes."""
        change = self.tilted(values).weights - self.weights - self.weights * self.centred(values)
        return self.gain * (change @ self.nodes)

    def centred(self, values: Tensor) -> Tensor:
        """Return values less their means, (B, N)."""
        return values - (self.weights @ values)[:, None]

    def covariance(self) -> Tensor:
        """Return Cov(x_0), (B, d, d)."""
        mean = self.weights @ self.nodes
        second = torch.einsum("bn,ni,nj->bij", self.weights, self.nodes, self.nodes)
        return second - mean[:, :, None] * mean[:, None, :]

    def third(self, values: Tensor) -> Tensor:
        """Return kappa_3(r, r, x_0), (B, d), for r at the nodes."""
        squares = self.weights * self.centred(values).square()
        return squares @ self.nodes - squares.sum(-1, keepdim=True) * (self.weights @ self.nodes)


def gradient(values: Tensor, x: Tensor) -> Tensor:
    """Return d values_b / d x_b by automatic differentiation, (B,), (B, d) -> (B, d)."""
    (slope,) = torch.autograd.grad(values.sum(), x, retain_graph=True)
    return slope
