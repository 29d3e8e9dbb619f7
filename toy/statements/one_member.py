"""What drawing one member a step (DB-MPA-LS) does to a step, to a law, and what it costs.

Every step of a solver is x' = A x + B S + G z. With the blend, S = sum_i w_i S_i; with one member, S = S_I, I drawn
with the weights. The mean over I is the blend's, and the covariance has an extra term:

    Cov(x' | x) = G^2 1 + B^2 Var_w(S_i),        for Euler-Maruyama G^2 = h g^2 and B = h g^2.

In units of the step's own noise the extra variance a coordinate is

    ratio = B^2 tr Var_w(S_i) / (d G^2),         of order h,

and since the blend's log weight loses B^2 tr Var_w(S_i) / (2 G^2) in each step, the ratios of a run add up to
-2 E[log W] / d: what makes a blend inexact is what makes one member a step noisy.

Source: Diffusion Blend 2505.18547, Proposition 2; ``sdeblend.correct`` for W.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdeblend import BackwardSDE, Blend, EulerMaruyama, NoiseSchedule, OneMemberPerStep, trajectory
from toy.metrics import Estimate
from toy.mixtures.mixture import GaussianMixture
from toy.scores.stack import MixtureStack, mixture_score


@dataclass(frozen=True)
class OneStep:
    """Many copies of one step from one point, in units of the step's own noise and centred at the blend's mean.

    Attributes:
        points: where the copies land, (B, d).
        member: which member served each, long (B,).
        member_means: where each member's step lands without noise, (K, d).
        exact_mean: the same for the target's own score, (d,).
        covariance: predicted for one member a step, identity + (B/G)^2 Var_w(S_i), (d, d).
        step: h.
    """

    points: Tensor
    member: Tensor
    member_means: Tensor
    exact_mean: Tensor
    covariance: Tensor
    step: float


def one_step(
    members: list[GaussianMixture],
    weights: Tensor,
    target: GaussianMixture,
    schedule: NoiseSchedule,
    x: Tensor,
    t: float,
    h: float,
    *,
    count: int,
    generator: torch.Generator,
) -> OneStep:
    """Take one Euler-Maruyama step ``count`` times from x, each copy by a member drawn for it.

    Args:
        members: the tuned laws p_i, K of them.
        weights: their probabilities, (K,).
        target: the exact target.
        schedule: the forward process.
        x: where the step starts, (d,).
        t, h: it goes from t to t - h.
        count: number of copies B.
        generator: draws members and noise.
    """
    stack, step, grid = MixtureStack(members, schedule), EulerMaruyama(), torch.tensor([t, t - h], dtype=torch.float64)
    move = step.plan(schedule, grid)[0]
    start = x.double().expand(count, -1).clone()
    one = OneMemberPerStep(stack, weights, grid, count, method="independent", generator=generator)
    noise = torch.randn(start.shape, generator=generator, dtype=torch.float64)
    ends = step(BackwardSDE(schedule, one), start, t, t - h, noise)
    scores = stack(start[:1], move.t)[:, 0]
    centred = scores - weights @ scores
    blend_mean = move.a * x.double() + move.b * (weights @ scores)
    exact = mixture_score(target, schedule)(start[:1], move.t)[0]
    scale = move.b / move.g
    return OneStep(
        points=(ends - blend_mean) / move.g,
        member=one.index[0].long(),
        member_means=scale * centred,
        exact_mean=scale * (exact - weights @ scores),
        covariance=torch.eye(len(x), dtype=torch.float64) + scale**2 * (centred.T * weights) @ centred,
        step=h,
    )


def extra_variance(
    blend: Blend, schedule: NoiseSchedule, x: Tensor, grid: Tensor, *, generator: torch.Generator
) -> Estimate:
    """Return the extra variance of one member a step, in units of the step's own, at each noisy step of a DB-MPA run.

    Args:
        blend: of the members, coefficients that are probabilities.
        schedule: the forward process.
        x: the start, (B, d).
        grid: times (n + 1,).
        generator: the noise of the run.

    Returns:
        mean over the samples and its standard error, (m,) each, m the number of steps with noise.
    """
    moves = EulerMaruyama().plan(schedule, grid)
    values = []
    for state in trajectory(BackwardSDE(schedule, blend), x, grid, noise=generator):
        move = moves[state.step - 1]
        if state.evaluation is not None and move.g:
            values.append(state.evaluation.spread() * (move.b**2 / move.g**2 / x.shape[1]))
    ratios = torch.stack(values)
    return Estimate(ratios.mean(1), ratios.std(1) / len(x) ** 0.5)


def covariance_error(samples: Tensor, reference: Tensor, parts: int = 20) -> Estimate:
    """Return |Cov(samples) - Cov(reference)| (Frobenius) of two runs on the same noise.

    The error is that of the mean over ``parts`` disjoint pairs of chunks: noise that both runs share cancels in each.

    Args:
        samples: (B, d).
        reference: (B, d), row i from the same noise as row i of ``samples``.
        parts: number of chunks, at least 2.

    Returns:
        0-dim estimate; never zero in expectation, so that values within two errors of zero say nothing.
    """
    pairs = zip(samples.double().chunk(parts), reference.double().chunk(parts), strict=True)
    differences = torch.stack([torch.cov(a.T) - torch.cov(b.T) for a, b in pairs])
    return Estimate(differences.mean(0).norm(), differences.std(0).norm() / len(differences) ** 0.5)
