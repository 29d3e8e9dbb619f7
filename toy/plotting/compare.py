"""The figure of a problem: its laws, and each method's samples on the exact target with the numbers above.

In more than two dimensions a law is drawn as the plane of two coordinates with both marginals along its sides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sdeblend.shell.figures import panels
from toy.experiment.experiment import Experiment
from toy.mixtures.mixture import GaussianMixture
from toy.plotting.laws import (
    Cloud,
    Style,
    contours_2d,
    density_1d,
    histogram_1d,
    member_style,
    points_2d,
    style_of,
    window_of,
)


def experiment_figure(experiment: Experiment) -> Figure:
    """Return the figure of an experiment.

    Args:
        experiment: what ``toy.experiment.run`` returned.

    Returns:
        one panel for base, members and exact target, one for each method.
    """
    problem, settings = experiment.problem, experiment.settings
    clouds = {}
    for name, sampled in experiment.samples.items():
        numbers = experiment.report["methods"][name]
        title = (
            f"{style_of(name).label}\n"
            f"mode TV {numbers['mode_weight_tv']:.3f} (floor {numbers['mode_weight_tv_floor']:.3f}), "
            f"sliced W2 {numbers['sliced_w2']:.3f} ({numbers['sliced_w2_floor']:.3f})"
        )
        clouds[name] = Cloud(sampled.samples, sampled.log_weights, title)
    shares = experiment.preference.coefficients(problem.names)[1:].tolist()
    preference = ", ".join(f"{name} {share:.3g}" for name, share in zip(problem.names, shares, strict=True))
    return compare_figure(
        problem.base,
        {name: problem.member(name) for name in problem.names},
        experiment.target,
        clouds,
        title=(
            f"{problem.name}: {preference} at KL weight {problem.kl_weight:g}; {settings.solver}, "
            f"{settings.steps} steps, {settings.samples} samples"
        ),
    )


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
        the figure; ``sdeblend.shell.figures.encoded`` writes it.
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


def _handle(style: Style, *, samples: bool = False) -> Line2D:
    if samples:
        return Line2D([], [], linestyle="none", marker="s", markersize=6, color=style.colour, label=style.label)
    return Line2D([], [], color=style.colour, linestyle=style.line, linewidth=style.width, label=style.label)
