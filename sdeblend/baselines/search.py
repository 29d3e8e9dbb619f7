"""Search over samples: best of n, and block-wise best of n on the predicted clean sample (CoDe).

Best of n draws n samples and keeps the one of the highest reward. CoDe does so every few steps: each path is
continued n times for a block of steps, the continuations are scored by r(E[x_0 | x_t]), and the best one goes on.
Both sharpen the base by at most log n - (n - 1)/n nats a selection, whatever the KL weight: they have no alpha.
A candidate whose reward is not finite loses to any other; where all of a path are such, the first goes on.

Source: Singh et al. 2502.00968 (CoDe); Beirami et al. 2401.01879 for the KL of best of n.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdeblend.baselines.drawn import Drawn, Reward, advance, denoised, evaluations, repeated, usable
from sdeblend.grid import check_grid
from sdeblend.noise import NoiseSource
from sdeblend.score import restrict_rows
from sdeblend.sde import BackwardSDE
from sdeblend.steps import Ancestral, Step


def code(
    sde: BackwardSDE,
    x: Tensor,
    grid: Tensor,
    reward: Reward,
    *,
    noise: NoiseSource,
    candidates: int = 20,
    block: int = 5,
    step: Step | None = None,
) -> Drawn:
    """Block-wise best of n.

    Args:
        sde: the model to search with, usually the base.
        x: start at grid[0], (B, *event).
        grid: decreasing times (n + 1,).
        reward: clean samples -> (B,).
        noise: source of the steps' noise; called for batches of B * candidates.
        candidates: continuations a path, n; the authors' 20.
        block: steps between two selections; the authors' 5.
        step: solver step, ancestral by default.

    Returns:
        samples (B, *event) and their cost.

    Raises:
        ValueError: fewer than two candidates or an empty block.
        FloatingPointError: a selection without a single finite reward.

    Source: Singh et al. 2502.00968, Algorithm 1.
    """
    if candidates < 2 or block < 1:
        raise ValueError(f"CoDe needs at least 2 candidates and blocks of 1 step, got {candidates} and {block}")
    grid, step = check_grid(grid, sde.schedule), step or Ancestral()
    batch, steps = len(x), len(grid) - 1
    wide = repeated(sde.score, batch, candidates)
    scored = restrict_rows(reward, torch.arange(batch).repeat_interleave(candidates))
    per_call, calls, rewards = evaluations(sde.score), 0, 0
    for first in range(0, steps, block):
        last = min(first + block, steps)
        many = x.repeat_interleave(candidates, 0)
        many = advance(step, sde.schedule, wide, many, grid[first : last + 1], first, noise)
        predicted = denoised(sde.schedule, wide, many, grid[last])
        values = usable(scored(predicted)).reshape(batch, candidates)
        best = values.argmax(1) + torch.arange(batch, device=x.device) * candidates
        x = many[best]
        calls += candidates * (last - first + (1 if float(grid[last]) else 0))
        rewards += candidates
    return Drawn(x, calls * per_call, reward_calls=rewards, paired=False)


def best_of_n(
    sde: BackwardSDE,
    x: Tensor,
    grid: Tensor,
    reward: Reward,
    *,
    noise: NoiseSource,
    step: Step | None = None,
) -> Drawn:
    """Keep the best of the n samples of each problem.

    Args:
        sde: the model to sample.
        x: starts at grid[0], (B, n, *event): n of each of B problems; a bound score has B * n rows.
        grid: decreasing times.
        reward: clean samples (B * n, *event) -> (B * n,).
        noise: source of the steps' noise; called for batches of B * n.
        step: solver step, ancestral by default.

    Returns:
        samples (B, *event) and their cost.

    Raises:
        ValueError: fewer than two candidates.
        FloatingPointError: not a single finite reward.

    Source: Stiennon et al. 2009.01325.
    """
    if x.ndim < 3 or x.shape[1] < 2:
        raise ValueError(f"best of n needs starts (B, n, *event) with n >= 2, got {tuple(x.shape)}; stack the starts")
    grid = check_grid(grid, sde.schedule)
    batch, candidates = x.shape[:2]
    end = advance(step or Ancestral(), sde.schedule, sde.score, x.flatten(0, 1), grid, 0, noise)
    best = usable(reward(end)).reshape(batch, candidates).argmax(1)
    samples = end.reshape(x.shape)[torch.arange(batch, device=x.device), best]
    cost = (len(grid) - 1) * candidates * evaluations(sde.score)
    return Drawn(samples, cost, reward_calls=candidates, paired=False)
