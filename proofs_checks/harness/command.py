"""Verify every statement of the theory on closed forms, on problems drawn anew.

Each run draws its problems from a seed that it prints; ``--seed`` repeats it.
"""

from __future__ import annotations

import argparse
import json
import secrets
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from proofs_checks.harness import seeds, terminal
from proofs_checks.harness.check import Outcome, Settings
from proofs_checks.harness.runner import as_json, run_checks
from proofs_checks.harness.statements import statements
from sdeblend.shell.console import progress
from sdeblend.shell.files import write_atomically


def main(argv: Sequence[str]) -> int:
    """Run ``sdeblend verify``.

    Returns:
        0 if every statement holds and every control is rejected, 1 if not.

    Raises:
        ValueError: for an unknown statement or measurement, a negative seed, or seeds that are no range.
    """
    names = ", ".join(statements())
    parser = argparse.ArgumentParser(prog="sdeblend verify", description=__doc__)
    parser.add_argument("--fast", action="store_true", help="fewer problems and samples: within a minute on two cores")
    parser.add_argument("--seed", type=int, help="draws every problem, sample and noise (default: a new one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements as JSON")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write a self-contained page with the figures")
    parser.add_argument("--only", metavar="NAME[:WORDS]", action="append", default=[],
                        help=f"one statement, and of it the measurements with these words: {names}")  # fmt: skip
    parser.add_argument("--jobs", type=int, metavar="N", help="processes at a time (default: one a core)")
    many = parser.add_argument_group("many seeds, which can be stopped and go on where they were")
    many.add_argument("--seeds", metavar="FIRST:END", help="run these seeds, END not among them")
    many.add_argument("--into", type=Path, metavar="FILE", default=Path("seeds.jsonl"), help="one line a check")
    many.add_argument("--record", type=Path, metavar="FILE", help="write how many seeds FILE has of each statement")
    arguments = parser.parse_args(argv)
    words = dict(name.partition(":")[::2] for name in arguments.only)
    if unknown := [name for name in words if name not in statements()]:
        raise ValueError(f"--only takes one of {names}, got {', '.join(unknown)}")
    if arguments.seed is not None and arguments.seed < 0:
        raise ValueError(f"--seed must be zero or a positive whole number, got {arguments.seed}")
    chosen = [name for name in statements() if not words or name in words]
    if arguments.seeds is not None:
        return _many(arguments, chosen)
    settings = Settings(secrets.randbelow(2**31) if arguments.seed is None else arguments.seed, arguments.fast)
    found: dict[str, Outcome] = {}
    with progress("checks", len(chosen), unit="statements") as bar:
        for (name, _), outcome in run_checks([(name, settings) for name in chosen], arguments.jobs):
            found[name] = _with_words(outcome, words.get(name, ""))
            bar.update(note=name)
    outcomes = {name: found[name] for name in chosen}
    passed = all(outcome.passed for outcome in outcomes.values())
    print(terminal.outcomes_text(outcomes))
    print(f"seed {settings.seed}: repeat with {terminal.repeat(settings, arguments.only)}")
    if not passed:
        print(terminal.failures_text(outcomes, settings))
    if arguments.json is not None:
        write_atomically(arguments.json, json.dumps(as_json(outcomes, settings), indent=2) + "\n")
    if arguments.report is not None:
        from proofs_checks.harness.report import render

        write_atomically(arguments.report, render(outcomes, settings, arguments.only))
        print(f"report written to {arguments.report}")
    return 0 if passed else 1


def _with_words(outcome: Outcome, words: str) -> Outcome:
    """Return the outcome with the measurements that have these words in them."""
    kept = [m for m in outcome.measurements if words in m.what]
    if outcome.measurements and not kept:
        names = "; ".join(m.what for m in outcome.measurements)
        raise ValueError(f"--only NAME:WORDS takes words of one of these measurements: {names}; got {words!r}")
    return replace(outcome, measurements=kept)


def _many(arguments: argparse.Namespace, names: Sequence[str]) -> int:
    first, _, end = arguments.seeds.partition(":")
    if not (first.isdigit() and end.isdigit() and int(first) < int(end)):
        raise ValueError(f"--seeds takes FIRST:END, two whole numbers, the second larger, got {arguments.seeds!r}")
    chosen, file = range(int(first), int(end)), arguments.into
    with progress("seeds", len(names) * len(chosen), unit="checks") as bar:
        for line in seeds.run_seeds(names, chosen, fast=arguments.fast, file=file, workers=arguments.jobs or 1):
            bar.update(note=f"{line.statement} {line.seed}")
    lines = seeds.read(file)
    print(terminal.seeds_text(lines))
    if arguments.record is not None:
        write_atomically(arguments.record, seeds.record(lines))
    return int(any(line.failed for line in lines))
