"""The tuned process by second-order steps, with the base's beside it: exact log ratio and exact KL.

The stochastic step of DPM-Solver++ 2M uses the posterior mean D_old of the step before:

    x_s = A x + B S(x) + C D_old + G z,      z ~ N(0, I).

Given the path so far this is a Gaussian, as for a chain. With dS = S - S_base and dD = q dS the difference of the means
at the same path is M = B dS + C dD_old, so that along a path

    log p / p_base = sum_k M_k.z_k / G_k + |M_k|^2 / (2 G_k^2),      KL = E sum_k |M_k|^2 / (2 G_k^2).

Its law is right to second order in the step, where the ancestral chain (``sdeblend.finetune.chain``) makes modes
narrower to first order.

Source: Lu et al. 2211.01095 (the step); Girsanov's theorem in discrete time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sdeblend.finetune.model import Condition, Tunable, converted
from sdeblend.steps import ExponentialMultistep
from sdeblend.steps.base import Move


class Followed(NamedTuple):
    """Samples (B, *event), log p / p_base of their paths and the sum of the steps' KL, nats (B,) each."""

    samples: Tensor
    log_ratio: Tensor
    kl: Tensor


def plan(model: Tunable, grid: Tensor) -> list[Move]:
    """Return the steps on a grid that ends at 0."""
    return ExponentialMultistep().plan(model.schedule, grid)


def follow(
    model: Tunable,
    moves: list[Move],
    noise: Tensor,
    condition: Condition | None,
    *,
    keep: int | None = None,
    recompute: bool = False,
) -> Followed:
    """Run the tuned process.

    Args:
        model: base and tuned network.
        moves: the n steps, from ``plan``; all but the last have noise.
        noise: the start and then that of each step, unit variance, (n, B, *event).
        condition: of the B samples.
        keep: the last steps through which states are differentiated; all if left out.
        recompute: evaluate networks again for the gradient and keep no activations.

    Returns:
        samples, log ratio and KL; differentiable unless grad is disabled.
    """

    def score(network: object, x: Tensor, times: Tensor) -> Tensor:
        if recompute and torch.is_grad_enabled():
            out = checkpoint(network, x, times, condition, use_reentrant=False)
        else:
            out = network(x, times, condition)  # type: ignore[operator]
        return converted(model, out.to(x.dtype), x, times, "score")

    x = noise[0] * model.schedule.prior_std()
    old, old_shift = torch.zeros_like(x), torch.zeros_like(x)
    log_ratio = kl = x.new_zeros(len(x))
    for k, move in enumerate(moves):
        if keep is not None and k <= len(moves) - keep:
            x, old, old_shift = x.detach(), old.detach(), old_shift.detach()
        times = move.t.expand(len(x))
        tuned = score(model.tuned, x, times)
        following = move.a * x + move.b * tuned + move.c * old
        if move.g:
            shift = tuned - score(model.base, x, times)
            scaled = ((move.b * shift + move.c * old_shift) / move.g).flatten(1)
            cost = scaled.square().sum(1) / 2
            z = noise[k + 1]
            log_ratio, kl = log_ratio + (scaled * z.flatten(1)).sum(1) + cost, kl + cost
            following = following + move.g * z
            old_shift = move.q * shift
        x, old = following, move.p * x + move.q * tuned
    return Followed(x, log_ratio, kl)


class Paths(NamedTuple):
    """Paths of the tuned process, for trainers that regress on them.

    Attributes:
        states: (n + 1, B, *event), the last at t = 0.
        base: the base's score at the n - 1 noisy steps, (n - 1, B, *event).
        old_shift: dD_old of these steps, (n - 1, B, *event).
    """

    states: Tensor
    base: Tensor
    old_shift: Tensor


def draw_paths(model: Tunable, moves: list[Move], noise: Tensor, condition: Condition | None) -> Paths:
    """Run the tuned process and keep its paths; arguments as ``follow``."""
    x = noise[0] * model.schedule.prior_std()
    old, old_shift = torch.zeros_like(x), torch.zeros_like(x)
    states, bases, old_shifts = [x], [], []
    for k, move in enumerate(moves):
        times = move.t.expand(len(x))
        tuned = converted(model, model.tuned(x, times, condition).to(x.dtype), x, times, "score")
        following = move.a * x + move.b * tuned + move.c * old
        if move.g:
            base = converted(model, model.base(x, times, condition).to(x.dtype), x, times, "score")
            bases.append(base)
            old_shifts.append(old_shift)
            old_shift = move.q * (tuned - base)
            following = following + move.g * noise[k + 1]
        x, old = following, move.p * x + move.q * tuned
        states.append(x)
    return Paths(torch.stack(states), torch.stack(bases), torch.stack(old_shifts))
