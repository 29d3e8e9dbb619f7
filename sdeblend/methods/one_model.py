"""Methods that sample one model: the base, the model tuned for r(w) itself, and soups, which average weights.

Source: Rame et al. 2306.04488 (rewarded soups, MORL); Hu et al. 2106.09685 (the factors of LoRA).
"""

from __future__ import annotations

from typing import Final

from sdeblend.methods.case import Case, Drawn, NotApplicable, OneModel
from sdeblend.methods.draws import Draws
from sdeblend.methods.method import Method, Sampler
from sdeblend.preference import Preference
from sdeblend.shell.settings import Settings


def _base(case: Case, preference: Preference, draws: Draws, options: Settings) -> Drawn:
    return case.solve(case.base(len(draws)), draws)


def _tuned(role: OneModel, missing: str) -> Sampler:
    def sample(case: Case, preference: Preference, draws: Draws, options: Settings) -> Drawn:
        score = case.score(role, preference, len(draws))
        if score is None:
            raise NotApplicable(missing)
        return case.solve(score, draws)

    return sample


_ONE, _NO_SOUP = "1 model call a step", "it needs members that are networks"
METHODS: Final = (
    Method("base", "base", _base, "-", _ONE, aims=False),
    Method(
        "exact", "MORL (tuned for r(w))", _tuned("exact", "there is no model tuned for this preference"),
        "Rame et al. 2306.04488, MORL; on mixtures the closed form", "1 model call a step, one training a preference",
    ),
    Method(
        "soup", "rewarded soup", _tuned("soup-deltas", _NO_SOUP),
        "Rame et al. 2306.04488, mean of the differences", _ONE,
    ),
    Method(
        "soup-factors", "soup of factors", _tuned("soup-factors", _NO_SOUP),
        "mean of LoRA factors, as DB's code does", _ONE,
    ),
)  # fmt: skip
