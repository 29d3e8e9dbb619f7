"""The table [report] of CONFIG.toml: how results are told. It may change without sampling anew.

    [report]
    reference = "mpa"                       # what the others are compared with; the first method if left out
    note = "Printed rows are at 100 steps"  # stands under the title
    resamples = 1000                        # of the bootstrap
    confidence = 0.95                       # of all intervals
    hypervolume_over = "exact"              # whose hypervolume the others' is divided by; the reference's if left out
    hypervolume_reference = [-10.0, 1.5]    # the corner; just below all points if left out
    order = ["base", "mpa", "<= exact"]     # a claim, from the lowest r(w) to the highest: checked pair by pair

In ``order`` a method that begins with "<= " may be as low as the one before it: the pair holds unless its difference is
significantly below zero, where a plain pair holds only if it is significantly above.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from sdeblend.config import Spec, check_keys

AT_MOST: Final = "<= "
_REPORT: Spec = {
    "reference": (str, ""),
    "note": (str, ""),
    "resamples": (int, 1000),
    "confidence": (float, 0.95),
    "hypervolume_reference": (list[float], []),
    "hypervolume_over": (str, ""),
    "order": (list[str], []),
}


def report_settings(table: Mapping[str, Any], methods: Sequence[str], file: str) -> dict[str, Any]:
    """Return the checked table, defaults filled in.

    Args:
        table: as read.
        methods: of the grid.
        file: it came from, for messages.

    Raises:
        ValueError: for what cannot be used.
    """
    report, known = check_keys(table, _REPORT, file=file, section="[report]"), ", ".join(methods)
    report["reference"] = report["reference"] or methods[0]
    if report["reference"] not in methods:
        raise ValueError(f"{file}: [report] reference must be one of {known}, got {report['reference']!r}")
    if report["hypervolume_over"] not in ("", *methods):
        raise ValueError(
            f"{file}: [report] hypervolume_over must be one of {known}, got {report['hypervolume_over']!r}"
        )
    order = report["order"]
    names = [entry.removeprefix(AT_MOST) for entry in order]
    if not set(names) <= set(methods) or len(set(names)) < len(names) or len(names) == 1 or order[:1] != names[:1]:
        raise ValueError(
            f"{file}: [report] order must name two or more of {known}, each once, with {AT_MOST!r} before one that may "
            f"equal the last, got {order}"
        )
    if not 0.5 <= report["confidence"] < 1 or report["resamples"] < 100:
        raise ValueError(
            f"{file}: [report] needs confidence in [0.5, 1) and at least 100 resamples, got "
            f"{report['confidence']:g} and {report['resamples']}"
        )
    return report


def claimed_pairs(order: Sequence[str], there: Collection[str]) -> list[tuple[str, str, bool]]:
    """Return the neighbours (low, high, strict) of a claimed order among the methods that are there.

    Args:
        order: as in ``[report]``.
        there: methods with results; a pair across one that is not is strict if a step of it is.
    """
    pairs: list[tuple[str, str, bool]] = []
    low, strict = "", False
    for entry in order:
        name = entry.removeprefix(AT_MOST)
        strict |= name == entry
        if name in there:
            pairs += [(low, name, strict)] if low else []
            low, strict = name, False
    return pairs
