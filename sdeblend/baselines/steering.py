"""Feynman-Kac steering: particles of the base, resampled by potentials made of the reward.

With predictions r_k = r(E[x_0 | x_{t_k}]) at the resampling times and r_K the reward of the sample itself, the
particles are weighted by a product of potentials whose total telescopes to exp(r_K / alpha),

    difference: exp((r_k - r_{k-1}) / alpha),
    maximum:    exp(max_{j<=k} r_j / alpha),
    sum:        exp(sum_{j<=k} r_j / alpha),

where for the last two the final potential makes up for the others. So with enough particles the weighted samples
have the law p_base exp(r / alpha) / Z, whatever the potential; with few, the potentials differ. Where a reward is
not finite the potential is zero, and so is the weight from there on.

Source: Singhal et al. 2501.06848 (FK steering); Del Moral 2004.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from sdeblend.baselines.drawn import Drawn, Reward, advance, denoised, evaluations, usable
from sdeblend.certificate import effective_sample_size
from sdeblend.correct import systematic_resample
from sdeblend.grid import check_grid
from sdeblend.noise import NoiseSource
from sdeblend.sde import BackwardSDE
from sdeblend.steps import Ancestral, Step

Potential = Literal["difference", "maximum", "sum"]


def steer(
    sde: BackwardSDE,
    x: Tensor,
    grid: Tensor,
    reward: Reward,
    kl_weight: float,
    *,
    noise: NoiseSource,
    generator: torch.Generator,
    potential: Potential = "difference",
    every: int = 5,
    threshold: float = 0.5,
    step: Step | None = None,
) -> Drawn:
    """Sample p_base exp(r / kl_weight) / Z with the B rows as particles of one problem.

    Args:
        sde: the base.
        x: starts at grid[0], (B, *event), the particles.
        grid: decreasing times (n + 1,), ending at 0.
        reward: clean samples -> (B,).
        kl_weight: alpha, in units of the reward.
        noise: source of the steps' noise.
        generator: draws the ancestors, on the CPU.
        potential: "difference", "maximum" or "sum".
        every: steps between two resampling times.
        threshold: resample below this fraction of effective particles.
        step: solver step, ancestral by default.

    Returns:
        particles, their log-weights, cost, and "ess" of the final weights.

    Raises:
        ValueError: an unknown potential, a KL weight that is not positive, or a grid that does not end at 0.
        FloatingPointError: no particle is left whose rewards were finite.

    Source: Singhal et al. 2501.06848, section 3.
    """
    if potential not in get_args(Potential):
        raise ValueError(f"a potential must be one of {', '.join(get_args(Potential))}, got {potential!r}")
    if not kl_weight > 0 or every < 1:
        raise ValueError(f"steering needs kl_weight > 0 and every >= 1, got {kl_weight} and {every}")
    grid, step = check_grid(grid, sde.schedule), step or Ancestral()
    if float(grid[-1]) != 0:
        raise ValueError(f"steering needs a grid that ends at 0, got {float(grid[-1]):g}; the last potential is exact")
    steps, batch = len(grid) - 1, len(x)
    given = torch.zeros(batch, dtype=torch.float64, device=x.device)  # log of the potentials so far
    residual = given.clone()  # of those since the last resampling
    history = given.clone()  # running maximum or sum of predicted rewards over alpha
    if potential == "maximum":
        history -= torch.inf
    lost = torch.zeros(batch, dtype=torch.bool, device=x.device)  # since the last resampling, by a reward that failed
    calls, rewards, eve = 0, 0, torch.arange(batch, device=x.device)
    for first in range(0, steps, every):
        last = min(first + every, steps)
        x = advance(step, sde.schedule, sde.score, x, grid[first : last + 1], first, noise)
        value = usable(reward(denoised(sde.schedule, sde.score, x, grid[last]))).double() / kl_weight
        calls += last - first + (1 if float(grid[last]) else 0)
        rewards += 1
        if potential == "difference" or last == steps:
            increment = value - given
        else:
            history = torch.maximum(history, value) if potential == "maximum" else history + value
            increment = history
        lost = lost | value.isneginf()
        if bool(lost.all()):
            raise FloatingPointError(
                f"steering needs one of {batch} particles to have had finite rewards only, got none at step {last}; "
                "take more"
            )
        given, residual = given + increment, (residual + increment).masked_fill(lost, -torch.inf)
        if last < steps and float(effective_sample_size(residual)) < threshold * batch:
            ancestors = systematic_resample(residual, generator)
            x, given, history, eve = x[ancestors], given[ancestors], history[ancestors], eve[ancestors]
            residual, lost = torch.zeros_like(residual), torch.zeros_like(lost)
    ess = float(effective_sample_size(residual)) / batch
    cost = calls * evaluations(sde.score)
    return Drawn(x, cost, reward_calls=rewards, log_weights=residual, ancestors=eve, facts={"ess": ess})
