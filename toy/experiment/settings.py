"""How a problem is blended and sampled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final

from pydantic import Field, field_validator

from sdeblend.methods.registry import METHODS
from sdeblend.shell.settings import OneOf
from sdeblend.steps import STEPS
from toy.tables import MAX_STEPS, Row, Solver

# Of ``sdeblend.methods``, and what is short for one of them.
USUAL: Final = ("exact", "mpa", "mpa-corrected", "ls", "ls-iid", "ls-shared")
SHORT: Final[Mapping[str, str]] = {"ls": "ls-systematic", "ls-iid": "ls-independent"}
_NAMES: Final = tuple(dict.fromkeys((*USUAL, *METHODS)))


class BlendSettings(Solver):
    """How a problem is blended and sampled.

    Attributes:
        weights: w, one a reward in their order, or by name.
        strength: lambda; 1 is the strength the members were tuned at.
        methods: what is compared; by default "exact", "mpa", "mpa-corrected", "ls", "ls-iid" and "ls-shared", those
            of them that apply.
        samples: number of samples a method.
        seed: of every random number.
    """

    weights: Row | dict[str, float]
    strength: float = 1.0
    methods: tuple[Annotated[str, OneOf(_NAMES)], ...] | None = Field(default=None, min_length=1)
    solver: Annotated[str, OneOf(STEPS)] = "euler-maruyama"
    steps: int = Field(default=200, ge=2, le=MAX_STEPS)
    samples: int = Field(default=20_000, ge=10, le=10_000_000)
    seed: int = Field(default=0, ge=0, le=2**63 - 1)

    @field_validator("methods")
    @classmethod
    def _named_once(cls, methods: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if methods is not None and len(set(methods)) < len(methods):
            raise ValueError(f"must name none twice, got {list(methods)}")
        return methods
