"""Blocks of steps between two looks at the reward, for search and steering."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from sdeblend.methods.case import Case
from sdeblend.noise import NoiseSource
from sdeblend.score import ScoreFunction
from sdeblend.sde import BackwardSDE
from sdeblend.steps import Walk


def blocks(case: Case, every: int) -> Iterator[tuple[int, int]]:
    """Yield (first, last) of the steps of each block of a case's grid; the last one may be short."""
    steps = len(case.grid) - 1
    for first in range(0, steps, every):
        yield first, min(first + every, steps)


def advance(case: Case, score: ScoreFunction, x: Tensor, first: int, last: int, noise: NoiseSource) -> Tensor:
    """Take the steps ``first`` to ``last`` of a case's grid from x, (B, *event).

    Multistep methods start afresh: what they remember belongs to other paths.
    """
    walk = Walk(case.step, case.schedule, case.grid[first : last + 1])
    for n, move in enumerate(walk.moves, start=first):
        z = noise(n, move.t, move.s, x) if move.g else None
        x = walk.advance(move, x, score(x, move.t), z, score)
    return x


def denoised(case: Case, score: ScoreFunction, x: Tensor, n: int) -> Tensor:
    """Return E[x_0 | x_t = x] at the end of step n of a case's grid, (B, *event); one evaluation, none at t = 0."""
    return BackwardSDE(case.schedule, score).denoised(x, case.grid[n])
