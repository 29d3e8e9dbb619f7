"""Tune a member for a reward at a known KL weight.

    sdeblend finetune CONFIG.toml [--resume]
    accelerate launch -m sdeblend.finetune CONFIG.toml [--resume]

``sdeblend.finetune.config`` says what a settings file holds, ``sdeblend.finetune.run`` what is written where.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sdeblend.shell.keys import ShowKeys, Tables


def main(argv: Sequence[str]) -> int:
    """Run ``sdeblend finetune``.

    Args:
        argv: the arguments after the command's name.

    Returns:
        the exit code, 0.

    Raises:
        ValueError: for anything in the settings file, the rewards or the checkpoint that cannot be used.
        OSError: for a file that cannot be read or written.
        FloatingPointError: for a loss that is not finite; names the iteration.
    """
    arguments = _parser().parse_args(list(argv))
    # Late: help needs no torch.
    from sdeblend.finetune.config import load_tuning
    from sdeblend.finetune.run import CHECKPOINT, run

    tuning = load_tuning(arguments.config)
    folder = tuning.output.folder
    if arguments.resume and not (folder / CHECKPOINT).exists():
        print(f"{folder} has no checkpoint yet; starting from the beginning", file=sys.stderr)
    print(run(tuning, resume=arguments.resume))
    return 0


def _forms() -> Tables:
    from sdeblend.finetune.config import forms

    return forms()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sdeblend finetune",
        description="Tune a member for a reward at a known KL weight.",
        epilog="A settings file is TOML with the tables [model], [rewards], [trainer] and [output].",
    )
    parser.add_argument("config", metavar="CONFIG.toml", type=Path, help="what to tune, for which rewards, how")
    parser.add_argument("--keys", action=ShowKeys, tables=_forms)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    return parser
