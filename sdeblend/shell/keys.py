"""``--keys``: what a settings file may hold, table by table, from the models that check it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sdeblend.shell.console import table, width_of
from sdeblend.shell.settings import Settings, describe

Tables = Mapping[str, type[Settings]]
HEADER = ("key", "default", "takes", "meaning")


class ShowKeys(argparse.Action):
    """Print every key with its default, what it takes and what it means, and exit.

    Args:
        tables: gives a model by the heading of its table; asked for when needed, since it may import much.
    """

    def __init__(self, option_strings: Sequence[str], dest: str, *, tables: Callable[[], Tables]) -> None:
        super().__init__(option_strings, dest, nargs=0, help="list what a settings file may hold")
        self.tables = tables

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(keys_text(self.tables(), width=width_of(sys.stdout)))
        parser.exit()


def keys_text(tables: Tables, *, width: int | None = None) -> str:
    """Return what tables of a settings file may hold, as text.

    Args:
        tables: models by the heading of the table.
        width: characters that a line may have, None for as many as it needs.
    """
    parts = []
    for heading, model in tables.items():
        keys = describe(model)
        rows = [(key.name, key.default, key.kind, key.description.replace("``", "").rstrip(".")) for key in keys]
        parts.append(f"{heading}\n\n{table(HEADER, rows, left=len(HEADER), width=width, split=False)}")
    return "\n\n".join(parts)
