"""DB-MPA and one member a step with Langevin moves between the steps (``sdeblend.corrector``), alone and corrected.

A fixed budget, ``moves`` times the steps, is spread evenly, or placed where a pilot run's certificate accrues. The
pilot is paid for: its evaluations are counted among those of the samples.

Source: Song et al. 2011.13456 (predictor and corrector); Cheng et al. 2505.18547 for what is moved.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final, Literal

import torch
from pydantic import Field

from sdeblend.blend import Blend
from sdeblend.correct import Correction
from sdeblend.corrector import Corrector, MoveMembers, place_moves
from sdeblend.methods.blends import Resampling
from sdeblend.methods.case import Case, Drawn, NotApplicable
from sdeblend.methods.draws import Draws
from sdeblend.methods.method import Method
from sdeblend.preference import Preference
from sdeblend.select import OneMemberPerStep
from sdeblend.shell.settings import Settings


class Moving(Settings):
    """Options of moves.

    Attributes:
        moves: after each step, on average.
        step_size: kappa, the size of a move in units of the noise variance; its bias is proportional to it.
        placing: of the moves among the steps: "uniform", or "pilot" for where the certificate of a pilot run accrues.
        pilot: how many samples the pilot run has.
    """

    moves: int = Field(default=1, ge=0)
    step_size: float = Field(default=0.2, gt=0, le=1)
    placing: Literal["uniform", "pilot"] = "uniform"
    pilot: int = Field(default=32, ge=1)


class CorrectedMoving(Moving, Resampling):
    """Options of moves and of the correction."""


def _corrector(
    case: Case, preference: Preference, draws: Draws, options: Moving, members: MoveMembers
) -> tuple[Corrector, float]:
    """Return the moves, and what finding their places costs, evaluations a sample."""
    counts, cost = [options.moves] * (len(case.grid) - 1), 0.0
    if options.placing == "pilot":
        if not case.step.stochastic:
            raise NotApplicable("a pilot's certificate needs a solver with noise")
        few = Draws(draws.seed, draws.prompt, draws.seeds[: options.pilot])
        blend = Blend(case.stack(len(few)), preference.coefficients(case.names))
        run = case.solve(blend, few, Correction("certify"))
        assert run.solution is not None and run.solution.certificate is not None  # it was certified
        # A move after a step is for the step that follows, and after one to t = 0 there is none.
        profile, levels = run.solution.certificate.profile.clamp_min(0), int((case.grid[1:] > 0).sum())
        ahead = torch.cat([profile[1:], profile.new_zeros(1)])[:levels] + 1e-12
        counts = [*place_moves(ahead, options.moves * levels), *[0] * (len(profile) - levels)]
        cost = run.model_calls * len(few) / len(draws)
    return Corrector(counts, options.step_size, members=members, generator=draws.generator("moves")), cost


def _mpa(case: Case, preference: Preference, draws: Draws, options: Moving) -> Drawn:
    corrector, cost = _corrector(case, preference, draws, options, "all")
    blend = Blend(case.stack(len(draws)), preference.coefficients(case.names))
    drawn = case.solve(blend, draws, Correction("certify") if case.step.stochastic else None, corrector)
    return replace(drawn, model_calls=drawn.model_calls + cost, log_weights=None)


def _corrected(case: Case, preference: Preference, draws: Draws, options: CorrectedMoving) -> Drawn:
    if not case.step.stochastic:
        raise NotApplicable("a correction needs a solver with noise")
    corrector, cost = _corrector(case, preference, draws, options, "all")
    correct = Correction(
        "resample", generator=draws.generator("ancestors"), threshold=options.threshold, tempering=options.tempering
    )
    drawn = case.solve(Blend(case.stack(len(draws)), preference.coefficients(case.names)), draws, correct, corrector)
    return replace(drawn, model_calls=drawn.model_calls + cost)


def _one_member(case: Case, preference: Preference, draws: Draws, options: Moving) -> Drawn:
    c = preference.coefficients(case.names)
    if bool((c < 0).any()):
        raise NotApplicable("one member a step needs coefficients that are probabilities")
    corrector, cost = _corrector(case, preference, draws, options, "one")
    score = OneMemberPerStep(case.stack(len(draws)), c, case.grid, len(draws), generator=draws.generator("members"))
    drawn = case.solve(score, draws, corrector=corrector)
    return replace(drawn, model_calls=drawn.model_calls + cost)


_SOURCE = "Langevin moves between steps: Song et al. 2011.13456"
METHODS: Final = (
    Method("mpa-moves", "DB-MPA with moves", _mpa, _SOURCE, "K model calls a step, and K a move", Moving),
    Method(
        "mpa-corrected-moves", "DB-MPA corrected, with moves", _corrected, f"{_SOURCE}; Skreta et al. 2503.02819",
        "K model calls a step, and K a move", CorrectedMoving,
    ),
    Method(
        "ls-moves", "DB-MPA-LS with moves", _one_member, f"{_SOURCE}, one member each; Cheng et al. 2505.18547",
        "1 model call a step, and 1 a move", Moving,
    ),
)  # fmt: skip
