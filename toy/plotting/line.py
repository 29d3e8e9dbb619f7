"""Figures of the Jensen gap and its consequences on the line: over states, over time, over the KL weight.

Sizes are root mean squares over the states that the noised base visits, sqrt(E |v(x_t)|^2), by the trapezoidal rule,
which errs by rounding only: densities of mixtures are analytic and vanish at the ends of the nodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure
from torch import Tensor

from sdeblend import NoiseSchedule
from sdeblend.shell.figures import OKABE_ITO, panels
from toy.experiment.experiment import Experiment
from toy.metrics import Estimate
from toy.mixtures.mixture import GaussianMixture
from toy.plotting.curves import curve, family_style, label, legend_below
from toy.plotting.laws import Cloud, Style, density_1d, histogram_1d, style_of, window_of
from toy.problems import Problem
from toy.statements.bounds import jensen_bounds
from toy.statements.control import control, jensen_control, jensen_gap

TIME = "time t (data at 0, noise at 1)"
GAP = Style(OKABE_ITO["black"], "-", "Jensen gap Δ", 2.2)
_CONTROL = Style(OKABE_ITO["vermillion"], "-", "control u (exact)", 2.0)
_LINEAR = Style(OKABE_ITO["blue"], "--", "Jensen's ū, linear in r")
BOUNDS = {
    "cauchy_schwarz": Style(OKABE_ITO["orange"], "--", "B1 (Cauchy-Schwarz)"),
    "shift": Style(OKABE_ITO["purple"], "-.", "B2 (the paper's)"),
    "thermodynamic": Style(OKABE_ITO["green"], (0, (6, 1)), "B3 (third cumulants)"),
}


def line_states(count: int = 501, reach: float = 5.0) -> Tensor:
    """Return evenly spaced states (count, 1), float64, on [-reach, reach]."""
    return torch.linspace(-reach, reach, count, dtype=torch.float64)[:, None]


def rms(law: GaussianMixture, states: Tensor, values: Tensor) -> float:
    """Return sqrt(E |values|^2) under a law on the line.

    Args:
        law: of the states, usually a noised base.
        states: evenly spaced, (n, 1), beyond which the law has next to nothing.
        values: at the states, (n, d).
    """
    return float((law.log_prob(states).softmax(0) @ values.square().sum(-1)).sqrt())


def controls_figure(
    problem: Problem, name: str, schedule: NoiseSchedule, checked: Mapping[float, Tensor], points: Tensor
) -> Figure:
    """Return a figure of noised laws above, and of the control and its linear part below, a column a time.

    Args:
        problem: on the line.
        name: of the reward.
        schedule: the forward process.
        checked: time -> the control at ``points`` by another computation, (n, 1).
        points: (n, 1).
    """
    figure, grid = panels(2 * len(checked), columns=len(checked), width=4.2, height=2.5)
    base, reward, alpha = problem.base, problem.rewards[name], problem.kl_weight
    x = line_states(401, 4.0)
    for column, (t, values) in enumerate(checked.items()):
        above, below = grid[column], grid[column + len(checked)]
        density_1d(above, base.noised(schedule, t), style_of("base"), (-4, 4))
        density_1d(above, problem.member(name).noised(schedule, t), style_of("target"), (-4, 4), fill=True)
        label(above, f"laws at t = {t:g}", "state x", "density", ylim=(0, None))
        u, linear = (f(base, reward, alpha, schedule, x, t)[:, 0] for f in (control, jensen_control))
        curve(below, x[:, 0], u, _CONTROL)
        curve(below, x[:, 0], linear, _LINEAR)
        below.fill_between(x[:, 0], u, linear, color="0.88", label="their difference, the gap Δ", zorder=0)
        below.plot(points, values, "o", mfc="none", color="black", markersize=5, label="u by brute force")
        label(below, f"control at t = {t:g}", "state x", "gradient (1 / unit of x)")
    legend_below(figure, columns=6)
    return figure


def gap_figure(problem: Problem, name: str, schedule: NoiseSchedule, kl_weights: Sequence[float], t: float) -> Figure:
    """Return a figure of the gap: over states and time, its size over time, its size over the KL weight.

    Args:
        problem: on the line; its own KL weight is that of the first panel.
        name: of the reward.
        schedule: the forward process.
        kl_weights: a curve each in the second panel.
        t: the time of the third panel.
    """
    base, reward, x = problem.base, problem.rewards[name], line_states()

    def gap(alpha: float, time: float) -> Tensor:
        return jensen_gap(base, reward, alpha, schedule, x, time)

    figure, (left, middle, right) = panels(3, width=4.4)
    early, late = np.geomspace(schedule.t_min, 0.1, 20), np.linspace(0.12, schedule.t_max, 45)
    clock = [*early.tolist(), *late.tolist()]
    _gap_map(left, problem.member(name), schedule, clock, x, [gap(problem.kl_weight, t) for t in clock])
    label(left, f"gap over time and state, α = {problem.kl_weight:g}", TIME, "state x")
    for i, alpha in enumerate(kl_weights):
        sizes = [rms(base.noised(schedule, time), x, gap(alpha, time)) for time in clock]
        curve(middle, clock, sizes, family_style(i, f"α = {alpha:g}"))
    label(middle, "size of the gap over time", TIME, "rms of Δ (1 / unit of x)", yscale="log", ylim=(1e-4, 20))
    weights = np.geomspace(3e-3, 100, 40).tolist()
    curve(right, weights, [rms(base.noised(schedule, t), x, gap(alpha, t)) for alpha in weights], GAP)
    u = [rms(base.noised(schedule, t), x, control(base, reward, alpha, schedule, x, t)) for alpha in weights]
    curve(right, weights, u, Style(_CONTROL.colour, "--", _CONTROL.label))
    label(right, f"over the KL weight, t = {t:g}", "KL weight α", "rms (1 / unit of x)", xscale="log", yscale="log")
    legend_below(figure, columns=5)
    return figure


def bounds_figure(problem: Problem, name: str, schedule: NoiseSchedule, t: float, times: Sequence[float]) -> Figure:
    """Return a figure of the gap and its three bounds, over states at time t and their size over ``times``."""
    base, reward, alpha = problem.base, problem.rewards[name], problem.kl_weight
    figure, (left, right) = panels(2, width=5.4)
    x = line_states(161, 3.5)
    values = jensen_bounds(base, reward, alpha, schedule, x, t)
    curve(left, x[:, 0], jensen_gap(base, reward, alpha, schedule, x, t).abs()[:, 0], GAP)
    for field, style in BOUNDS.items():
        curve(left, x[:, 0], getattr(values, field), style)
    label(left, f"at t = {t:g}", "state x", "|Δ| and bounds (1 / unit of x)", yscale="log", ylim=(1e-3, 100))
    gaps, bounds = [], []
    for time in times:
        law = base.noised(schedule, time)
        gaps.append(rms(law, x, jensen_gap(base, reward, alpha, schedule, x, time)))
        held = jensen_bounds(base, reward, alpha, schedule, x, time)
        bounds.append([rms(law, x, getattr(held, field)[:, None]) for field in BOUNDS])
    curve(right, times, gaps, GAP)
    for style, sizes in zip(BOUNDS.values(), zip(*bounds, strict=True), strict=True):
        curve(right, times, sizes, style, marker=".")
    label(right, "root mean square over the states", TIME, "rms of Δ and bounds", yscale="log", ylim=(1e-3, 100))
    legend_below(figure)
    return figure


def conflict_figure(states: Tensor, errors: Mapping[str, Mapping[str, Tensor]]) -> Figure:
    """Return a figure of what a blended score misses, a panel a title.

    Args:
        states: (n, 1).
        errors: title -> label -> values at the states (n, 1); those labelled "measured" are drawn as rings.
    """
    figure, grid = panels(len(errors), width=4.4)
    for axes, (title, curves) in zip(grid, errors.items(), strict=True):
        for i, (name, values) in enumerate(curves.items()):
            if name == "measured":
                axes.plot(states[::4], values[::4], "o", mfc="none", color="black", markersize=5, label=name)
            else:
                curve(axes, states[:, 0], values[:, 0], family_style(i, name))
        label(axes, title, "state x", "exact less blended score (1 / unit of x)")
    legend_below(figure)
    return figure


def strengths_figure(
    problem: Problem, name: str, strengths: Sequence[float], found: Mapping[float, Estimate]
) -> Figure:
    """Return a figure of the targets of one reward at several strengths, and of the mean reward over the strength.

    Args:
        problem: on the line.
        name: of the reward.
        strengths: a density each.
        found: strength -> the target's mean reward by another computation.
    """
    figure, (left, right) = panels(2, width=5.4)
    targets = {strength: problem.target({name: 1.0}, strength) for strength in strengths}
    window = window_of(list(targets.values()))[0]
    for i, (strength, law) in enumerate(targets.items()):
        style = family_style(i, f"exact target at strength {strength:g}")
        density_1d(left, law, style_of("base") if strength == 0 else style, window)
    label(left, "the same reward, turned up", "x", "density", ylim=(0, None))
    fine = torch.linspace(min(found), max(found), 121, dtype=torch.float64).tolist()
    means = [problem.target({name: 1.0}, strength).mean_reward(problem.rewards[name]) for strength in fine]
    curve(right, fine, means, style_of("target"))
    values, errors = ([float(part) for part in parts] for parts in zip(*found.values(), strict=True))
    whiskers = [2 * error for error in errors]
    right.errorbar(list(found), values, whiskers, fmt="o", mfc="none", color=_CONTROL.colour, label="base reweighted")
    label(right, "what it earns", "strength λ", f"mean reward '{name}' (base sd)")
    legend_below(figure, note="whiskers are two standard errors")
    return figure


def histograms_figure(experiments: Mapping[str, Experiment], methods: Sequence[str]) -> Figure:
    """Return a figure with a row an experiment and a column a method: samples on the line on the exact target.

    Args:
        experiments: by title, of ``toy.experiment.run``.
        methods: which.
    """
    figure, grid = panels(len(experiments) * len(methods), columns=len(methods), width=3.8, height=2.2)
    for row, (title, experiment) in enumerate(experiments.items()):
        target, base = experiment.target, experiment.problem.base
        window = window_of([target, base])[0]
        top = 1.15 * float(target.log_prob(line_states(801, 8.0)).exp().max())
        for column, method in enumerate(methods):
            axes, sampled = grid[row * len(methods) + column], experiment.samples[method]
            histogram_1d(axes, Cloud(sampled.samples, sampled.log_weights), style_of(method), window)
            density_1d(axes, base, style_of("base"), window)
            density_1d(axes, target, style_of("target"), window)
            label(axes, f"{title}: {style_of(method).label}", "x", "density", xlim=window, ylim=(0, top))
    legend_below(figure, columns=5)
    return figure


def _gap_map(
    axes: Axes, tilted: GaussianMixture, schedule: NoiseSchedule, clock: list[float], x: Tensor, gaps: list[Tensor]
) -> None:
    values = torch.stack([gap[:, 0] for gap in gaps], -1).numpy()
    scale = SymLogNorm(linthresh=0.01, vmin=-10, vmax=10)
    mesh = axes.pcolormesh(clock, x[:, 0], values, cmap="PuOr_r", norm=scale, rasterized=True)
    axes.figure.colorbar(mesh, ax=axes, label="Δ (1 / unit of x)", ticks=[-10, -1, -0.1, 0, 0.1, 1, 10])
    for quantile, style in ((0.05, ":"), (0.5, "-"), (0.95, ":")):
        name = {0.5: "exact target's median", 0.05: "its 5 % and 95 % quantiles"}.get(quantile)
        places = [_quantile(tilted.noised(schedule, t), x, quantile) for t in clock]
        axes.plot(clock, places, style, color="black", label=name)


def _quantile(law: GaussianMixture, x: Tensor, level: float) -> float:
    cumulated = law.log_prob(x).softmax(0).cumsum(0)
    return float(x[int((cumulated < level).sum()), 0])
