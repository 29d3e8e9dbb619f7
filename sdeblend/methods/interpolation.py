"""Blends of higher order: coefficients over more members, which still sum to one.

The exact control is a function u(lambda) of the strength with u(0) = 0, and of the preference w. DB-KLA is its
straight line through two points, DB-MPA its plane through the corners. With one more member a strength, or a pair,
the next order is exact:

    quadratic strength:  S = 2 (l - 1/2)(l - 1) S_0 - 4 l (l - 1) S_{1/2} + 2 l (l - 1/2) S_1,
    pairwise:            S = sum_i w_i S_i + sum_{i<j} 4 w_i w_j (F_ij - (S_i + S_j)/2),

S_{1/2} the member tuned at twice the KL weight, F_ij the one tuned for (r_i + r_j)/2 at the members' KL weight (which
is r_i + r_j at twice that). Inside the simplex and within [0, 1] they cut the error; beyond they need not.

Source: Lagrange interpolation; the expansion of log E[exp(lambda r)] in lambda.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Final

import torch

from sdeblend.blend import Blend
from sdeblend.methods.case import Case, Drawn, MoreMembers, NotApplicable
from sdeblend.methods.draws import Draws
from sdeblend.methods.method import Method, Sampler
from sdeblend.preference import Preference
from sdeblend.shell.settings import Settings

PAIR: Final = "+"


def quadratic_strength(strength: float) -> dict[str, float]:
    """Return the coefficients of base, half (tuned at twice the KL weight) and full member at ``strength``.

    Returns:
        "base", "half", "full" -> coefficient; they sum to one.
    """
    s = float(strength)
    return {"base": 2 * (s - 0.5) * (s - 1), "half": -4 * s * (s - 1), "full": 2 * s * (s - 0.5)}


def pairwise(weights: Mapping[str, float]) -> dict[str, float]:
    """Return the coefficients of members and pairs ("a+b") for a preference.

    Args:
        weights: w_i by reward; they must sum to one.

    Returns:
        member or pair -> coefficient; they sum to one.

    Raises:
        ValueError: weights that do not sum to one: the correction is of second order about such a preference.
    """
    total = sum(weights.values())
    if abs(total - 1) > 1e-6:
        raise ValueError(f"a pairwise correction needs weights that sum to 1, got {total:g}; rescale them")
    out = dict(weights)
    for a, b in combinations(weights, 2):
        product = 4 * weights[a] * weights[b]
        out[a + PAIR + b] = product
        out[a] -= product / 2
        out[b] -= product / 2
    return out


def _blend(role: MoreMembers) -> Sampler:
    def sample(case: Case, preference: Preference, draws: Draws, options: Settings) -> Drawn:
        weights = case.weights(preference)
        if role == "pairs":
            if abs(sum(weights.values()) - 1) > 1e-6 or preference.strength != 1:
                raise NotApplicable("it is an expansion about weights that sum to 1 at strength 1")
            named = pairwise(weights)
        else:
            shares = quadratic_strength(float(preference.strength))
            named = {f"{k}:{name}": w * shares[k] for name, w in weights.items() for k in ("half", "full")}
        found = case.higher_order(role, preference, len(draws))
        if found is None:
            raise NotApplicable(f"it needs members that are not there ({role})")
        stack, names = found
        c = torch.tensor([0.0, *[named[name] for name in names[1:]]], dtype=torch.float64)
        c[0] = 1 - c.sum()
        return case.solve(Blend(stack, c), draws)

    return sample


METHODS: Final = (
    Method(
        "quadratic", "quadratic strength", _blend("half"), "Lagrange interpolation in the strength",
        "2K - 1 model calls a step",
    ),
    Method(
        "pairwise", "pairwise DB-MPA", _blend("pairs"), "second order in the weights; exact halfway between two",
        "K(K + 1)/2 model calls a step",
    ),
)  # fmt: skip
