"""Laws and samples in one and two dimensions: how each is drawn, the same in every figure.

Colours are Okabe and Ito's, which stay apart for all common forms of colour blindness, and every curve has a line style
besides its colour. A contour encloses a stated share of the probability: the level c with P(p(x) >= c) equal to the
share, on a grid.

Source: Hyndman 1996 (highest density regions).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from sdeblend.shell.figures import OKABE_ITO
from toy.mixtures.mixture import GaussianMixture

LineStyle = Any  # "--", or (offset, (ink, gap, ...)) in points
SHARES: Final = (0.5, 0.95)
SHOWN_POINTS = 1500
_RESOLUTION = 161


@dataclass(frozen=True)
class Style:
    """How one law or method is drawn everywhere.

    Attributes:
        colour: of Okabe and Ito's palette.
        line: matplotlib line style.
        label: its name in a legend.
        width: line width in points.
    """

    colour: str
    line: LineStyle
    label: str
    width: float = 1.6


@dataclass(frozen=True)
class Cloud:
    """Samples to draw.

    Attributes:
        points: (B, d).
        log_weights: (B,), or None if all count alike.
        title: what a panel says above them; may have several lines.
    """

    points: Tensor
    log_weights: Tensor | None = None
    title: str = ""

    def shares(self) -> np.ndarray:
        """Return the share of each sample, (B,), summing to one."""
        if self.log_weights is None:
            return np.full(len(self.points), 1 / len(self.points))
        return self.log_weights.double().softmax(0).cpu().numpy()


_STYLES: Final = {
    "base": Style(OKABE_ITO["grey"], (0, (1, 1)), "base", 2.0),
    "target": Style(OKABE_ITO["black"], "-", "exact target", 1.8),
    "exact": Style(OKABE_ITO["sky"], "--", "exact score"),
    "mpa": Style(OKABE_ITO["blue"], "-", "DB-MPA"),
    "mpa-corrected": Style(OKABE_ITO["green"], (0, (6, 1)), "DB-MPA corrected"),
    "ls": Style(OKABE_ITO["orange"], "-.", "DB-MPA-LS systematic"),
    "ls-iid": Style(OKABE_ITO["purple"], (0, (3, 1, 1, 1, 1, 1)), "DB-MPA-LS independent"),
    "ls-shared": Style(OKABE_ITO["vermillion"], (0, (2, 1)), "DB-MPA-LS shared"),
}
_MEMBER_COLOURS: Final = ("sky", "purple", "orange", "green", "blue", "vermillion")
_MEMBER_LINES: Final[tuple[LineStyle, ...]] = ("--", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (2, 1)))


def style_of(name: str) -> Style:
    """Return the style of "base", "target" or a method; an unknown method is drawn as DB-MPA under its own name."""
    known = _STYLES.get(name)
    return known if known is not None else Style(_STYLES["mpa"].colour, _STYLES["mpa"].line, name)


def member_style(index: int, name: str) -> Style:
    """Return the style of the member at position ``index`` (from 0), tuned for the reward ``name``."""
    colour = OKABE_ITO[_MEMBER_COLOURS[index % len(_MEMBER_COLOURS)]]
    return Style(colour, _MEMBER_LINES[index % len(_MEMBER_LINES)], f"member tuned for '{name}'")


def density_1d(
    axes: Axes,
    law: GaussianMixture,
    style: Style,
    window: Sequence[float],
    *,
    fill: bool = False,
    upright: bool = False,
) -> None:
    """Draw the density of a law on the line.

    Args:
        axes: where.
        law: a mixture in one dimension.
        style: how.
        window: (low, high).
        fill: shade below it, for what the others are compared with.
        upright: draw x upwards and the density to the right.
    """
    x = torch.linspace(window[0], window[1], 601, dtype=torch.float64)
    density = law.log_prob(x[:, None]).exp()
    if fill:
        shade = axes.fill_betweenx if upright else axes.fill_between
        shade(x, density, color="0.88", linewidth=0, zorder=0)
    curve = (density, x) if upright else (x, density)
    axes.plot(*curve, color=style.colour, linestyle=style.line, linewidth=style.width, label=style.label)


def histogram_1d(
    axes: Axes, cloud: Cloud, style: Style, window: Sequence[float], *, bins: int = 80, upright: bool = False
) -> None:
    """Draw the weighted histogram of samples on the line, as a density over all samples, those outside included.

    Args:
        axes, style, window, upright: as for ``density_1d``.
        cloud: samples in one dimension.
        bins: how many over the window.
    """
    heights, edges = np.histogram(
        cloud.points[:, 0].double().cpu().numpy(), bins=bins, range=(window[0], window[1]), weights=cloud.shares()
    )
    heights = heights / np.diff(edges)
    orientation: Any = "horizontal" if upright else "vertical"
    axes.stairs(heights, edges, orientation=orientation, color=style.colour, alpha=0.35, fill=True)
    axes.stairs(heights, edges, orientation=orientation, color=style.colour, linewidth=0.8, label=style.label)


def contours_2d(
    axes: Axes, law: GaussianMixture, style: Style, window: Sequence[Sequence[float]], *, fill: bool = False
) -> None:
    """Draw the contours of a law in the plane that enclose 50 % and 95 % of its probability.

    Args:
        axes: where.
        law: a mixture in two dimensions.
        style: how.
        window: ((low, high), (low, high)).
        fill: shade inside them, for what the others are compared with.
    """
    x, y = (torch.linspace(low, high, _RESOLUTION, dtype=torch.float64) for low, high in window)
    density = law.log_prob(torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)).exp().numpy()
    levels = _enclosing_levels(density)
    if fill:
        top = max(float(density.max()), levels[-1]) * 1.01
        axes.contourf(x, y, density, [*levels, top], colors=["0.92", "0.82"], zorder=0)
    axes.contour(
        x, y, density, levels, colors=style.colour, linestyles=[style.line], linewidths=[0.7 * style.width, style.width]
    )


def points_2d(axes: Axes, cloud: Cloud, style: Style) -> None:
    """Draw at most 1500 samples in the plane, weighted ones as often as their weight says."""
    shares = cloud.shares()
    count = min(len(shares), SHOWN_POINTS)
    # Evenly spaced in the cumulated weight: a subsample without a random draw.
    chosen = np.searchsorted(shares.cumsum(), (np.arange(count) + 0.5) / count).clip(max=len(shares) - 1)
    x, y = cloud.points[chosen].double().cpu().numpy().T
    axes.plot(
        x, y, linestyle="none", marker=".", markersize=2.4, markeredgewidth=0, color=style.colour, alpha=0.55, zorder=1,
        rasterized=True,
    )  # fmt: skip


def window_of(laws: Sequence[GaussianMixture], clouds: Sequence[Cloud] = ()) -> list[tuple[float, float]]:
    """Return (low, high) of each coordinate that holds laws and samples, d of them.

    Args:
        laws: mixtures; components of weight above 1e-3 are held to 3.3 standard deviations.
        clouds: samples, held to their central 99.6 %, as far as three times the laws' window.
    """
    lows, highs = [], []
    for law in laws:
        held = law.weights > 1e-3
        spread = 3.3 * law.covariances.diagonal(dim1=1, dim2=2).sqrt()
        lows.append((law.means - spread)[held].amin(0))
        highs.append((law.means + spread)[held].amax(0))
    low, high = torch.stack(lows).amin(0).numpy(), torch.stack(highs).amax(0).numpy()
    width = high - low
    for cloud in clouds:
        ends = np.quantile(cloud.points.double().cpu().numpy(), [0.002, 0.998], axis=0)
        low = np.minimum(low, np.maximum(ends[0], low - width))
        high = np.maximum(high, np.minimum(ends[1], high + width))
    return [(float(a), float(b)) for a, b in zip(low, high, strict=True)]


def _enclosing_levels(density: np.ndarray) -> list[float]:
    """Return the increasing densities whose contours enclose the largest and the smallest of ``SHARES``."""
    ordered = np.sort(density.ravel())[::-1]
    enclosed = ordered.cumsum() / ordered.sum()
    levels = [float(ordered[np.searchsorted(enclosed, share)]) for share in sorted(SHARES, reverse=True)]
    # Contours need increasing levels even where a law falls between the points of the grid.
    return [levels[0], max(levels[1], levels[0] * (1 + 1e-9))]
