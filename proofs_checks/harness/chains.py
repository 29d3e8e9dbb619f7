"""Chains on the line whose laws are computed by quadrature, with no samples.

A step of a solver is a Gaussian transition x' = A x + B S(x) + G z. On equispaced nodes of spacing dx <= G the
trapezoidal rule integrates a transition to 2 exp(-2 pi^2 (G/dx)^2), at most 5e-9 a step, so

    rho_{n+1}(x') = sum_x T(x', x) rho_n(x) dx,      T(x', x) = N(x'; A x + B S(x), G^2),

is the law of the chain to that error, not an estimate from samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sdeblend.schedule import NoiseSchedule
from sdeblend.steps import Move
from toy.mixtures.mixture import GaussianMixture

REACH = 6.0


def line_nodes(moves: list[Move], reach: float = REACH) -> Tensor:
    """Return nodes on [-reach, reach], float64 (M,), as dense as the chain's narrowest transition needs."""
    spacing = min(move.g for move in moves if move.g)
    half = math.ceil(reach / spacing)
    return torch.linspace(-reach, reach, 2 * half + 1, dtype=torch.float64)


def member_means(members: list[GaussianMixture], schedule: NoiseSchedule, move: Move, nodes: Tensor) -> Tensor:
    """Return each member's transition mean A x + B S_i(x), (K, M), its score from the closed form."""
    scores = [member.noised(schedule, move.t).score(nodes[:, None])[:, 0] for member in members]
    return move.a * nodes + move.b * torch.stack(scores)


def log_transition(nodes: Tensor, means: Tensor, variance: float) -> Tensor:
    """Return log N(x'; mean, variance) for all x' in nodes, (..., M', M), for means (..., M)."""
    distance = nodes[:, None] - means.unsqueeze(-2)
    return distance.square_().mul_(-1 / (2 * variance)).sub_(math.log(2 * math.pi * variance) / 2)


def transition(nodes: Tensor, means: Tensor, variance: float) -> Tensor:
    """Return T dx, (..., M', M): a matrix that maps a density on the nodes to the next one."""
    return log_transition(nodes, means, variance).exp_().mul_(float(nodes[1] - nodes[0]))


def normal_density(nodes: Tensor) -> Tensor:
    """Return the standard normal density at the nodes, (M,)."""
    return (-nodes.square() / 2).exp() / math.sqrt(2 * math.pi)


class Reached(NamedTuple):
    """A blended chain and the geometric mean of its members' chains after some steps, by quadrature.

    Attributes:
        t: the time, 0-dim.
        blended: density of the blended chain at the nodes, (M,).
        geometric: that of prod_n prod_i R_i^{c_i}, not normalised, (M,).
        nats: -E[log W] along the blended chain.
    """

    t: Tensor
    blended: Tensor
    geometric: Tensor
    nats: float


def line_chain(
    laws: list[GaussianMixture], coefficients: Tensor, schedule: NoiseSchedule, moves: list[Move], nodes: Tensor,
    kappa: float = 0.0, count: int = 0,
) -> Iterator[Reached]:  # fmt: skip
    """Yield both chains after each step, each step followed by Langevin moves.

    Args:
        laws: of the members.
        coefficients: of the blend, (K,).
        schedule, moves: the steps of the chain.
        nodes: (M,), as dense as its narrowest transition needs.
        kappa, count: size and number of the moves.
    """
    dx, nats = float(nodes[1] - nodes[0]), 0.0
    blended = geometric = normal_density(nodes)
    for move in moves:
        means = member_means(laws, schedule, move, nodes)
        log_k = torch.einsum("k,kij->ij", coefficients, log_transition(nodes, means, move.g**2))
        log_r = log_transition(nodes, coefficients @ means, move.g**2)
        moved = log_r.exp() * blended * dx
        nats += float((moved * (log_r - log_k)).sum()) * dx
        blended, geometric = moved.sum(1), log_k.exp() @ geometric * dx
        if count:
            d = kappa * float(schedule.sigma(move.s).square())
            scores = [law.noised(schedule, move.s).score(nodes[:, None])[:, 0] for law in laws]
            langevin = transition(nodes, nodes + d * (coefficients @ torch.stack(scores)), 2 * d)
            for _ in range(count):
                blended, geometric = langevin @ blended, langevin @ geometric
        yield Reached(move.s, blended, geometric, nats)


def product_density(
    laws: list[GaussianMixture], coefficients: Tensor, schedule: NoiseSchedule, t: Tensor, nodes: Tensor
) -> Tensor:
    """Return the density of q_t ~ prod_i p_{i,t}^{c_i} at the nodes, (M,), normalised on them."""
    logs = torch.stack([law.noised(schedule, t).log_prob(nodes[:, None]) for law in laws])
    return (coefficients @ logs).softmax(0) / float(nodes[1] - nodes[0])


def divergence(p: Tensor, q: Tensor, dx: float) -> float:
    """Return KL(p || q) of two densities on nodes of spacing dx, where both are above 1e-200."""
    held = (p > 1e-200) & (q > 1e-200)
    return float((p[held] * (p[held] / q[held]).log()).sum()) * dx


def total_variation(p: Tensor, q: Tensor, dx: float) -> float:
    """Return the total variation distance of two densities on nodes of spacing dx."""
    return float((p - q).abs().sum()) * dx / 2
