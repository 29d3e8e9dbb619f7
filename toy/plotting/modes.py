"""Figures of laws with modes: a panel a law or method, and bars for the share of each mode.

Modes are numbered as the components of the base, in the panels as below the bars.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from sdeblend.shell.figures import panels
from toy.experiment.experiment import Experiment
from toy.mixtures.mixture import GaussianMixture
from toy.plotting.curves import label, legend_below
from toy.plotting.laws import Cloud, Style, contours_2d, points_2d, style_of, window_of


def laws_figure(
    target: GaussianMixture, laws: Mapping[str, tuple[GaussianMixture, Style]], clouds: Mapping[str, Cloud],
    arrows: Mapping[str, Tensor],
) -> Figure:  # fmt: skip
    """Return a figure with one panel a law in the plane: its contours, samples that should follow it, and the target.

    Args:
        target: drawn in every panel.
        laws: title -> law and style.
        clouds: title -> samples that another computation gave for the same law.
        arrows: title -> a direction (2,), such as a reward's gradient, drawn from the middle of the panel.
    """
    window = window_of([target, *(law for law, _ in laws.values())])
    figure, grid = panels(len(laws), columns=len(laws), width=3.1, height=3.7)
    _loosen(figure)
    for axes, (title, (law, style)) in zip(grid, laws.items(), strict=True):
        if title in clouds:
            points_2d(axes, clouds[title], style)
        contours_2d(axes, target, style_of("target"), window, fill=True)
        if law is not target:
            contours_2d(axes, law, style, window)
        _plane(axes, title, window)
        if title in arrows:
            _arrow(axes, arrows[title], window, style)
        axes.plot([], [], color=style.colour, linestyle=style.line, linewidth=style.width, label=style.label)
    legend_below(figure, note="contours enclose 50 % and 95 % of the probability; dots are base samples, reweighted")
    return figure


def modes_figure(experiment: Experiment, methods: Sequence[str]) -> Figure:
    """Return a figure with one panel a method, its samples on the exact target, and one with all mode weights.

    Args:
        experiment: of ``toy.experiment.run``, in the plane.
        methods: which.
    """
    target = experiment.target
    window = window_of([target, experiment.problem.base])
    figure, grid = panels(len(methods) + 1, columns=len(methods) + 1, width=3.3, height=3.4)
    _loosen(figure)
    for axes, method in zip(grid, methods, strict=False):
        sampled, style = experiment.samples[method], style_of(method)
        contours_2d(axes, target, style_of("target"), window, fill=True)
        points_2d(axes, Cloud(sampled.samples, sampled.log_weights), style)
        tv = experiment.report["methods"][method]["mode_weight_tv"]
        _plane(axes, f"{style.label}\nmode weights off by {tv:.3f}", window)
        centre = target.means.mean(0)
        for number, (x, y) in enumerate((centre + 0.6 * (target.means - centre)).tolist(), 1):
            axes.annotate(str(number), (x, y), ha="center", va="center", fontsize=9)
    mode_bars(grid[-1], experiment, methods)
    legend_below(figure, note="contours enclose 50 % and 95 % of the target; whiskers are two standard errors")
    return figure


def mode_bars(axes: Axes, experiment: Experiment, methods: Sequence[str]) -> None:
    """Draw the share of each mode: the exact target's, and each method's with two standard errors."""
    rows = {"target": experiment.report["target"]} | {name: experiment.report["methods"][name] for name in methods}
    width, places = 0.8 / len(rows), np.arange(1, 1 + experiment.problem.base.components)
    for i, (name, row) in enumerate(rows.items()):
        style = style_of(name)
        offset = places + (i - (len(rows) - 1) / 2) * width
        errors = 2 * np.array(row["component_weights_se"]) if "component_weights_se" in row else None
        axes.bar(offset, row["component_weights"], width, yerr=errors, color=style.colour, label=style.label)
    label(axes, "share of each mode", "mode", "share of the samples", xticks=places)


def _loosen(figure: Figure) -> None:
    """Leave room above titles, which panels of equal scales would otherwise push off the figure."""
    figure.set_layout_engine("constrained", h_pad=0.1)


def _plane(axes: Axes, title: str, window: Sequence[tuple[float, float]]) -> None:
    settings: dict[str, Any] = {"xlim": window[0], "ylim": window[1], "aspect": "equal"}
    axes.set_title(title, fontsize=10, loc="left")
    axes.set(xlabel="$x_1$", ylabel="$x_2$", **settings)


def _arrow(axes: Axes, direction: Tensor, window: Sequence[tuple[float, float]], style: Style) -> None:
    middle = np.array([(low + high) / 2 for low, high in window])
    reach = 0.18 * min(high - low for low, high in window) * (direction / direction.norm()).numpy()
    shape = {"arrowstyle": "-|>", "color": style.colour, "linewidth": 2.5}
    (x, y), (below_x, below_y) = (middle + reach).tolist(), (middle - 0.35 * reach).tolist()
    axes.annotate("", (x, y), tuple(middle.tolist()), arrowprops=shape)
    axes.annotate("reward", (below_x, below_y), ha="center", va="center", fontsize=8, color=style.colour)
