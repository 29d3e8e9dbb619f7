"""Figures of laws and samples in one, two and more dimensions.

Figures are ``matplotlib.figure.Figure`` objects: no pyplot, no global state, no window. Colours are Okabe and Ito's,
which stay apart for all common forms of colour blindness, and every curve has a line style besides its colour. A
contour encloses a stated share of the probability: the level c with P(p(x) >= c) equal to the share, on a grid.
In more than two dimensions a law is drawn as the plane of two coordinates with both marginals along its sides.

Source: Okabe and Ito 2008 (palette); Hyndman 1996 (highest density regions).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from sdeblend.shell.figures import OKABE_ITO, panels
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


def telling_pair(base: GaussianMixture, others: Sequence[GaussianMixture]) -> tuple[int, int]:
    """Return the two coordinates in which ``others`` differ most from ``base``, in its standard deviations."""
    scale = base.covariance.diagonal().sqrt()
    shift = torch.stack([((law.mean - base.mean) / scale).abs() for law in others]).amax(0)
    first, second = sorted(shift.argsort(descending=True, stable=True)[:2].tolist())
    return first, second


def compare_figure(
    base: GaussianMixture,
    members: Mapping[str, GaussianMixture],
    target: GaussianMixture,
    clouds: Mapping[str, Cloud],
    *,
    title: str = "",
    axes: tuple[int, int] | None = None,
) -> Figure:
    """Return the figure of a problem and of what each method makes of it, one panel each.

    The first panel has the laws: base, members and exact target. Each other panel has one method's samples on the
    exact target, which is shaded in all panels.

    Args:
        base: the pre-trained law.
        members: the tuned laws by the names of their rewards.
        target: the exact target.
        clouds: samples by method.
        title: above everything.
        axes: the two coordinates to draw in more than two dimensions; by default where the laws differ most.

    Returns:
        the figure; ``sdeblend.shell.figures.encoded`` makes a file of it.
    """
    labels = ["x"] if base.dim == 1 else ["x1", "x2"]
    above_the_plane = base.dim > 2
    if above_the_plane:
        chosen = list(axes or telling_pair(base, [target, *members.values()]))
        labels = [f"x{axis + 1}" for axis in chosen]
        base, target = base.marginal(chosen), target.marginal(chosen)
        members = {name: law.marginal(chosen) for name, law in members.items()}
        clouds = {name: Cloud(c.points[:, chosen], c.log_weights, c.title) for name, c in clouds.items()}
    window = window_of([base, target, *members.values()], list(clouds.values()))
    count = 1 + len(clouds)
    columns = 2 if count == 4 else 3 if count <= 6 else 4
    figure, plain = panels(count, columns=columns, height=3.1 if base.dim == 1 else 3.9)
    grid = [_with_strips(figure, axes) if above_the_plane else [axes] for axes in plain]
    laws = [(base, style_of("base"))]
    laws += [(law, member_style(i, name)) for i, (name, law) in enumerate(members.items())]
    _panel(grid[0], target, laws, None, window, labels, "base, members and exact target\n")
    for panel, (name, cloud) in zip(grid[1:], clouds.items(), strict=True):
        drawn = Cloud(cloud.points, cloud.log_weights, cloud.title or style_of(name).label)
        _panel(panel, target, [], (drawn, style_of(name)), window, labels, drawn.title)
    handles = [_handle(style) for _, style in laws] + [_handle(style_of("target"))]
    handles += [_handle(style_of(name), samples=True) for name in clouds]
    note = None if base.dim == 1 else "contours enclose 50 % and 95 % of the probability"
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(len(handles), 4), frameon=False, fontsize=9,
        title=note, title_fontsize=9,
    )  # fmt: skip
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def _panel(
    grid: Sequence[Axes],
    target: GaussianMixture,
    laws: Sequence[tuple[GaussianMixture, Style]],
    samples: tuple[Cloud, Style] | None,
    window: Sequence[tuple[float, float]],
    labels: Sequence[str],
    title: str,
) -> None:
    """Draw the exact target, other laws and samples on one panel, and on the strips at its sides if it has any."""
    axes, *strips = grid
    if target.dim == 1:
        _line(axes, target, laws, samples, window[0])
        axes.set(xlabel=labels[0], ylabel="density", xlim=window[0])
        axes.set_ylim(bottom=0)
        axes.set_title(title, fontsize=9)
        return
    contours_2d(axes, target, style_of("target"), window, fill=True)
    for law, style in laws:
        contours_2d(axes, law, style, window)
    if samples is not None:
        points_2d(axes, *samples)
    axes.set(xlabel=labels[0], ylabel=labels[1], xlim=window[0], ylim=window[1])
    widths = [high - low for low, high in window]
    if max(widths) < 2 * min(widths) and not strips:
        axes.set_aspect("equal")
    for axis, strip in enumerate(strips):
        own = [(law.marginal([axis]), style) for law, style in laws]
        cloud = None if samples is None else (_column(samples[0], axis), samples[1])
        _line(strip, target.marginal([axis]), own, cloud, window[axis], upright=axis == 1)
    (strips[0] if strips else axes).set_title(title, fontsize=9)


def _line(
    axes: Axes,
    target: GaussianMixture,
    laws: Sequence[tuple[GaussianMixture, Style]],
    samples: tuple[Cloud, Style] | None,
    window: Sequence[float],
    *,
    upright: bool = False,
) -> None:
    if samples is not None:
        histogram_1d(axes, *samples, window, upright=upright)
    density_1d(axes, target, style_of("target"), window, fill=samples is None, upright=upright)
    for law, style in laws:
        density_1d(axes, law, style, window, upright=upright)


def _with_strips(figure: Figure, axes: Axes) -> list[Axes]:
    """Return a panel, a strip above it and one at its right, in the place of ``axes``."""
    place = axes.get_subplotspec()
    assert place is not None  # panels() made it
    axes.remove()
    cells = place.subgridspec(2, 2, width_ratios=(5, 1), height_ratios=(1, 5), wspace=0, hspace=0)
    main = figure.add_subplot(cells[1, 0])
    main.spines[["top", "right"]].set_visible(False)
    strips = [figure.add_subplot(cells[0, 0], sharex=main), figure.add_subplot(cells[1, 1], sharey=main)]
    for strip in strips:
        strip.axis("off")
    return [main, *strips]


def _column(cloud: Cloud, axis: int) -> Cloud:
    return Cloud(cloud.points[:, [axis]], cloud.log_weights)


def _enclosing_levels(density: np.ndarray) -> list[float]:
    """Return the increasing densities whose contours enclose the largest and the smallest of ``SHARES``."""
    ordered = np.sort(density.ravel())[::-1]
    enclosed = ordered.cumsum() / ordered.sum()
    levels = [float(ordered[np.searchsorted(enclosed, share)]) for share in sorted(SHARES, reverse=True)]
    # Contours need increasing levels even where a law falls between the points of the grid.
    return [levels[0], max(levels[1], levels[0] * (1 + 1e-9))]


def _handle(style: Style, *, samples: bool = False) -> Line2D:
    if samples:
        return Line2D([], [], linestyle="none", marker="s", markersize=6, color=style.colour, label=style.label)
    return Line2D([], [], color=style.colour, linestyle=style.line, linewidth=style.width, label=style.label)
