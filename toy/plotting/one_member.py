"""Figures of one member a step: where one step lands, how members are spread along time, what a batch makes of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor

from sdeblend.shell.figures import OKABE_ITO, panels
from toy.plotting.curves import legend_below
from toy.plotting.laws import style_of
from toy.statements.one_member import OneStep

_MEMBERS = ("sky", "orange", "purple", "green", "yellow")


def one_step_figure(steps: Sequence[OneStep], names: Sequence[str], reach: float = 4.5) -> Figure:
    """Return one panel a step size: the copies by member, and the two covariances as ellipses of two deviations.

    Args:
        steps: one step from one point, at several h, in two dimensions.
        names: of the members.
        reach: half the width of the window, in units of the step's own noise.
    """
    figure, axes = panels(len(steps), height=4.0)
    for panel, step in zip(axes, steps, strict=True):
        for k, name in enumerate(names):
            x, y = step.points[step.member == k][:1500].T
            panel.plot(x, y, ".", markersize=2.5, alpha=0.5, color=OKABE_ITO[_MEMBERS[k]], rasterized=True)
            panel.plot(
                *step.member_means[k].tolist(), "o", markersize=8, markeredgecolor="black",
                color=OKABE_ITO[_MEMBERS[k]], label=f"step of member '{name}'",
            )  # fmt: skip
        panel.plot(0, 0, "s", markersize=8, color=OKABE_ITO["blue"], label="step of the blend (DB-MPA)")
        panel.plot(
            *step.exact_mean.tolist(), "X", markersize=9, color=OKABE_ITO["black"],
            label="control: step of the exact target's score",
        )  # fmt: skip
        _ellipse(panel, torch.eye(2, dtype=torch.float64), "blue", "-", "covariance of the blend's step")
        _ellipse(panel, step.covariance, "vermillion", "--", "of one member a step, predicted")
        _ellipse(panel, torch.cov(step.points.T), "black", ":", "of one member a step, measured")
        panel.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xlabel="x1, units of the step's noise")
        panel.set_title(f"h = {step.step:g}", fontsize=10)
    axes[0].set_ylabel("x2, units of the step's noise")
    legend_below(figure, columns=3)
    return figure


def sequence_figure(indices: Mapping[str, Tensor], weight: float, shown: int = 30) -> Figure:
    """Return, for each way of drawing, who serves which sample when, and how far the counts stray.

    Args:
        indices: members 0 or 1 by title, (n, B) each.
        weight: probability of member 1.
        shown: how many samples are drawn.
    """
    figure, axes = panels(2 * len(indices), columns=len(indices), height=2.2)
    colours = ListedColormap([OKABE_ITO["sky"], OKABE_ITO["orange"]])
    excess = {title: index.double().cumsum(0) - weight * _steps(index) for title, index in indices.items()}
    top = max(float(value[:, :shown].abs().max()) for value in excess.values()) * 1.08
    for column, (title, index) in enumerate(indices.items()):
        picture, counts = axes[column], axes[column + len(indices)]
        picture.imshow(index[:, :shown].T, cmap=colours, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        picture.set_title(title, fontsize=10)
        counts.axhspan(-1, 1, color=OKABE_ITO["green"], alpha=0.2, linewidth=0, label="within one")
        counts.plot(_steps(index), excess[title][:, :shown], color=OKABE_ITO["vermillion"], linewidth=0.7, alpha=0.6)
        counts.plot([], [], color=OKABE_ITO["vermillion"], label="one line a sample")
        counts.axhline(0, color="black", linewidth=1, label="the blend: exactly w a step")
        counts.set(xlabel="step n", ylim=(-top, top), xlim=(0, len(index)))
    axes[0].set_ylabel("sample")
    axes[len(indices)].set_ylabel("uses of orange − n w")
    axes[-1].legend(fontsize=8, frameon=False, loc="lower left")
    return figure


def _steps(index: Tensor) -> Tensor:
    return torch.arange(1, len(index) + 1, dtype=torch.float64)[:, None]


def _ellipse(axes: Axes, covariance: Tensor, colour: str, line: str, label: str) -> None:
    """Draw the ellipse of two standard deviations."""
    angle = torch.linspace(0, 2 * math.pi, 181, dtype=torch.float64)
    edge = 2 * torch.linalg.cholesky(covariance) @ torch.stack([angle.cos(), angle.sin()])
    axes.plot(*edge, color=OKABE_ITO[colour], linestyle=line, linewidth=2, label=label)


def batches_figure(
    shares: Mapping[str, Tensor], target: Tensor, modes: Sequence[tuple[int, str]], errors: float
) -> Figure:
    """Return one panel a mode: the share of each batch's samples in it, batch by batch, for every method.

    Args:
        shares: by method as ``toy.plotting.style_of`` knows it, (batches, K) each.
        target: exact weights of the modes, (K,).
        modes: which to draw, and their titles.
        errors: standard error of a share that samples alone explain, drawn about the target.
    """
    figure, axes = panels(len(modes), width=4.6, height=3.4)
    for panel, (mode, title) in zip(axes, modes, strict=True):
        exact = float(target[mode])
        panel.axhline(exact, color="black", linewidth=1.8, label="exact target")
        panel.axhspan(exact - 2 * errors, exact + 2 * errors, color="0.85", linewidth=0, label="two standard errors")
        for place, (name, values) in enumerate(shares.items()):
            style = style_of(name)
            across = place + 0.5 * (torch.arange(len(values), dtype=torch.float64) + 0.5) / len(values) - 0.25
            panel.plot(across, values[:, mode], "o", color=style.colour, markersize=5, label=style.label)
        short = [style_of(name).label.replace("DB-MPA-", "").replace(" ", "\n") for name in shares]
        panel.set_xticks(range(len(shares)), short, fontsize=8)
        panel.set_title(title, fontsize=10)
        panel.set_ylabel("share of the samples")
    legend_below(figure)
    return figure
