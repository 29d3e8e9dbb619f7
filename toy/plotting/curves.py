"""Curves over a knob: what each method of an experiment measures as one setting varies.

A band is two standard errors to either side. The floor is what exact samples of the same number measure, the control
is the exact score on the same grid, step and noise: a method is wrong by what it has above these two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from sdeblend import BackwardSDE, Blend
from sdeblend.shell.figures import OKABE_ITO
from toy.experiment.experiment import Experiment
from toy.plotting.laws import Style, style_of
from toy.scores.stack import mixture_score
from toy.statements.fokker_planck import backward_density

FLOOR: Final = Style(OKABE_ITO["grey"], (0, (1, 1)), "exact samples (floor)", 2.0)
CERTIFICATE: Final = Style(OKABE_ITO["vermillion"], "-", "certificate of DB-MPA", 2.0)
_FAMILY: Final = (
    ("blue", "-"), ("orange", "--"), ("green", "-."), ("vermillion", (0, (5, 1, 1, 1))),
    ("purple", (0, (3, 1, 1, 1, 1, 1))), ("sky", (0, (8, 2))), ("yellow", (0, (2, 1))), ("grey", (0, (1, 1))),
)  # fmt: skip
Numbers = Sequence[float] | Tensor


def family_style(index: int, label: str) -> Style:
    """Return the style of curve ``index`` (from 0) of a family, one colour and line each up to eight."""
    colour, line = _FAMILY[index % len(_FAMILY)]
    return Style(OKABE_ITO[colour], line, label)


def curve(axes: Axes, x: Numbers, y: Numbers, style: Style, *, se: Numbers | None = None, marker: str = "") -> None:
    """Draw one curve, with a band of two standard errors if ``se`` is given.

    Args:
        axes: where.
        x: the knob, (n,).
        y: what is measured, (n,).
        style: how.
        se: standard errors of y, (n,).
        marker: of the points; none for what is known everywhere.
    """
    knob, values = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    axes.plot(
        knob, values, color=style.colour, linestyle=style.line, linewidth=style.width, label=style.label,
        marker=marker or None, markersize=4,
    )  # fmt: skip
    if se is not None:
        half = 2 * np.asarray(se, dtype=float)
        axes.fill_between(knob, values - half, values + half, color=style.colour, alpha=0.2, linewidth=0)


def label(axes: Axes, title: str, x: str, y: str, **settings: Any) -> None:
    """Give a panel its title, axis labels, a light grid, and what else ``Axes.set`` takes (xscale, ylim, ...)."""
    axes.set_title(title, fontsize=10, loc="left")
    axes.set(xlabel=x, ylabel=y, **settings)
    axes.grid(alpha=0.25, linewidth=0.6)


def legend_below(figure: Figure, *, columns: int = 4, note: str | None = None) -> None:
    """Put one legend for all panels below them, each label once."""
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, text in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(text, handle)
    drawn = figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=min(columns, len(handles)), frameon=False,
        fontsize=9, title=note, title_fontsize=9,
    )  # fmt: skip
    for line in drawn.get_lines():
        line.set_linewidth(max(line.get_linewidth(), 1.6))


def measured(
    axes: Axes, knob: Numbers, experiments: Sequence[Experiment], key: str, methods: Sequence[str],
    *, excess: bool = False,
) -> None:  # fmt: skip
    """Draw a number of the reports for each method, and its floor and its target where the reports have them.

    Args:
        axes: where.
        knob: the setting that varies, one an experiment.
        experiments: of ``toy.experiment.run``.
        key: of a method's report, such as "mode_weight_tv"; "mean_reward/NAME" for one reward's.
        methods: which.
        excess: draw what a mean reward has above the target's.
    """
    key, _, reward = key.partition("/")
    known = [experiment.report["target"][key][reward] if reward else 0.0 for experiment in experiments]
    origin = known if excess else [0.0] * len(known)
    if reward:
        curve(axes, knob, [a - b for a, b in zip(known, origin, strict=True)], style_of("target"))
    for method in methods:
        rows = [experiment.report["methods"][method] for experiment in experiments]
        values, errors = ([row.get(name) for row in rows] for name in (key, f"{key}_se"))
        if reward:
            values, errors = ([row[reward] for row in rows] for rows in (values, errors))
        drawn = [value - start for value, start in zip(values, origin, strict=True)]
        curve(axes, knob, drawn, style_of(method), se=None if None in errors else errors, marker="o")
    floors = [experiment.report["methods"][methods[0]].get(f"{key}_floor") for experiment in experiments]
    if None not in floors:
        curve(axes, knob, floors, FLOOR)


def certified(axes: Axes, knob: Numbers, experiments: Sequence[Experiment]) -> None:
    """Draw the certificate of DB-MPA, and what it bounds: a KL divergence (and the control's).

    On the line it is that of the law, see ``kl_of_laws``; elsewhere that of the mode weights, see ``kl_of_modes``.

    Args:
        axes: where.
        knob: the setting that varies, one an experiment.
        experiments: of ``toy.experiment.run`` with methods "exact" and "mpa".
    """
    rows = [experiment.report["methods"]["mpa"] for experiment in experiments]
    values, errors = ([row[key] for row in rows] for key in ("certificate", "certificate_se"))
    curve(axes, knob, values, CERTIFICATE, se=errors, marker="o")
    on_the_line = experiments[0].problem.base.dim == 1
    measure, what = (kl_of_laws, "the law") if on_the_line else (kl_of_modes, "mode weights")
    for method in ("mpa", "exact"):
        style = style_of(method)
        drawn = Style(style.colour, style.line, f"KL of {what}, {style.label}")
        curve(axes, knob, [measure(experiment, method) for experiment in experiments], drawn, marker="s")


def kl_of_modes(experiment: Experiment, method: str) -> float:
    """Return KL(mode weights of the samples || those of the target), in nats: never above the KL of the laws.

    A mode weight is the mean responsibility of a component: a sample is sent to a random label, and no map of samples
    to labels can raise a KL divergence (data processing). n samples of the target itself have (K - 1) / (2 n).
    """
    shares = torch.tensor(experiment.report["methods"][method]["component_weights"], dtype=torch.float64)
    wanted = torch.tensor(experiment.report["target"]["component_weights"], dtype=torch.float64)
    return float(torch.special.xlogy(shares, shares / wanted).sum())


def kl_of_laws(experiment: Experiment, method: str) -> float:
    """Return KL(law of "exact" or "mpa" || target) on the line, in nats, by its Fokker-Planck equation: no samples."""
    target, schedule = experiment.target, experiment.case.schedule
    blend = Blend(experiment.problem.stack(schedule), experiment.preference.coefficients(experiment.problem.names))
    score = mixture_score(target, schedule) if method == "exact" else blend
    return backward_density(BackwardSDE(schedule, score), steps=300).kl_to(target)
