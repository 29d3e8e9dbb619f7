"""Blend rewards on a Gaussian mixture of your own, every method beside the exact target.

    sdeblend toy PROBLEM.toml [--json FILE] [--figure FILE] | --keys

``--keys`` lists what a problem file may hold, ``toy.experiment.run`` says what the result does. Files are written after
everything has succeeded, each whole or not at all.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from sdeblend.shell.console import progress, width_of
from sdeblend.shell.files import write_atomically
from sdeblend.shell.keys import ShowKeys
from toy.experiment.experiment import run
from toy.experiment.problem_file import TABLES, load_problem
from toy.experiment.table import report_table

FIGURE_FORMATS = ("png", "svg", "pdf")


def main(argv: Sequence[str]) -> int:
    """Run ``sdeblend toy``.

    Args:
        argv: The arguments after the command's name.

    Returns:
        The exit code, 0.

    Raises:
        ValueError: For anything in the problem file, or in the name of an output, that cannot be used.
        OSError: For a file that cannot be read or written.
        FloatingPointError: For a state that is no longer finite; names method, step, time and sample.
    """
    arguments = _parser().parse_args(list(argv))
    problem_file: Path = arguments.problem
    outputs: list[Path] = [path for path in (arguments.json, arguments.figure) if path is not None]
    check_outputs(problem_file, outputs)
    kind = None if arguments.figure is None else figure_format(arguments.figure)
    problem, settings = load_problem(problem_file)
    with progress("", settings.steps, unit="steps", leave=False) as bar:

        def show(method: str, done: int, steps: int) -> None:
            if done == 1:
                bar.restart(method, steps)
            bar.update()

        experiment = run(problem, settings, progress=show)
    contents: list[str | bytes] = []
    if arguments.json is not None:
        contents.append(json.dumps(experiment.report, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    if kind is not None:
        from toy import plotting

        contents.append(plotting.encoded(plotting.experiment_figure(experiment), kind))
    for path, content in zip(outputs, contents, strict=True):
        write_atomically(path, content)
    print(report_table(experiment.report, width_of(sys.stdout)))
    return 0


def check_outputs(problem_file: Path, outputs: Sequence[Path]) -> None:
    """Refuse, before anything is computed, outputs that could not be written after it.

    Args:
        problem_file: What is read, and must not be overwritten.
        outputs: The files to write.

    Raises:
        ValueError: If two of all these files are one.
        OSError: If an output is a folder, or its folder can neither be written to nor made.
    """
    seen = {problem_file.resolve()}
    for path in outputs:
        if path.resolve() in seen:
            raise ValueError(f"{path}: every file needs a name of its own, and this one is taken; choose another")
        seen.add(path.resolve())
        if path.is_dir():
            raise IsADirectoryError(f"{path}: is a folder; name a file to write")
        folder = next(parent for parent in path.resolve().parents if parent.exists())
        if not folder.is_dir():
            raise NotADirectoryError(f"{path}: {folder} is no folder; choose another place")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(f"{path}: the folder {folder} cannot be written to; choose another place")


def figure_format(path: Path) -> str:
    """Return the format that a figure's name asks for.

    Args:
        path: The figure's name.

    Raises:
        ValueError: If it ends in none of ``FIGURE_FORMATS``.
    """
    kind = path.suffix.lower().removeprefix(".")
    if kind not in FIGURE_FORMATS:
        allowed = ", ".join(f".{name}" for name in FIGURE_FORMATS)
        raise ValueError(f"{path}: a figure's name must end in one of {allowed}, got {path.name!r}; rename it")
    return kind


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sdeblend toy",
        description="Blend rewards on a Gaussian mixture, and compare every method with the exact target.",
        epilog="A problem file is TOML with the tables [base], [[rewards]] and [blend]; toy/examples has some.",
    )
    parser.add_argument("problem", metavar="PROBLEM.toml", type=Path, help="the mixture, its rewards and the blend")
    parser.add_argument("--keys", action=ShowKeys, tables=lambda: TABLES)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the numbers there")
    parser.add_argument("--figure", metavar="FILE", type=Path, help="draw there: .png, .svg or .pdf")
    return parser
