"""One style for the figures of all checks; figures are objects, nothing global is touched.

Colours are Okabe and Ito's, told apart by every kind of colour vision: the exact target is always black, the base
grey, a blend blue, what is corrected or systematic green, and what was broken on purpose vermilion.
"""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

EXACT = "#000000"
BASE = "#999999"
BLEND = "#0072B2"
GOOD = "#009E73"
BROKEN = "#D55E00"
OTHER = "#E69F00"
LIGHT = "#56B4E9"
PINK = "#CC79A7"
CYCLE = (BLEND, OTHER, GOOD, PINK, LIGHT, BROKEN)


def panels(count: int, height: float = 3.4) -> tuple[Figure, list[Axes]]:
    """Return a figure of ``count`` panels side by side, and its axes."""
    figure = Figure(figsize=(4.3 * count, height), layout="constrained")
    axes = [figure.add_subplot(1, count, i + 1) for i in range(count)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


def label(ax: Axes, title: str, x: str, y: str, **legend: Any) -> None:
    """Give a panel its title, axis labels and legend."""
    ax.set_title(title, fontsize=10, loc="left")
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=8, frameon=False, **legend)
