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

PAIR = "+"


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
