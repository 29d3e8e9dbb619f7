"""What installed packages offer and which versions they have: the one place that reads their metadata.

A package offers something as an entry point, a name and an object, under one of these groups; nothing is imported
before it is asked for.

    sdeblend.commands    NAME = function(argv) -> exit code: ``sdeblend NAME``
    sdeblend.backends    KIND = builder of what ``sdeblend evaluate`` samples
    sdeblend.tunables    KIND = builder of what ``sdeblend finetune`` tunes

Source: the entry points specification of the Python Packaging User Guide.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from typing import Any, Final

COMMANDS: Final = "sdeblend.commands"
BACKENDS: Final = "sdeblend.backends"
TUNABLES: Final = "sdeblend.tunables"


def offered(group: str) -> dict[str, EntryPoint]:
    """Return what is offered in a group, by name in alphabetical order, none of it imported."""
    found = {entry.name: entry for entry in entry_points(group=group)}
    return {name: found[name] for name in sorted(found)}


def load(group: str, name: str, *, what: str) -> Any:
    """Import and return what is offered under a name.

    Args:
        group: one of the groups above.
        name: in it.
        what: is chosen by the name, for messages: ``"FILE: [backend] kind"``.

    Raises:
        ValueError: if no installed package offers the name.
    """
    known = offered(group)
    if name not in known:
        raise ValueError(f"{what} must be one of {', '.join(known) or 'none (none is installed)'}, got {name!r}")
    return known[name].load()


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a folder, or not needed here
            continue
    return found
