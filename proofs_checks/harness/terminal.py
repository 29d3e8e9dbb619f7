"""What a run says on a terminal: a table of measurements, what did not pass and how to see it alone."""

from __future__ import annotations

import math
import shlex
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence

from proofs_checks.harness.check import Measurement, Outcome, Settings
from proofs_checks.harness.seeds import Count, Line, counts, recorded
from proofs_checks.harness.statements import statement
from sdeblend.shell.console import table, width_of

WIDTH = 100
# Of the column that says in words what was measured.
WORDS = 54


def number(value: float) -> str:
    """Return a number in three figures."""
    return f"{value:.3g}" if math.isfinite(value) else str(value)


def outcomes_text(outcomes: Mapping[str, Outcome]) -> str:
    """Return the table of a run: statement, what was measured, bound, margin, control and verdict."""
    parts = []
    for name, outcome in outcomes.items():
        rows = [row for m in outcome.measurements for row in _rows(m)]
        parts.append(f"{statement(name).TITLE}  ({outcome.seconds:.1f} s)")
        if rows:
            shown = table(("", "measured", "value", "bound", "margin"), rows, left=2, width=width_of(sys.stdout))
            parts.append(textwrap.indent(shown, "  "))
        parts += [textwrap.fill(finding, WIDTH, initial_indent="    ", subsequent_indent="    ")
                  if "\n" not in finding else finding for finding in outcome.findings]  # fmt: skip
    return "\n".join([*parts, "", " ".join(summary(outcomes))])


def summary(outcomes: Mapping[str, Outcome]) -> tuple[str, str]:
    """Return how many statements hold, and how many measurements and controls did what they must."""
    rows = [m for outcome in outcomes.values() for m in outcome.measurements]
    within, rejected = sum(m.holds for m in rows), sum(m.control_rejected for m in rows)
    return (
        f"{sum(outcome.passed for outcome in outcomes.values())} of {len(outcomes)} statements hold:",
        f"{within} of {len(rows)} measurements within their bounds, {rejected} of {len(rows)} controls rejected",
    )


def _rows(m: Measurement) -> Iterator[tuple[str, ...]]:
    verdict = "pass" if m.passed else ("NO POWER" if m.holds else "FAIL")
    what, control = textwrap.fill(m.what, WORDS), textwrap.fill(f"broken: {m.control}", WORDS, subsequent_indent="  ")
    yield verdict, what, number(m.value), f"{m.relation} {number(m.bound)}", number(m.margin)
    yield "", control, number(m.control_value), "rejected" if m.control_rejected else "NOT rejected"


def repeat(settings: Settings, only: Sequence[str] = ()) -> str:
    """Return the command that does a run again."""
    chosen = "".join(f" --only {shlex.quote(name)}" for name in only)
    return f"sdeblend verify --seed {settings.seed}{' --fast' if settings.fast else ''}{chosen}"


def failures_text(outcomes: Mapping[str, Outcome], settings: Settings) -> str:
    """Return, for a run in which something did not pass, what that may be and how to see each measurement alone."""
    lines = []
    for name, outcome in outcomes.items():
        if not outcome.passed:
            before = recorded().get(name, Count())
            lines.append(
                f"\nThis may be a finding: {statement(name).TITLE!r} did not pass on the problems of seed "
                f"{settings.seed}; before it was run on {before}. To see alone what did not pass:"
            )
            lines += [repeat(settings, [f"{name}:{m.what}"]) for m in outcome.measurements if not m.passed] or [
                repeat(settings, [name])
            ]
    return "\n".join(textwrap.fill(line, WIDTH) if line.startswith("\n") else "  " + line for line in lines)


def seeds_text(lines: Sequence[Line]) -> str:
    """Return the table of a run over many seeds, and what failed in it."""
    rows = []
    for name, count in counts(lines).items():
        margins = [line.margin for line in lines if line.statement == name and line.margin is not None]
        rows.append((name, str(count.fast), str(count.full), str(count.failed), number(min(margins, default=math.nan))))
    failed = []
    for line in lines:
        failed += [f"  {what}: {repeat(Settings(line.seed, line.fast), [line.statement])}" for what in line.failed]
    return "\n".join([table(("statement", "seeds, fast", "in full", "failed", "smallest margin"), rows), *failed])
