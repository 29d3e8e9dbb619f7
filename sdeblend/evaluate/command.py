"""Compare sampling methods on a grid of preferences, strengths, prompts and seeds, with error bars.

    sdeblend evaluate CONFIG.toml [--out FOLDER] [--resume] | --keys
    accelerate launch -m sdeblend.evaluate CONFIG.toml [--out FOLDER] [--resume]

CONFIG.toml is a file or the name of a bundled configuration (``sdeblend.evaluate.plan`` says what it holds). FOLDER
receives raw rows, one a sample, ``tables.md``, ``tables.tex``, ``summary.json``, figures and a manifest. Stopped at
any moment, a run loses at most the cells in progress; with --resume it continues. ``sdeblend compare`` makes tables
and figures again from stored rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sdeblend.shell.keys import ShowKeys, Tables


def main(argv: Sequence[str]) -> int:
    """Run ``sdeblend evaluate``.

    Args:
        argv: the arguments after the command's name.

    Returns:
        The exit code, 0.

    Raises:
        ValueError: for a configuration or a folder that cannot be used.
        OSError: for a file that cannot be read or written.
    """
    parser = argparse.ArgumentParser(prog="sdeblend evaluate", description=__doc__.partition("\n")[0])
    parser.add_argument("config", metavar="CONFIG", help="TOML file, or the name of a bundled configuration")
    parser.add_argument("--keys", action=ShowKeys, tables=_forms)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="results folder; default out/NAME")
    parser.add_argument("--resume", action="store_true", help="continue a run that was stopped")
    arguments = parser.parse_args(list(argv))
    # Late: help and a name that cannot be used need no torch.
    from sdeblend.evaluate.plan import find, load_plan
    from sdeblend.evaluate.report import write_report
    from sdeblend.evaluate.run import evaluate
    from sdeblend.evaluate.store import Folder
    from sdeblend.shell.processes import processes

    plan = load_plan(find(arguments.config))
    folder = Folder(arguments.out or Path("out") / Path(plan.file).stem)
    world = processes()
    try:
        notes = evaluate(plan, folder, resume=arguments.resume, world=world)
    except KeyboardInterrupt:
        print(f"{folder.path}: finished cells are stored; say --resume to continue", file=sys.stderr)
        raise
    for note in notes:
        print(note, file=sys.stderr)
    if world.main:
        for path in write_report([folder], folder.path):
            print(path)
    return 0


def _forms() -> Tables:
    from sdeblend.evaluate.plan import forms

    return forms()
