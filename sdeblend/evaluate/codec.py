"""How results become JSON and come back: one base for all that is stored, and numbers that may not be known.

A number that is not known is nan here and null in JSON, which no strict reader refuses.
"""

from __future__ import annotations

import json
import math
from typing import Annotated, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer

from sdeblend.preference import Preference

DIGITS: Final = 9
Number = Annotated[
    float,
    BeforeValidator(lambda value: math.nan if value is None else value),
    PlainSerializer(lambda value: value if math.isfinite(value) else None),
]
StoredPreference = Annotated[
    Preference,
    BeforeValidator(lambda value: value if isinstance(value, Preference) else Preference.from_json(value)),
    PlainSerializer(Preference.to_json),
]


class Result(BaseModel):
    """Something that is stored; fields that a version does not know are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore", arbitrary_types_allowed=True)

    def written(self, indent: int | None = None, *, defaults: bool = False) -> str:
        """Return it as JSON text with a final newline.

        Args:
            indent: blanks a level; all in one line if left out.
            defaults: whether fields that have their default are written.
        """
        plain = self.model_dump(mode="json", exclude_defaults=not defaults)
        return json.dumps(plain, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"


def plain_weights(preference: Preference) -> dict[str, float]:
    """Return the weights of a preference by name, as those of an evaluation are."""
    weights: dict[str, float] = preference.to_json()["weights"]
    return weights


def rounded(value: float) -> float:
    """Return a number as it is stored: nine digits, nan if it is not finite."""
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else math.nan


def number(value: float) -> float | None:
    """Return a number as it is stored where it may be missing: nine digits, None if it is not finite."""
    return rounded(value) if math.isfinite(value) else None
