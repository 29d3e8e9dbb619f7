"""Sheets of images: a row a method, a column a setting, what was measured under each cell; and curves over steps."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.figure import Figure
from torch import Tensor

from stablediffusion.montage import montage

# Colours that colour-blind readers can tell apart. Source: Okabe and Ito 2008.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def sheet_figure(
    cells: Sequence[Sequence[Tensor]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    notes: Sequence[Sequence[str]] | None = None,
    title: str = "",
    across: int = 2,
    width: float = 2.0,
) -> Figure:
    """Draw cells of images.

    Args:
        cells: images (N, 3, H, W) in [0, 1] of each row and column.
        rows, columns: their names.
        notes: what stands under each cell; nothing by default.
        title: above all.
        across: images a line of a cell.
        width: of a cell in inches.

    Returns:
        the figure.
    """
    tall = cells[0][0].shape[0] / across / across
    lines = max(note.count("\n") + 1 for row in notes for note in row) if notes else 0
    with matplotlib.rc_context({"font.size": 8}):
        size = (width * len(columns) + 0.4, (width * tall + 0.17 * lines + 0.1) * len(rows) + 0.5)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(len(rows), len(columns), squeeze=False)
        for r, line in enumerate(cells):
            for c, images in enumerate(line):
                axis = axes[r, c]
                axis.imshow(montage(images, across), interpolation="nearest")
                axis.set_xticks([])
                axis.set_yticks([])
                if notes:
                    axis.set_xlabel(notes[r][c])
                if r == 0:
                    axis.set_title(columns[c])
                if c == 0:
                    axis.set_ylabel(rows[r], fontsize=9)
        if title:
            figure.suptitle(title, wrap=True)
    return figure


def curves_figure(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float] | None]],
    *,
    x: str,
    y: str,
    title: str = "",
    dashed: Sequence[str] = (),
) -> Figure:
    """Draw curves with two standard errors as bars.

    Args:
        curves: name -> (positions, values, standard errors or None).
        x, y: what the axes show, with units.
        title: above the axes.
        dashed: names of curves drawn in black and dashed: targets and references.
    """
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(6, 3.4), layout="constrained")
        axes = figure.subplots()
        for k, (name, (positions, values, errors)) in enumerate(curves.items()):
            bars = None if errors is None else [2 * error for error in errors]
            colour, line = ("black", "--") if name in dashed else (COLOURS[k % len(COLOURS)], "-")
            axes.errorbar(
                positions, values, yerr=bars, label=name, color=colour, linestyle=line, marker="o", ms=4, capsize=2
            )
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.set_title(title)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def png(figure: Figure, dpi: int = 110) -> bytes:
    """Return a figure as PNG."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=dpi)
    return stream.getvalue()
