"""What a command says: tables, notes and progress, fitted to a terminal, plain text in a pipe or a file.

Results go to stdout, progress and notes to stderr. On a terminal a table that is too wide is set as several below each
other, each with the first column; in a pipe lines are as long as they need, without colours, and progress is silent.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any, TypeVar

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

T = TypeVar("T")
_GAP = 2
_ENDLESS = 100_000


def table(
    header: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1, width: int | None = None, split: bool = True
) -> str:
    """Return a table as plain text: the first columns to the left, the others to the right.

    Args:
        header: names of the columns; none are shown if all are empty.
        rows: text; a short row has empty cells at its end.
        left: how many columns are text and not numbers.
        width: characters that a line may have, None for as many as it needs. Columns that do not fit are set below,
            with the first column again; a single cell that is wider is folded.
        split: whether columns may be set below; if not, cells are folded.

    Returns:
        lines without a final newline.
    """
    lines = [tuple(header), *map(tuple, rows)]
    count = max(map(len, lines))
    lines = [line + ("",) * (count - len(line)) for line in lines]
    widths = [max(cell_len(part) for line in lines for part in line[c].splitlines() or [""]) for c in range(count)]
    blocks = [[0]]
    for column in range(1, count):
        taken = sum(widths[c] + _GAP for c in blocks[-1]) + widths[column]
        if split and width is not None and taken > width and len(blocks[-1]) > 1:
            blocks.append([0])
        blocks[-1].append(column)
    return "\n\n".join(_block(lines, block, left, width) for block in blocks)


def _block(lines: Sequence[Sequence[str]], columns: Sequence[int], left: int, width: int | None) -> str:
    out = Table(box=None, show_header=any(lines[0]), pad_edge=False, padding=(0, _GAP, 0, 0), header_style="")
    for column in columns:
        justify = "left" if column < left else "right"
        out.add_column(Text(lines[0][column]), justify=justify, no_wrap=width is None, overflow="fold")  # type: ignore[arg-type]
    for line in lines[1:]:
        out.add_row(*(Text(line[column]) for column in columns))
    console = Console(width=width or _ENDLESS, color_system=None, force_terminal=False, force_jupyter=False)
    with console.capture() as said:
        console.print(out)
    return "\n".join(line.rstrip() for line in said.get().splitlines())


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown, lines without a final newline."""
    lines = (header, ["---"] * len(header), *rows)
    return "\n".join("|" + "|".join(f" {part} " if part else " " for part in line) + "|" for line in lines)


def width_of(stream: IO[str]) -> int | None:
    """Return how many characters a line of a stream has: of a terminal its width, of all else None."""
    return Console(file=stream, force_jupyter=False).width if stream.isatty() else None


def show_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> None:
    """Print a table on stdout, fitted to the terminal if it is one; arguments as for ``table``."""
    print(table(header, rows, left=left, width=width_of(sys.stdout)))


class Bar:
    """The progress of a run; see ``progress``."""

    def __init__(self, shown: Progress | None, task: TaskID) -> None:
        self._shown, self._task = shown, task

    def update(self, steps: float = 1, note: str | None = None) -> None:
        """Go on by some steps, and say something beside the bar."""
        if self._shown is not None:
            said: dict[str, Any] = {} if note is None else {"note": note}
            self._shown.update(self._task, advance=steps, **said)

    def restart(self, what: str, total: float) -> None:
        """Begin again with something else."""
        if self._shown is not None:
            self._shown.reset(self._task, total=total, description=what)


@contextmanager
def progress(
    what: str, total: float | None = None, *, unit: str = "", done: float = 0, leave: bool = True, quiet: bool = False
) -> Iterator[Bar]:
    """Show a bar on stderr while a block runs, if that is a terminal.

    Args:
        what: is going on.
        total: steps in all, None if that is not known.
        unit: what a step is, in the plural.
        done: steps done before.
        leave: whether the bar stays at the end.
        quiet: whether nothing is shown at all, as by all processes but one.
    """
    if quiet or not sys.stderr.isatty():
        yield Bar(None, TaskID(0))
        return
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
        TextColumn(unit, markup=False), TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[note]}", markup=False),
    )  # fmt: skip
    console = Console(file=sys.stderr, force_jupyter=False)
    # Lines printed meanwhile go above the bar, those of stdout too if they are on the same screen.
    with Progress(*columns, console=console, transient=not leave, redirect_stdout=sys.stdout.isatty()) as shown:
        yield Bar(shown, shown.add_task(what, total=total, completed=done, note=""))  # type: ignore[arg-type]


def track(items: Sequence[T], what: str, *, unit: str = "") -> Iterator[T]:
    """Give the items one by one, with a bar on stderr if that is a terminal."""
    with progress(what, len(items), unit=unit) as bar:
        for item in items:
            yield item
            bar.update()
