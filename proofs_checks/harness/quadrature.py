"""The other side of every closed form: sums over a lattice.

The trapezoidal rule with spacing h on an analytic integrand that decays like a Gaussian of standard deviation sd
errs by about exp(-2 pi^2 sd^2 / h^2): below rounding once h < sd. So with nodes y_j and cells of volume h^d,

    E[f(x_0) | x_t = x] = sum_j f(y_j) p_0(y_j) N(x; a y_j, s^2 I) / sum_j p_0(y_j) N(x; a y_j, s^2 I),

and no closed form of tilt, noised law or posterior enters: densities and rewards come from the numbers that
``draw_problem`` has drawn.

Source: Trefethen and Weideman, The Exponentially Convergent Trapezoidal Rule, SIAM Review 56 (2014).
"""

from __future__ import annotations

import math
from copy import copy

import torch
from torch import Tensor

from proofs_checks.harness.draw import RawProblem, States

# Reach and spacing of the lattice, by dimension: the problems drawn put less than 1e-14 beyond, and the narrowest
# integrand (standard deviation .1, at the least noise drawn) is wider than the spacing.
REACH = {1: 16.0, 2: 11.2}
SPACING = {1: 0.02, 2: 0.08}


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
        states: noisy states; what is computed can be differentiated in them.

    Attributes:
        gain: a / s^2.
        log_joint: log p_0(y) N(x; a y, s^2 I), (B, N).
        weights: of the nodes, (B, N).
    """

    def __init__(self, lattice: Lattice, states: States) -> None:
        schedule, t, x = states
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
