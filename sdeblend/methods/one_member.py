"""One member a step, drawn with the probabilities that the coefficients are (``sdeblend.select``).

Source: Cheng et al. 2505.18547, algorithm 3 (DB-MPA-LS); Zhong et al. 2402.16843 (LoRA Switch: members in turn).
"""

from __future__ import annotations

from typing import Final

from sdeblend.methods.blends import equal_coefficients
from sdeblend.methods.case import Case, Drawn, NotApplicable
from sdeblend.methods.draws import Draws
from sdeblend.methods.method import Method, Sampler
from sdeblend.preference import Preference
from sdeblend.select import OneMemberPerStep, Selection
from sdeblend.shell.settings import Settings


def _selected(selection: Selection, *, equal: bool = False) -> Sampler:
    def sample(case: Case, preference: Preference, draws: Draws, options: Settings) -> Drawn:
        c = equal_coefficients(case, preference) if equal else preference.coefficients(case.names)
        if bool((c < 0).any()):
            raise NotApplicable("one member a step needs coefficients that are probabilities")
        score = OneMemberPerStep(
            case.stack(len(draws)), c, case.grid, len(draws), method=selection, generator=draws.generator("members")
        )
        return case.solve(score, draws)

    return sample


_SOURCE, _ONE = "Cheng et al. 2505.18547", "1 model call a step"
METHODS: Final = (
    Method(
        "ls-systematic", "DB-MPA-LS systematic", _selected("systematic"), f"{_SOURCE}, algorithm 3; Tijdeman 1980", _ONE
    ),
    Method("ls-independent", "DB-MPA-LS independent", _selected("independent"), f"{_SOURCE}, algorithm 3", _ONE),
    Method(
        "ls-shared", "DB-MPA-LS shared", _selected("shared"), f"{_SOURCE}, as its code does: one draw for the batch",
        _ONE,
    ),
    Method(
        "switch", "LoRA Switch", _selected("systematic", equal=True), "Zhong et al. 2402.16843: members in turn", _ONE,
        aims=False,
    ),
)  # fmt: skip
