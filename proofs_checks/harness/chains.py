"""Chains on the line whose laws are computed by quadrature, with no samples.

A step of a solver is a Gaussian transition x' = A x + B S(x) + G z. On equispaced nodes of spacing dx <= G the
trapezoidal rule integrates a transition to 2 exp(-2 pi^2 (G/dx)^2), at most 5e-9 a step, so

    rho_{n+1}(x') = sum_x T(x', x) rho_n(x) dx,      T(x', x) = N(x'; A x + B S(x), G^2),

is the law of the chain to that error, not an estimate from samples.
"""

from __future__ import annotations

import math

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
