"""Every method, by name. A new one is a file with its ``METHODS``, and its name in the line below."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from sdeblend.methods import blends, guidance, interpolation, moves, one_member, one_model, search, steering, union
from sdeblend.methods.method import Method

_FAMILIES = (one_model, blends, one_member, moves, interpolation, union, search, guidance, steering)
METHODS: Final[Mapping[str, Method]] = {method.name: method for family in _FAMILIES for method in family.METHODS}


def method_of(name: str) -> Method | None:
    """Return the method that results go by this name of, options in brackets left out; None if there is none now."""
    return METHODS.get(name.partition(" (")[0])


def label(name: str) -> str:
    """Return what people call a method, by the name that its results go by."""
    method = method_of(name)
    return name if method is None else method.label + name.removeprefix(method.name)
