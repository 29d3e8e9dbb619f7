"""The tuned process by second-order steps, with the base's beside it: what it costs in KL, and its exact log ratio.

The stochastic step of DPM-Solver++ 2M uses the posterior mean D_old of the step before:

    x_s = A x + B S(x) + C D_old + G z,      z ~ N(0, I).

Its law is right to second order in the step, where the ancestral chain (``sdeblend.finetune.chain``) makes modes
narrower to first order. Given the path so far the step is a Gaussian, as for a chain. With dS = S - S_base and
dD = q dS the difference of the means at the same path is M = B dS + C dD_old, so that along a path

    log p / p_base = sum_k M_k.z_k / G_k + |M_k|^2 / (2 G_k^2)

is exact: E[p_base / p] = 1. Its mean is no measure of a control, though: dS_k and dD_old differ by the noise of the
step between, which M_k carries, and E|M_k|^2 is too large by a share of the first order in the step, the larger the
steeper the control. On two modes the tilt at KL weight 1/2 costs .41 nats, and .52 by this sum over 50 steps; a trainer
that charges it flattens the control where it is steep. What is charged is the KL of the processes themselves,

    KL = 1/2 E int |eps - eps_base|^2 dl = E sum_k v_k |dS_k|^2 / 2,        v_k = sigma_k^2 (l_{k+1} - l_{k-1}) / 2,

l the log-SNR, by the trapezoidal rule at the states of the path, and so of second order like their law. The last step
runs to l = infinity; sigma^2 falls as exp(-l), so that it adds sigma_n^2 to the last v.

Source: Lu et al. 2211.01095 (the step); Girsanov's theorem in discrete time; Kingma et al. 2107.00630 (KL in log-SNR).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sdeblend.finetune.model import Condition, Tunable, converted
from sdeblend.schedule import NoiseSchedule
from sdeblend.steps import ExponentialMultistep
from sdeblend.steps.base import Move


class Followed(NamedTuple):
    """Samples (B, *event), log p / p_base of their paths and what their control costs in KL, nats (B,) each."""

    samples: Tensor
    log_ratio: Tensor
    kl: Tensor


def plan(model: Tunable, grid: Tensor) -> list[Move]:
    """Return the steps on a grid that ends at 0."""
    return ExponentialMultistep().plan(model.schedule, grid)


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


def charges(model: Tunable, moves: list[Move]) -> Tensor:
    """Return v of each step, float64 (n,): KL = E sum_k v_k |S - S_base|^2 / 2 at the states of the process."""
    times = torch.stack([move.t for move in moves])
    return log_snr_weights(model.schedule, times) * model.schedule.sigma(times).square()


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
    for k, (move, charge) in enumerate(zip(moves, charges(model, moves).tolist(), strict=True)):
        if keep is not None and k <= len(moves) - keep:
            x, old, old_shift = x.detach(), old.detach(), old_shift.detach()
        times = move.t.expand(len(x))
        tuned = score(model.tuned, x, times)
        following = move.a * x + move.b * tuned + move.c * old
        shift = tuned - score(model.base, x, times)
        kl = kl + charge * shift.flatten(1).square().sum(1) / 2
        if move.g:
            scaled = ((move.b * shift + move.c * old_shift) / move.g).flatten(1)
            z = noise[k + 1]
            log_ratio = log_ratio + (scaled * z.flatten(1)).sum(1) + scaled.square().sum(1) / 2
            following = following + move.g * z
            old_shift = move.q * shift
        x, old = following, move.p * x + move.q * tuned
    return Followed(x, log_ratio, kl)


def draw_states(model: Tunable, moves: list[Move], noise: Tensor, condition: Condition | None) -> Tensor:
    """Run the tuned process and return its states, (n + 1, B, *event), the last at t = 0; arguments as ``follow``."""
    x = noise[0] * model.schedule.prior_std()
    old = torch.zeros_like(x)
    states = [x]
    for k, move in enumerate(moves):
        times = move.t.expand(len(x))
        score = converted(model, model.tuned(x, times, condition).to(x.dtype), x, times, "score")
        following = move.a * x + move.b * score + move.c * old
        if move.g:
            following = following + move.g * noise[k + 1]
        x, old = following, move.p * x + move.q * score
        states.append(x)
    return torch.stack(states)
