"""Make tables and figures again from stored rows, without sampling.

    sdeblend compare RESULTS [RESULTS ...] [--out FOLDER]

RESULTS are folders that ``sdeblend evaluate`` wrote. Those of one configuration of the backend and the same prompts are
told together (methods that were run apart, say; one that has other options in a later folder has these in its name),
others one after the other. Files go to FOLDER, by default the first of RESULTS.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sdeblend.io import write_atomically

if TYPE_CHECKING:
    from sdeblend.evaluate.rows import Folder


def main(argv: Sequence[str]) -> int:
    """Run ``sdeblend compare``.

    Args:
        argv: the arguments after the command's name.

    Returns:
        The exit code, 0.

    Raises:
        ValueError: for a folder without results or with a damaged cell, or for folders told together that have other
            blocks of seeds.
        OSError: for a file that cannot be read or written.
    """
    parser = argparse.ArgumentParser(prog="sdeblend compare", description=__doc__.partition("\n")[0])
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS", help="folder of sdeblend evaluate")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where tables and figures go")
    arguments = parser.parse_args(list(argv))
    from sdeblend.evaluate.rows import Folder

    for path in write_report([Folder(path) for path in arguments.results], arguments.out or arguments.results[0]):
        print(path)
    return 0


def write_report(folders: Sequence[Folder], out: Path) -> list[Path]:
    """Write tables, summary and figures of stored results; return what was written.

    Args:
        folders: of results.
        out: where to write.
    """
    from sdeblend.evaluate.plotting import figures
    from sdeblend.evaluate.plotting_sheets import sheets
    from sdeblend.evaluate.summary import load, summarise
    from sdeblend.evaluate.tables import latex, markdown

    stores = load(folders)
    summaries = [summarise(stored) for stored in stores]
    one = summaries[0] if len(summaries) == 1 else summaries
    files: dict[str, str | bytes] = {
        "tables.md": "\n".join(map(markdown, summaries)),
        "tables.tex": "\n".join(map(latex, summaries)),
        "summary.json": json.dumps(one, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
    }
    for place, (stored, summary) in enumerate(zip(stores, summaries, strict=True)):
        prefix = f"{place + 1}-" if len(summaries) > 1 else ""
        drawn = figures(summary) | sheets(stored)
        files |= {f"figures/{prefix}{name}.png": content for name, content in drawn.items()}
    for name, content in files.items():
        write_atomically(out / name, content)
    return [out / name for name in files]
