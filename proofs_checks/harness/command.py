"""Verify every statement of the theory on closed forms, on problems drawn anew.

Each run draws its problems from a seed that it prints; ``--seed`` repeats it.
"""

from __future__ import annotations

import argparse
import json
import secrets
from collections.abc import Sequence
from pathlib import Path

from proofs_checks.harness.check import Outcome, Settings
from sdeblend.io import write_atomically


def main(argv: Sequence[str]) -> int:
    """Run ``sdeblend verify``.

    Returns:
        0 if every statement holds and every control is rejected, 1 if not.
    """
    from tqdm import tqdm

    from proofs_checks.harness.runner import as_json, run_checks, table
    from proofs_checks.harness.statements import statements

    parser = argparse.ArgumentParser(prog="sdeblend verify", description=__doc__)
    parser.add_argument("--fast", action="store_true", help="fewer problems and samples: within a minute on two cores")
    parser.add_argument("--seed", type=int, help="draws every problem, sample and noise (default: a new one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements as JSON")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write a self-contained page with the figures")
    parser.add_argument("--only", metavar="NAME", action="append", help=f"one statement of: {', '.join(statements())}")
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.only or [] if name not in statements()]
    if unknown:
        raise ValueError(f"--only takes one of {', '.join(statements())}, got {', '.join(unknown)}")
    if arguments.seed is not None and arguments.seed < 0:
        raise ValueError(f"--seed must be zero or a positive whole number, got {arguments.seed}")
    seed = secrets.randbelow(2**31) if arguments.seed is None else arguments.seed
    settings = Settings(seed=seed, fast=arguments.fast)
    names = [name for name in statements() if not arguments.only or name in arguments.only]
    outcomes: dict[str, Outcome] = {}
    with tqdm(total=len(names), desc="checks", unit="statement") as bar:
        for name, outcome in run_checks(settings, names):
            outcomes[name] = outcome
            bar.set_postfix_str(name)
            bar.update()
    outcomes = {name: outcomes[name] for name in names}
    print(table(outcomes))
    print(f"seed {seed}: repeat with sdeblend verify --seed {seed}" + (" --fast" if settings.fast else ""))
    if arguments.json is not None:
        write_atomically(arguments.json, json.dumps(as_json(outcomes, settings), indent=2) + "\n")
    if arguments.report is not None:
        from proofs_checks.harness.report import render

        write_atomically(arguments.report, render(outcomes, settings))
        print(f"report written to {arguments.report}")
    return 0 if all(outcome.passed for outcome in outcomes.values()) else 1
