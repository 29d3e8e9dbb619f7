"""Make tables and figures again from stored rows, without sampling.

    sdeblend compare RESULTS [RESULTS ...] [--out FOLDER]

RESULTS are folders that ``sdeblend evaluate`` wrote. Those of one configuration of the backend and the same prompts are
put together (methods that were run apart, say; one that has other options in a later folder has these in its name),
others one after the other. Of a folder that holds a summary.json and no rows, the tables and figures of the summary
are made again. Files go to FOLDER, by default the first of RESULTS.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> int:
    """Run ``sdeblend compare``.

    Args:
        argv: the arguments after the command's name.

    Returns:
        The exit code, 0.

    Raises:
        ValueError: for a folder without results or with a damaged cell, or for folders put together that have other
            blocks of seeds.
        OSError: for a file that cannot be read or written.
    """
    parser = argparse.ArgumentParser(prog="sdeblend compare", description=__doc__.partition("\n")[0])
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS", help="folder of sdeblend evaluate")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where tables and figures go")
    arguments = parser.parse_args(list(argv))
    # Late: help needs no torch.
    from sdeblend.evaluate.report import write_report
    from sdeblend.evaluate.store import Folder

    for path in write_report([Folder(path) for path in arguments.results], arguments.out or arguments.results[0]):
        print(path)
    return 0
