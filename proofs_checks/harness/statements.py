"""The statements: every module of the folder above, in the order of the paper and then of what goes beyond it."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Protocol, cast

import proofs_checks
from proofs_checks.harness.check import Figure, Outcome, Settings


class Statement(Protocol):
    """What a statement's module has in it; ``recorded()`` beside it for a table that the run did not measure.

    Attributes:
        PLACE: its place in the report: 10, 20, ...; a new one goes between two others.
        TITLE: one line.
        WORDS: what it says, for readers without the theory.
        FORMULA: the same in mathtext, one line or several.
        FALSIFIED_BY: which numbers would have shown it wrong.
    """

    PLACE: int
    TITLE: str
    WORDS: str
    FORMULA: str
    FALSIFIED_BY: str

    def check(self, settings: Settings) -> Outcome:
        """Compute both sides; picklable numbers only, so that checks run in processes of their own."""

    def figure(self, outcome: Outcome) -> Figure:
        """Draw the outcome's data, where the figure is shown."""


@cache
def statements() -> dict[str, Statement]:
    """Return every statement by the name of its module, in order."""
    names = [m.name for m in iter_modules(proofs_checks.__path__) if not m.ispkg and not m.name.startswith("_")]
    found = {name: cast(Statement, import_module(f"proofs_checks.{name}")) for name in names}
    return dict(sorted(found.items(), key=lambda pair: pair[1].PLACE))


def statement(name: str) -> Statement:
    """Return one statement; the others are not imported."""
    return cast(Statement, import_module(f"proofs_checks.{name}"))
