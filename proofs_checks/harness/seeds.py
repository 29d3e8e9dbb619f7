"""Many seeds: how often a statement that is true fails, on problems that nobody has looked at.

One line of JSON a check in a file, so that a run can be stopped and goes on where it was; what they say together is
``seeds.json`` beside this module, which the report reads. To repeat it:
``sdeblend verify --seeds 0:200 --into benchmarks/results/seeds.jsonl --record proofs_checks/harness/seeds.json``, and
with ``--fast``; lines that are there already are not run again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass

from proofs_checks.harness.check import Outcome, Settings
from proofs_checks.harness.runner import run_checks

RECORD = Path(__file__).with_name("seeds.json")


@dataclass(frozen=True)
class Line:
    """One check of one seed.

    Attributes:
        statement: name of its module.
        seed: of its problems.
        fast: size of the run.
        seconds: that it took.
        failed: what did not pass, or passed without power; "stopped" for a check that did.
        margin: the smallest of its measurements; None if one of them is no number.
    """

    statement: str
    seed: int
    fast: bool
    seconds: float
    failed: list[str]
    margin: float | None


@dataclass(frozen=True)
class Count:
    """The seeds of one statement: fast and full runs, and those in which something failed."""

    fast: int = 0
    full: int = 0
    failed: int = 0

    def __str__(self) -> str:
        failures = f"{self.failed} with a failure" if self.failed else "no failure"
        return f"{self.full} seeds in full and {self.fast} fast, {failures}"


_LINE, _RECORD = TypeAdapter(Line), TypeAdapter(dict[str, Count])


def read(file: Path) -> list[Line]:
    """Return the lines that a file has so far."""
    return [_LINE.validate_json(line) for line in file.read_text().splitlines()] if file.exists() else []


def run_seeds(names: Sequence[str], seeds: Sequence[int], *, fast: bool, file: Path, workers: int) -> Iterator[Line]:
    """Run statements on seeds, one statement after the other, and add what is not there yet to a file."""
    done = {(line.statement, line.seed, line.fast) for line in read(file)}
    jobs = [(name, Settings(seed, fast)) for name in names for seed in seeds if (name, seed, fast) not in done]
    for (name, settings), outcome in run_checks(jobs, workers):
        line = Line(name, settings.seed, fast, round(outcome.seconds, 1), _failed(outcome), _margin(outcome))
        with file.open("a") as lines:
            lines.write(_LINE.dump_json(line).decode() + "\n")
        yield line


def _failed(outcome: Outcome) -> list[str]:
    return [m.what for m in outcome.measurements if not m.passed] if outcome.measurements else ["stopped"]


def _margin(outcome: Outcome) -> float:
    return min((m.margin for m in outcome.measurements), default=0.0)


def counts(lines: Sequence[Line]) -> dict[str, Count]:
    """Return how many seeds each statement was run on."""
    out = {}
    for name in dict.fromkeys(line.statement for line in lines):
        own = [line for line in lines if line.statement == name]
        fast = sum(line.fast for line in own)
        out[name] = Count(fast, len(own) - fast, sum(bool(line.failed) for line in own))
    return out


def recorded() -> dict[str, Count]:
    """Return what is on record."""
    return _RECORD.validate_json(RECORD.read_text())


def record(lines: Sequence[Line]) -> str:
    """Return the record of these lines, as JSON."""
    return json.dumps(_RECORD.dump_python(counts(lines), mode="json"), indent=2) + "\n"
