"""What the figures of all checks share: panels, what each colour means, labels, and images inside a page.

Exact targets are black, the base grey, a blend blue, what is corrected or systematic green, a bound or what
was broken on purpose vermilion (Okabe and Ito's palette).
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.mathtext import MathTextParser

from sdeblend.shell import figures

EXACT = figures.OKABE_ITO["black"]
BASE = figures.OKABE_ITO["grey"]
BLEND = figures.OKABE_ITO["blue"]
GOOD = figures.OKABE_ITO["green"]
BROKEN = figures.OKABE_ITO["vermillion"]
OTHER = figures.OKABE_ITO["orange"]
LIGHT = figures.OKABE_ITO["sky"]
PINK = figures.OKABE_ITO["purple"]
# A figure with more drawing in it than this is smaller as pixels.
LARGEST_VECTOR_IMAGE = 150_000
# For a legend under its panel.
BELOW: dict[str, Any] = {
    "loc": "upper center", "bbox_to_anchor": (0.5, -0.17), "columnspacing": 1.0, "handletextpad": 0.5
}  # fmt: skip


def panels(count: int, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    """Return a figure of ``count`` panels side by side, each ``height`` inches high, and its axes."""
    figure, axes = figures.panels(count, columns=count, width=4.4, height=height)
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


def ticks(ax: Axes, places: list[float] | tuple[float, ...]) -> None:
    """Put ticks at these places of a logarithmic axis x, and nowhere else."""
    ax.set_xticks(places, [f"{place:g}" for place in places])
    ax.set_xticks([], minor=True)


def differences(axes: Axes, measured: Mapping[str, tuple[float, float]], bound: float) -> None:
    """Draw each measured difference and its control against the bound, one row each.

    Args:
        axes: where.
        measured: name -> (difference, difference of the broken version).
        bound: what the first must not exceed and the second must.
    """
    places = np.arange(len(measured))
    values = np.maximum(np.array(list(measured.values()), dtype=float), 1e-17)
    axes.axvline(bound, color=OTHER, ls="--", label=f"bound, {bound:.0e}")
    axes.plot(values[:, 0], places, "o", color=BLEND, label="measured")
    axes.plot(values[:, 1], places, "X", color=BROKEN, label="broken on purpose")
    axes.set_yticks(places, list(measured), fontsize=8)
    axes.invert_yaxis()
    axes.set(xscale="log", xlim=(1e-17, None), ylim=(len(measured) - 0.5, -0.5))
    label(axes, "All drawn problems", "largest relative difference", "", ncols=3, **BELOW)


def image(picture: Figure) -> str:
    """Return a figure as a ``data:`` address: vector, or pixels where that is smaller."""
    vector = figures.encoded(picture, "svg")
    if len(vector) <= LARGEST_VECTOR_IMAGE:
        return _address("image/svg+xml", vector)
    return _address("image/png", figures.encoded(picture, "png"))


def formula(line: str) -> tuple[str, float]:
    """Return one line of mathematics as a ``data:`` address and its width in inches.

    Args:
        line: mathtext; without a dollar sign it is all mathematics.

    Raises:
        ValueError: if it is not valid mathtext.
    """
    text = line.strip() if "$" in line else f"${line.strip()}$"
    font = FontProperties(size=12, math_fontfamily="cm")
    # Measured by hand: the tight box of a saved figure cuts off tall fractions and integrals.
    width, height, depth = (float(size) for size in MathTextParser("path").parse(text, dpi=72, prop=font)[:3])
    margin = 3.0
    width, height = width + 2 * margin, height + 2 * margin
    picture = Figure(figsize=(width / 72, height / 72), dpi=72)
    picture.text(margin / width, (depth + margin) / height, text, fontproperties=font)
    return _address("image/svg+xml", figures.encoded(picture, "svg", ground="none")), width / 72


def _address(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
