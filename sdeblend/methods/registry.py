"""Every method, by name. A new one is a file with its ``METHODS``, and its name in the line below."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from sdeblend.methods import blends, guidance, interpolation, one_member, one_model, search, steering, union
from sdeblend.methods.method import Method

_FAMILIES = (one_model, blends, one_member, interpolation, union, search, guidance, steering)
METHODS: Final[Mapping[str, Method]] = {method.name: method for family in _FAMILIES for method in family.METHODS}
