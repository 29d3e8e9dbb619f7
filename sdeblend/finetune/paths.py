"""Paths of the tuned process: one walk for every trainer, what it costs in KL, and its exact log ratio to the base.

A step from t_k to t_{k+1} is one of the core's (``sdeblend.steps``) at the score S that the network predicts,

    x_{k+1} = A x_k + B S(x_k) + C D_old + G z_k,      z_k ~ N(0, I),      D = p x + q S,

and given the path so far it is a Gaussian. With dS = S - S_base and dD = q dS the difference of its means at the same
path is M = B dS + C dD_old, so that along a path

    log p / p_base = sum_k M_k.z_k / G_k + |M_k|^2 / (2 G_k^2)

is exact: E[p_base / p] = 1. The last step goes to t = 0, is the posterior mean and has no density.

The stochastic step of DPM-Solver++ 2M, whose C is not 0, has the law of the process to second order in the step, where
the ancestral chain (``trainers.policy``) makes modes narrower to first order. The mean of its log ratio is no measure
of a control, though: dS_k and dD_old differ by the noise of the step between, which M_k carries, and E|M_k|^2 is too
large by a share of the first order in the step, the larger the steeper the control. On two modes the tilt at KL weight
1/2 costs .41 nats, and .52 by this sum over 50 steps; a trainer that charges it flattens the control where it is steep.
What is charged is the KL of the processes themselves,

    KL = 1/2 E int |eps - eps_base|^2 dl = E sum_k v_k |dS_k|^2 / 2,        v_k = sigma_k^2 (l_{k+1} - l_{k-1}) / 2,

l the log-SNR, by the trapezoidal rule at the states of the path, and so of second order like their law. The last step
runs to l = infinity; sigma^2 falls as exp(-l), so that it adds sigma_n^2 to the last v.

With E[r] - kl_weight KL as the objective the optimum is the process of p_base exp(r / kl_weight), provided that x_0 is
independent of the start (eta = 1, alpha(t_max) near 0): Domingo-Enrich et al. 2409.08861.

Source: Lu et al. 2211.01095 (the step); Girsanov's theorem in discrete time; Kingma et al. 2107.00630 (KL in log-SNR).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sdeblend.finetune.model import Condition, Tunable, converted
from sdeblend.schedule import NoiseSchedule
from sdeblend.steps import ExponentialMultistep, Step, Walk
from sdeblend.steps.base import Move

MULTISTEP = ExponentialMultistep()
Network = Callable[[Tensor, Tensor, Condition | None], Tensor]


class Visit(NamedTuple):
    """One step of a path: (B, *event) each but for move and times.

    Attributes:
        move: the step.
        x, t: where the network was evaluated, and when, (B,).
        prediction, score: what it said, and the same as a score.
        noise: z; None where the step has none.
        following: the state after the step.
    """

    move: Move
    x: Tensor
    t: Tensor
    prediction: Tensor
    score: Tensor
    noise: Tensor | None
    following: Tensor


class Followed(NamedTuple):
    """Samples (B, *event), log p / p_base of their paths and what their control costs in KL, nats (B,) each."""

    samples: Tensor
    log_ratio: Tensor
    kl: Tensor


def draw_noise(model: Tunable, steps: int, rows: slice, total: int, generator: torch.Generator) -> Tensor:
    """Draw the noise of a batch of ``total`` samples and return that of ``rows``, (n, B, *event).

    Entry 0 is the start, entry k + 1 belongs to step k; the last of n steps has none. The whole batch is drawn wherever
    it is computed, so that results do not depend on how it is shared out.
    """
    out = []
    for _ in range(steps):
        draw = torch.randn((total, *model.event), generator=generator, device=generator.device)
        out.append(draw[rows].to(model.device))
    return torch.stack(out)


def visits(
    model: Tunable,
    step: Step,
    grid: Tensor,
    noise: Tensor,
    condition: Condition | None,
    *,
    keep: int | None = None,
    recompute: bool = False,
) -> Iterator[Visit]:
    """Run the tuned process and give its n steps one by one; differentiable unless grad is disabled.

    Args:
        model: base and tuned network.
        step: of the solver.
        grid: times, float64 (n + 1,), from noise to 0.
        noise: from ``draw_noise``, (n, B, *event).
        condition: of the B samples.
        keep: the last steps through which states are differentiated; all if left out.
        recompute: evaluate the network again for the gradient and keep no activations.
    """
    walk, x = Walk(step, model.schedule, grid), noise[0] * model.schedule.prior_std()
    for k, move in enumerate(walk.moves):
        if keep is not None and k <= len(walk.moves) - keep:
            x, walk.old = x.detach(), None if walk.old is None else walk.old.detach()
        t = move.t.expand(len(x))
        prediction, score = evaluated(model, model.tuned, x, t, condition, recompute=recompute)
        z = noise[k + 1] if move.g else None
        following = walk.advance(
            move, x, score, z, lambda y, s: evaluated(model, model.tuned, y, s.expand(len(y)), condition)[1]
        )
        yield Visit(move, x, t, prediction, score, z, following)
        x = following


def evaluated(
    model: Tunable, network: Network, x: Tensor, t: Tensor, condition: Condition | None, *, recompute: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the prediction of one of a model's networks and the same as a score, (B, *event) in the dtype of x."""
    if recompute and torch.is_grad_enabled():
        out = checkpoint(network, x, t, condition, use_reentrant=False).to(x.dtype)
    else:
        out = network(x, t, condition).to(x.dtype)
    return out, converted(model, out, x, t, "score")


def draw_states(model: Tunable, step: Step, grid: Tensor, noise: Tensor, condition: Condition | None) -> Tensor:
    """Run the tuned process and return its states, (n + 1, B, *event), the last at t = 0; arguments as ``visits``."""
    path = list(visits(model, step, grid, noise, condition))
    return torch.stack([*(visit.x for visit in path), path[-1].following])


def follow(
    model: Tunable,
    grid: Tensor,
    noise: Tensor,
    condition: Condition | None,
    *,
    keep: int | None = None,
    recompute: bool = False,
) -> Followed:
    """Run the tuned process by second-order steps with the base's beside it; arguments as ``visits``.

    Returns:
        samples, log ratio and KL; differentiable unless grad is disabled.
    """
    samples = old = torch.zeros_like(noise[0])
    log_ratio = kl = noise.new_zeros(noise.shape[1])
    path = visits(model, MULTISTEP, grid, noise, condition, keep=keep, recompute=recompute)
    for k, (visit, charge) in enumerate(zip(path, charges(model.schedule, grid).tolist(), strict=True)):
        move, z, samples = visit.move, visit.noise, visit.following
        if keep is not None and k < len(grid) - keep:
            old = old.detach()
        shift = visit.score - evaluated(model, model.base, visit.x, visit.t, condition, recompute=recompute)[1]
        kl = kl + charge * shift.flatten(1).square().sum(1) / 2
        if z is not None:
            scaled = ((move.b * shift + move.c * old) / move.g).flatten(1)
            log_ratio = log_ratio + (scaled * z.flatten(1)).sum(1) + scaled.square().sum(1) / 2
        old = move.q * shift
    return Followed(samples, log_ratio, kl)


def log_snr_weights(schedule: NoiseSchedule, times: Tensor) -> Tensor:
    """Return the weights of an integral over the log-SNR, from the first of some times to t = 0, float64 (n,).

    The rule is trapezoidal; what comes after the last time is taken to fall as sigma^2 does, to exp(-l).

    Args:
        schedule: gives the log-SNR.
        times: at which the integrand is known, decreasing, float64 (n,).
    """
    half = schedule.log_snr(times).diff() / 2
    weights = torch.nn.functional.pad(half, (0, 1)) + torch.nn.functional.pad(half, (1, 0))
    weights[-1] += 1
    return weights


def charges(schedule: NoiseSchedule, grid: Tensor) -> Tensor:
    """Return v of each step of a grid, float64 (n,): KL = E sum_k v_k |S - S_base|^2 / 2 at the process's states."""
    return log_snr_weights(schedule, grid[:-1]) * schedule.sigma(grid[:-1]).square()
