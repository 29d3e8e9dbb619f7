"""Figures and formulas as images inside a page, and the panel that the checks of closed forms share."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.mathtext import MathTextParser

from proofs_checks.harness.figures import BLEND, BROKEN, OTHER, label

# A figure with more drawing in it than this is smaller as pixels.
LARGEST_VECTOR_IMAGE = 150_000
SVG: dict[Any, Any] = {"svg.hashsalt": "sdeblend", "svg.fonttype": "path"}
NOTHING: dict[str, Any] = {"Date": None, "Creator": None, "Format": None, "Type": None}
BELOW: dict[str, Any] = {
    "loc": "upper center", "bbox_to_anchor": (0.5, -0.17), "columnspacing": 1.0, "handletextpad": 0.5
}  # fmt: skip


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


def image(picture: Figure, dpi: int = 130) -> str:
    """Return a figure as a ``data:`` address: vector, or pixels where that is smaller."""
    vector = io.BytesIO()
    with rc_context(SVG):
        picture.savefig(vector, format="svg", metadata=NOTHING)
    if vector.tell() <= LARGEST_VECTOR_IMAGE:
        return _address("image/svg+xml", vector.getvalue())
    pixels = io.BytesIO()
    picture.savefig(pixels, format="png", dpi=dpi, metadata={"Software": None})
    return _address("image/png", pixels.getvalue())


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
    out = io.BytesIO()
    with rc_context(SVG):
        picture.savefig(out, format="svg", metadata=NOTHING, transparent=True)
    return _address("image/svg+xml", out.getvalue()), width / 72


def _address(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
