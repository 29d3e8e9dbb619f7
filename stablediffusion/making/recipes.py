"""What each bundled member is tuned for.

Rewards are standardised, r = sum_i w_i r_i / sd_i with sd_i the standard deviation over drawings, so that kl_weight is
in standard deviations and the same for all but one:

    compress, vivid, align   one reward each
    compress-half            compress at twice the kl_weight: half its strength
    morl-25, -50, -75        r(w) = (1 - w) compress + w vivid itself; morl-50 is also the pair of second order
                             (r_1 + r_2 at twice the kl_weight), named compress+vivid too
    control                  drawings that are not tilted; not shipped

Source: Rame et al. 2306.04488 (weights between rewards).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

KL_WEIGHT = 0.125


@dataclass(frozen=True)
class Recipe:
    """What a member is tuned for.

    Attributes:
        weights: of the standardised rewards.
        kl_weight: in standard deviations; infinity for no tilt.
        own: whether it is tuned on the base's own samples, not on drawings.
    """

    weights: Mapping[str, float]
    kl_weight: float = KL_WEIGHT
    own: bool = False


RECIPES: Mapping[str, Recipe] = {
    "compress": Recipe({"compress": 1.0}),
    "vivid": Recipe({"vivid": 1.0}),
    "morl-50": Recipe({"compress": 0.5, "vivid": 0.5}),
    "compress-half": Recipe({"compress": 1.0}, 2 * KL_WEIGHT),
    "morl-25": Recipe({"compress": 0.75, "vivid": 0.25}),
    "morl-75": Recipe({"compress": 0.25, "vivid": 0.75}),
    "align": Recipe({"align": 1.0}, own=True),
    "control": Recipe({"compress": 0.0}, float("inf")),
}

SHIPPED = tuple(name for name in RECIPES if name != "control")


def recipe_of(name: str) -> Recipe:
    """Return a recipe by its name; ``NAME@ALPHA`` is that of NAME at another kl_weight.

    Raises:
        ValueError: for another name.
    """
    known, at, alpha = name.partition("@")
    try:
        return replace(RECIPES[known], kl_weight=float(alpha)) if at else RECIPES[name]
    except (KeyError, ValueError):
        raise ValueError(f"a member must be one of {', '.join(RECIPES)}, or one of them @ALPHA, got {name!r}") from None
