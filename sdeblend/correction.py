"""How the weights of a run are used: kept, or followed by resampling, and down to which noise level.

Source: Kitagawa 1996 and Douc, Cappe and Moulines 2005 (systematic resampling).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

CorrectionMode = Literal["certify", "resample"]


@dataclass(frozen=True)
class Correction:
    """How the weights of a run are used.

    Args:
        mode: "certify" keeps them and leaves the samples alone; "resample" corrects on the way.
        threshold: resample a group when its effective sample size falls below this fraction, within (0, 1].
        tempering: exponent of the weights that steer resampling, within (0, 1]; below 1 the correction is partial.
        active: (low, high), times between which weights steer resampling; others are left out. None: all.
        generator: draws the ancestors and nothing else; needed to resample.
        groups: which samples are particles of one problem, long (B,); None: all.
        down_to: noise level sigma / alpha; weights are gathered by the steps that end at it or above. Certificate and
            correction then belong to the members' product at that level, finished by the blend. 0: to the end.
        keep: how many samples of each group are returned, of the more that the run begins with: a funnel. Resampling
            narrows the group to its effective sample size as the weights fall apart, and at the last weights (at
            ``down_to``) to ``keep``. None: all of them.

    Raises:
        ValueError: a value outside its range.
    """

    mode: CorrectionMode = "certify"
    threshold: float = 0.5
    tempering: float = 1.0
    active: tuple[float, float] | None = None
    generator: torch.Generator | None = None
    groups: Tensor | None = None
    down_to: float = 0.0
    keep: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in get_args(CorrectionMode):
            raise ValueError(f"a correction must be one of {', '.join(get_args(CorrectionMode))}, got {self.mode!r}")
        for name in ("threshold", "tempering"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise ValueError(f"the {name} of a correction must lie within (0, 1], got {value}; 1 is the full one")
        if self.active is not None and not 0 <= self.active[0] < self.active[1]:
            raise ValueError(f"the active interval must be (low, high) with 0 <= low < high, got {self.active}")
        if not 0 <= self.down_to < math.inf:
            raise ValueError(f"down_to must be a noise level sigma / alpha of at least 0, got {self.down_to}")
        if self.keep is not None and (self.mode != "resample" or isinstance(self.keep, bool) or self.keep < 1):
            raise ValueError(
                f"keep must be a number of samples of at least 1, with mode 'resample', got {self.keep!r} with "
                f"{self.mode!r}; leave it out to keep all"
            )

    @property
    def exact(self) -> bool:
        """Whether the weights that steer are the full ones, down to their level."""
        return self.tempering == 1 and self.active is None

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the result must know: one sentence for each way in which the correction is partial."""
        notes = []
        if self.mode == "resample" and self.tempering != 1:
            notes.append(f"the weights were tempered by {self.tempering:g}: the correction is partial")
        if self.mode == "resample" and self.active is not None:
            low, high = self.active
            notes.append(f"weights steered only for t in [{low:g}, {high:g}]: the correction is partial")
        if self.down_to:
            notes.append(
                f"weights were gathered down to noise level {self.down_to:g}: certificate and correction belong to the "
                "members' product there, finished by the blend"
            )
        return tuple(notes)

    def most_evaluations(
        self, start: int, levels: Sequence[float], members: int = 1, moves: Sequence[int] | None = None
    ) -> float:
        """Return how many member evaluations a run takes at most, for each sample that it returns.

        A funnel that is narrowed earlier, as its weights fall apart, takes fewer.

        Args:
            start: how many samples a group begins with.
            levels: sigma / alpha at the end of each step.
            members: how many are evaluated a step.
            moves: how many moves of a corrector by all members follow each step; none if left out.
        """
        keep, wide = self.keep or start, self.last_step(levels)
        cost = [members * (1 + k) for k in (moves or [0] * len(levels))]
        inner = 0 if moves is None else members * moves[wide - 1]  # the moves after narrowing are of those kept
        return ((sum(cost[:wide]) - inner) * start + (sum(cost[wide:]) + inner) * keep) / keep

    def last_step(self, levels: Sequence[float]) -> int:
        """Return the step of the last weights, or the one before the last of all: where a funnel ends."""
        held = sum(level >= self.down_to * (1 - 1e-9) for level in levels)
        return max(min(held, len(levels) - 1), 1)

    def steers_at(self, t: float) -> bool:
        """Return whether weights gathered at time t steer resampling."""
        return self.active is None or self.active[0] <= t <= self.active[1]


def systematic_resample(log_weights: Tensor, generator: torch.Generator, count: int | None = None) -> Tensor:
    """Draw ancestors with one uniform number: sample i has floor or ceil of count W_i / sum W descendants.

    Args:
        log_weights: (B,).
        generator: on the CPU.
        count: how many; B if left out.

    Returns:
        ancestors, long (count,), sorted.

    Raises:
        ValueError: weights that are NaN or all zero.

    Source: Kitagawa 1996; Douc, Cappe and Moulines 2005.
    """
    log = log_weights.detach().double().cpu()
    if bool(log.isnan().any()) or not bool((log > -math.inf).any()):
        raise ValueError("resampling needs weights that are numbers and not all zero; use fewer or closer members")
    edges = log.softmax(0).cumsum(0)
    edges[-1] = 1.0
    count = len(log) if count is None else count
    offset = torch.rand(1, generator=generator, dtype=torch.float64)
    points = (torch.arange(count, dtype=torch.float64) + offset) / count
    return torch.searchsorted(edges, points).clamp(max=len(log) - 1).to(log_weights.device)
