"""Blends of all members at every step: DB-MPA and DB-KLA, corrected, reweighted, alike, or changing over time.

Source: Cheng et al. 2505.18547 (Diffusion Blend); Skreta et al. 2503.02819 (Feynman-Kac correction); Zhong et al.
2402.16843 (LoRA Composite, which is DB-MPA with equal weights).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import torch
from pydantic import Field
from torch import Tensor

from sdeblend.blend import Blend
from sdeblend.correct import Correction, CorrectionMode
from sdeblend.methods.case import Case, Drawn, NotApplicable
from sdeblend.methods.draws import Draws
from sdeblend.methods.method import Method, Sampler
from sdeblend.preference import Preference
from sdeblend.shell.settings import Settings


class Resampling(Settings):
    """Options of the correction.

    Attributes:
        threshold: effective share of the samples below which they are redrawn.
        tempering: exponent of the weights that steer it; 1 corrects in full.
    """

    threshold: float = Field(default=0.5, gt=0, le=1)
    tempering: float = Field(default=1.0, gt=0, le=1)


def equal_coefficients(case: Case, preference: Preference) -> Tensor:
    """Return equal coefficients of the members that have a weight, and none of the base, float64 (1 + m,)."""
    used = torch.tensor([0.0, *[float(w != 0) for w in case.weights(preference).values()]], dtype=torch.float64)
    if not bool(used.any()):
        raise NotApplicable("it needs a member with a weight other than 0")
    return used / used.sum()


def _blend(mode: CorrectionMode, *, weighted: bool = False) -> Sampler:
    def sample(case: Case, preference: Preference, draws: Draws, options: Settings) -> Drawn:
        correct = None
        if case.step.stochastic:
            correct = Correction(mode, generator=draws.generator("ancestors"), **dict(options))
        elif weighted:
            raise NotApplicable("a correction needs a solver with noise")
        drawn = case.solve(Blend(case.stack(len(draws)), preference.coefficients(case.names)), draws, correct)
        return drawn if weighted else replace(drawn, log_weights=None)

    return sample


def _kla(case: Case, preference: Preference, draws: Draws, options: Settings) -> Drawn:
    if sum(w != 0 for w in case.weights(preference).values()) != 1:
        raise NotApplicable("it blends the base with one member; see DB-MPA for more")
    return _blend("certify")(case, preference, draws, options)


def _composite(case: Case, preference: Preference, draws: Draws, options: Settings) -> Drawn:
    return case.solve(Blend(case.stack(len(draws)), equal_coefficients(case, preference)), draws)


def _over_time(case: Case, preference: Preference, draws: Draws, options: Settings) -> Drawn:
    """Equal weights in noise, the preference in data, and the share of noise in the variance between them."""
    first, last = float(preference.strength) * equal_coefficients(case, preference), preference.coefficients(case.names)

    def rule(t: Tensor) -> Tensor:
        share = torch.sigmoid(-case.schedule.log_snr(t)).item()
        members = share * first[1:] + (1 - share) * last[1:]
        return torch.cat([1 - members.sum(0, keepdim=True), members])

    return case.solve(Blend(case.stack(len(draws)), rule), draws)


_SOURCE, _ALL = "Cheng et al. 2505.18547", "K model calls a step"
METHODS: Final = (
    Method("mpa", "DB-MPA", _blend("certify"), f"{_SOURCE}, algorithm 1", _ALL),
    Method(
        "mpa-corrected", "DB-MPA corrected", _blend("resample", weighted=True),
        "Feynman-Kac correction: Skreta et al. 2503.02819", _ALL, Resampling,
    ),
    Method(
        "mpa-reweighted", "DB-MPA reweighted", _blend("certify", weighted=True),
        "importance weights of the same correction", _ALL,
    ),
    Method("kla", "DB-KLA", _kla, f"{_SOURCE}, algorithm 2", "2 model calls a step"),
    Method(
        "over-time", "weights over time", _over_time, "weights equal in noise, as asked in data", _ALL, aims=False
    ),
    Method(
        "composite", "LoRA Composite", _composite, "Zhong et al. 2402.16843: members alike, whatever the weights",
        _ALL, aims=False,
    ),
)  # fmt: skip
