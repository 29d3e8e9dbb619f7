"""Search over samples: best of n, and block-wise best of n on the predicted clean sample (CoDe).

Best of n draws n samples and keeps the one of the highest reward. CoDe does so every few steps: each path is
continued n times for a block of steps, the continuations are scored by r(E[x_0 | x_t]), and the best one goes on.
Both sharpen the base by at most log n - (n - 1)/n nats a selection, whatever the KL weight: they have no alpha.
A candidate whose reward is not finite loses to any other; where all of a path are such, the first goes on.

Source: Singh et al. 2502.00968 (CoDe, algorithm 1); Stiennon et al. 2009.01325 (best of n); Beirami et al. 2401.01879
for the KL of best of n.
"""

from __future__ import annotations

from typing import Final

import torch
from pydantic import Field
from torch import Tensor

from sdeblend.methods.blocks import advance, blocks, denoised
from sdeblend.methods.case import Case, Drawn, usable
from sdeblend.methods.draws import Draws
from sdeblend.methods.method import Method
from sdeblend.preference import Preference
from sdeblend.score import restrict_rows
from sdeblend.shell.settings import Settings


class BestOfN(Settings):
    """Options of best of n.

    Attributes:
        candidates: samples that one is chosen from.
    """

    candidates: int = Field(default=20, ge=2)


class CoDe(Settings):
    """Options of CoDe; the defaults are the authors'.

    Attributes:
        candidates: continuations of a path that one is chosen from.
        block: steps between two selections.
    """

    candidates: int = Field(default=20, ge=2)
    block: int = Field(default=5, ge=1)


def _best(values: Tensor, batch: int) -> Tensor:
    """Return the place of the best candidate of each of ``batch`` seeds, long (batch,)."""
    values = usable(values).reshape(batch, -1)
    return values.argmax(1) + torch.arange(batch, device=values.device) * values.shape[1]


def _code(case: Case, preference: Preference, draws: Draws, options: CoDe) -> Drawn:
    many, rows = options.candidates, torch.arange(len(draws)).repeat_interleave(options.candidates)
    score, reward = restrict_rows(case.base(len(draws)), rows), restrict_rows(case.weighted(preference), rows)
    x, noise, calls, rewards = case.start(draws), draws.noise(many), 0, 0
    for first, last in blocks(case, options.block):
        wide = advance(case, score, x.repeat_interleave(many, 0), first, last, noise)
        x = wide[_best(reward(denoised(case, score, wide, last)), len(draws))]
        calls += many * (last - first + bool(case.grid[last]))
        rewards += many
    return Drawn(x, calls, reward_calls=rewards, paired=False)


def _best_of_n(case: Case, preference: Preference, draws: Draws, options: BestOfN) -> Drawn:
    many, steps = options.candidates, len(case.grid) - 1
    score = restrict_rows(case.base(len(draws)), torch.arange(len(draws)).repeat_interleave(many))
    wide = advance(case, score, case.start(draws, many), 0, steps, draws.noise(many))
    samples = wide[_best(case.weighted(preference)(wide), len(draws))]
    return Drawn(samples, steps * many, reward_calls=many, paired=False)


METHODS: Final = (
    Method(
        "code", "CoDe", _code, "Singh et al. 2502.00968", "N model calls a step, N reward calls a block", CoDe,
        aims=False,
    ),
    Method(
        "best-of-n", "best of n", _best_of_n, "Stiennon et al. 2009.01325", "n model calls a step, n reward calls",
        BestOfN, aims=False,
    ),
)  # fmt: skip
