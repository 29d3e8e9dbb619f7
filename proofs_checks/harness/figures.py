"""What the figures of all checks share: a row of panels, what each colour means, and labels.

Exact targets are black, the base grey, a blend blue, what is corrected or systematic green, a bound or what
was broken on purpose vermilion (Okabe and Ito's palette).
"""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from toy import plotting

EXACT = plotting.OKABE_ITO["black"]
BASE = plotting.OKABE_ITO["grey"]
BLEND = plotting.OKABE_ITO["blue"]
GOOD = plotting.OKABE_ITO["green"]
BROKEN = plotting.OKABE_ITO["vermillion"]
OTHER = plotting.OKABE_ITO["orange"]
LIGHT = plotting.OKABE_ITO["sky"]
PINK = plotting.OKABE_ITO["purple"]


def panels(count: int, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    """Return a figure of ``count`` panels side by side, each ``height`` inches high, and its axes."""
    figure, axes = plotting.panels(count, columns=count, width=4.4, height=height)
    for ax in axes:
        ax.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


def label(ax: Axes, title: str, x: str, y: str, **legend: Any) -> None:
    """Give a panel its title, axis labels and legend."""
    ax.set_title(title, fontsize=10, loc="left")
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=8, frameon=False, **legend)
