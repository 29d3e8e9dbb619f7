"""The files of a report: tables, summary and figures of stored results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from sdeblend.evaluate.results import Summary
from sdeblend.evaluate.store import Folder, load
from sdeblend.evaluate.summary import summarise
from sdeblend.evaluate.tables import latex, markdown
from sdeblend.shell.files import write_atomically

SUMMARY = "summary.json"


def write_report(folders: Sequence[Folder], out: Path) -> list[Path]:
    """Write tables, summary and figures of stored results; return what was written.

    Args:
        folders: of results.
        out: where to write.

    Raises:
        ValueError: for what cannot be compared, see ``store.load``.
    """
    # Late: without figures nothing needs matplotlib.
    from sdeblend.evaluate.figures import figures, sheets

    bare = [folder for folder in folders if not folder.stored() and (folder.path / SUMMARY).exists()]
    stores = load([folder for folder in folders if folder not in bare]) if len(bare) < len(folders) else []
    pictures = [sheets(stored) for stored in stores]
    summaries = [*map(summarise, stores), *(summary for folder in bare for summary in read_summaries(folder))]
    each = ",\n".join(summary.written(indent=1).rstrip() for summary in summaries)
    files: dict[str, str | bytes] = {
        "tables.md": "\n".join(map(markdown, summaries)),
        "tables.tex": "\n".join(map(latex, summaries)),
        SUMMARY: f"{each}\n" if len(summaries) == 1 else f"[\n{each}\n]\n",
    }
    for place, summary in enumerate(summaries):
        prefix = f"{place + 1}-" if len(summaries) > 1 else ""
        drawn = figures(summary) | (pictures[place] if place < len(pictures) else {})
        files |= {f"figures/{prefix}{name}.png": content for name, content in drawn.items()}
    for name, content in files.items():
        write_atomically(out / name, content)
    return [out / name for name in files]


def read_summaries(folder: Folder) -> list[Summary]:
    """Return the summaries that a folder's summary.json holds.

    Raises:
        ValueError: for a file that is no summary.
    """
    file = folder.path / SUMMARY
    try:
        found = TypeAdapter(Summary | list[Summary]).validate_json(file.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise ValueError(f"{file}: not a summary ({error.errors()[0]['msg']}); name a folder with rows") from None
    return found if isinstance(found, list) else [found]
