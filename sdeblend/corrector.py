"""Correctors: Langevin moves at one noise level, between the steps of a solver.

The blend's score S = sum_i c_i S_i is the score of q_t ~ prod_i p_{i,t}^{c_i} exactly: there is no Jensen gap, which
lies between q_t and the noised target. So at fixed t

    x' = x + d S_t(x) + sqrt(2 d) z,      d = kappa sigma_t^2,

leaves q_t invariant up to O(kappa), and a run that follows each step by such moves stays nearer to it. An invariant
move has weight one: certificate and correction of a run are computed as without moves (``sdeblend.correct``), and then
are those of the run with moves, up to O(kappa). Moves do not carry mass between modes that have parted; the weights do.
Re-noising ("restart") is no substitute: noise added to q_s does not give q_t.

One member i a move, drawn with probability c_i (``sdeblend.select``), moves as the blend on average and costs one
evaluation.

Source: Song et al. 2011.13456 (predictor and corrector); Welling and Teh 2011 (one member a move).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from sdeblend.blend import Blend
from sdeblend.noise import Noise, NoiseSource, generator_beside
from sdeblend.schedule import NoiseSchedule
from sdeblend.score import ScoreFunction, restrict_rows
from sdeblend.select import OneMemberPerStep, check_probabilities, member_scores, select_members

MoveMembers = Literal["all", "one"]


@dataclass(frozen=True)
class Corrector:
    """Langevin moves after the steps of a solver.

    Args:
        moves: how many after each step; or one number a step (n,), as ``place_moves`` makes them.
        step_size: kappa, within (0, 1]: d in units of sigma_t^2. The bias of a move is proportional to it.
        within: (low, high), times at which there are moves; None: all. At t = 0 there are none.
        members: "all" moves by the blend; "one" by a single member each, drawn systematically for each sample.
        generator: draws these members and nothing else; by default one derived from the run's own generator.

    Raises:
        ValueError: a value outside its range.
    """

    moves: int | Sequence[int] = 1
    step_size: float = 0.2
    within: tuple[float, float] | None = None
    members: MoveMembers = "all"
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if any(isinstance(k, bool) or not isinstance(k, int) or k < 0 for k in self.each):
            raise ValueError(f"moves must be whole numbers of at least 0, got {self.moves!r}; 1 a step is usual")
        if not 0 < self.step_size <= 1:
            raise ValueError(f"the step_size of a corrector must lie within (0, 1], got {self.step_size}; .2 is usual")
        if self.within is not None and not 0 <= self.within[0] < self.within[1]:
            raise ValueError(f"within must be (low, high), times with 0 <= low < high, got {self.within}")
        if self.members not in get_args(MoveMembers):
            raise ValueError(f"members must be one of {', '.join(get_args(MoveMembers))}, got {self.members!r}")

    @property
    def each(self) -> tuple[int, ...]:
        """The numbers given: one for all steps, or one a step."""
        return tuple(self.moves) if isinstance(self.moves, Sequence) else (self.moves,)

    def plan(self, grid: Tensor) -> list[int]:
        """Return how many moves follow each step of a grid (n + 1,); after a step to t = 0 none.

        Raises:
            ValueError: one number a step for another number of steps.
        """
        steps, given = len(grid) - 1, self.each
        if len(given) != (steps if isinstance(self.moves, Sequence) else 1):
            raise ValueError(f"moves by step need one number for each of {steps} steps, got {len(given)}")
        low, high = self.within or (0.0, math.inf)
        counts = given if len(given) == steps else given * steps
        return [k if s > 0 and low <= s <= high else 0 for k, s in zip(counts, grid[1:].tolist(), strict=True)]


def place_moves(profile: Tensor | Sequence[float], budget: int) -> tuple[int, ...]:
    """Return how many moves should follow each step so that they are in proportion to a profile.

    Args:
        profile: what each step adds to the certificate, (n,), of a pilot run; all ones for moves spread evenly.
        budget: how many moves in all.

    Returns:
        n counts that add up to ``budget``, each within one of its exact share.

    Raises:
        ValueError: a profile that is empty, negative or zero everywhere, or a negative budget.
    """
    share = torch.as_tensor(profile, dtype=torch.float64)
    if share.ndim != 1 or not bool(((share >= 0) & share.isfinite()).all()) or not bool((share > 0).any()):
        raise ValueError("a profile must be numbers of at least 0, one a step and not all 0, got none such")
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 0:
        raise ValueError(f"a budget of moves must be a whole number of at least 0, got {budget!r}")
    edges = (share.cumsum(0) / share.sum() * budget + 0.5).floor()
    return tuple(int(k) for k in edges.diff(prepend=edges.new_zeros(1)))


class Moves:
    """The moves of one run.

    Args:
        corrector: which.
        score: of the run.
        schedule: the forward process.
        grid: times of the run (n + 1,).
        noise: of the run.
        source: draws it; the moves ask for the steps n, n + 1, ... after the solver's own.
        batch: number of samples B.

    Attributes:
        counts: how many follow each step.
        cost: member evaluations a sample of one move.

    Raises:
        ValueError: one member a move for a score that has no members to draw.
    """

    def __init__(
        self, corrector: Corrector, score: ScoreFunction, schedule: NoiseSchedule, grid: Tensor, noise: Noise,
        source: NoiseSource, batch: int,
    ) -> None:  # fmt: skip
        self.counts = corrector.plan(grid)
        self._corrector, self._schedule, self._source, self._done = corrector, schedule, source, 0
        self._steps, self._members = len(grid) - 1, None
        self._score = Blend(score.stack, score.probabilities) if isinstance(score, OneMemberPerStep) else score
        self.cost = 1
        if corrector.members == "one":
            if not isinstance(self._score, Blend) or not self._score.constant:
                raise ValueError(
                    "one member a move needs a Blend with constant coefficients or a OneMemberPerStep, got "
                    f"{'time-dependent ones' if isinstance(score, Blend) else type(score).__name__}; use members='all'"
                )
            probabilities = check_probabilities(self._score.coefficients, len(self._score.stack))
            generator = corrector.generator or generator_beside(noise, 2, "Corrector(members='one', generator=...)")
            self._members = select_members(probabilities, sum(self.counts), batch, "systematic", generator)

    def select(self, rows: Tensor, source: NoiseSource) -> None:
        """Go on with the places ``rows`` (long) of the batch only, on their own noise."""
        self._source, self._score = source, restrict_rows(self._score, rows)
        self._members = None if self._members is None else self._members[:, rows.cpu()]

    def after(self, step: int, x: Tensor, t: Tensor) -> Tensor:
        """Take the moves that follow a step.

        Args:
            step: which, from 0.
            x: state at its end (B, *event).
            t: the time it ends at, 0-dim float64.
        """
        for _ in range(self.counts[step]):
            x = self._move(x, t)
            self._done += 1
        return x

    def _move(self, x: Tensor, t: Tensor) -> Tensor:
        if self._members is None:
            evaluation = self._score.evaluate(x, t) if isinstance(self._score, Blend) else None
            score = self._score(x, t) if evaluation is None else evaluation.score
            self.cost = 1 if evaluation is None else len(evaluation.active)
        else:
            assert isinstance(self._score, Blend)  # checked at construction
            score = member_scores(self._score.stack, x, t, self._members[self._done].to(x.device))
        d = self._corrector.step_size * float(self._schedule.sigma(t).square())
        z = self._source(self._steps + self._done, t, t, x)
        return (x + d * score).add_(z, alpha=math.sqrt(2 * d))
