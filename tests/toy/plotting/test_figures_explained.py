"""The figures of the notebooks: what they measure, and that everything on them is named."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from sdeblend import VPLinear
from sdeblend.shell.figures import encoded, panels
from toy import control, problems
from toy.experiment import Experiment, run
from toy.experiment.settings import BlendSettings
from toy.mixtures.mixture import GaussianMixture
from toy.plotting.curves import certified, curve, family_style, kl_of_laws, kl_of_modes, label, legend_below, measured
from toy.plotting.laws import Cloud, style_of
from toy.plotting.line import (
    bounds_figure,
    conflict_figure,
    controls_figure,
    gap_figure,
    histograms_figure,
    line_states,
    rms,
    strengths_figure,
)
from toy.plotting.modes import laws_figure, modes_figure

METHODS = ("exact", "mpa", "mpa-corrected")


@pytest.fixture(scope="module")
def ring() -> Experiment:
    return run(problems.ring8(), BlendSettings(weights=(0.5, 0.5), methods=METHODS, samples=500, steps=20))


@pytest.fixture(scope="module")
def line() -> Experiment:
    return run(problems.line2(), BlendSettings(weights=(0.5, 0.5), methods=METHODS, samples=500, steps=20))


def check(figure: Figure) -> list[str]:
    """Return the labels of the legend of a figure whose panels all have named axes; it can be drawn."""
    for axes in figure.axes:
        assert axes.get_ylabel() and (axes.get_xlabel() or axes.get_label() == "<colorbar>")
    assert encoded(figure, dpi=40).startswith(b"\x89PNG")
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_rms_is_the_one_of_the_law() -> None:
    law = GaussianMixture([1.0], [[0.5]], [0.25])
    states = line_states(2001)
    assert rms(law, states, states) == pytest.approx(math.sqrt(0.5**2 + 0.25), rel=1e-6)
    assert rms(law, states, states.new_ones(2001, 2)) == pytest.approx(math.sqrt(2))


def test_kl_of_modes_is_zero_for_the_targets_own_shares(ring: Experiment) -> None:
    wanted = ring.report["target"]["component_weights"]
    report = {**ring.report, "methods": {"mpa": {"component_weights": wanted}}}
    assert kl_of_modes(replace(ring, report=report), "mpa") == pytest.approx(0, abs=1e-12)
    uniform = {**ring.report, "methods": {"mpa": {"component_weights": [1 / 8] * 8}}}
    by_hand = sum(math.log(1 / 8 / w) / 8 for w in wanted)
    assert kl_of_modes(replace(ring, report=uniform), "mpa") == pytest.approx(by_hand)


def test_kl_of_laws_is_that_of_the_blend_and_none_of_the_control(line: Experiment) -> None:
    assert kl_of_laws(line, "exact") < 1e-6
    assert kl_of_laws(line, "mpa") == pytest.approx(0.245, rel=0.02)


def test_curves_of_a_sweep_are_named_with_floor_and_target(line: Experiment) -> None:
    figure, (one, two, three) = panels(3)
    measured(one, [1.0], [line], "mode_weight_tv", METHODS)
    measured(two, [1.0], [line], "mean_reward/right", METHODS)
    certified(three, [1.0], [line])
    for axes in (one, two, three):
        label(axes, "title", "knob", "number")
    legend_below(figure)
    names = check(figure)
    assert {"exact target", "exact score", "DB-MPA", "exact samples (floor)", "certificate of DB-MPA"} <= set(names)
    assert len(names) == len(set(names))


def test_excess_is_over_the_target(line: Experiment) -> None:
    _, (axes,) = panels(1)
    measured(axes, [1.0], [line], "mean_reward/right", ("mpa",), excess=True)
    target, mpa = (np.asarray(drawn.get_ydata(), dtype=float).item() for drawn in axes.get_lines())
    row, exact = line.report["methods"]["mpa"]["mean_reward"], line.report["target"]["mean_reward"]
    assert target == 0
    assert mpa == pytest.approx(row["right"] - exact["right"])


def test_a_band_is_two_standard_errors() -> None:
    _, (axes,) = panels(1)
    curve(axes, [0.0, 1.0], [1.0, 1.0], family_style(0, "one"), se=[0.1, 0.2])
    low, high = axes.collections[0].get_paths()[0].get_extents().intervaly
    assert low == pytest.approx(0.6)
    assert high == pytest.approx(1.4)


def test_family_has_eight_colours_and_lines() -> None:
    styles = [family_style(i, str(i)) for i in range(8)]
    assert len({style.colour for style in styles}) == len({str(style.line) for style in styles}) == 8


def test_modes_and_laws(ring: Experiment) -> None:
    assert check(modes_figure(ring, METHODS)) == ["exact target", "exact score", "DB-MPA", "DB-MPA corrected"]
    base, target = ring.problem.base, ring.target
    points = base.sample(100, generator=torch.Generator().manual_seed(0))
    laws = {"base": (base, style_of("base")), "target": (target, style_of("target"))}
    arrows = {"target": torch.ones(2, dtype=torch.float64)}
    figure = laws_figure(target, laws, {"base": Cloud(points)}, arrows)
    assert check(figure) == ["base", "exact target"]


def test_gap_on_the_line(line: Experiment) -> None:
    problem, schedule, points = line.problem, VPLinear(), line_states(9, 2.0)
    checked = {0.3: control(problem.base, problem.rewards["right"], problem.kl_weight, schedule, points, 0.3)}
    assert "exact target" in check(controls_figure(problem, "right", schedule, checked, points))
    assert "Jensen gap Δ" in check(gap_figure(problem, "right", schedule, (1.0,), 0.3))
    assert len(check(bounds_figure(problem, "right", schedule, 0.2, (0.2, 0.5)))) == 4
    values = torch.sin(points)
    assert check(conflict_figure(points, {"t": {"some": values, "measured": values}})) == ["some", "measured"]
    assert "exact target" in check(histograms_figure({"line2": line}, METHODS))


def test_strengths(line: Experiment) -> None:
    problem = line.problem
    found = {s: torch.tensor([s, 0.1], dtype=torch.float64).unbind() for s in (0.0, 1.0)}
    names = check(strengths_figure(problem, "right", (0.0, 0.5, 1.0), found))  # type: ignore[arg-type]
    assert {"base", "exact target at strength 0.5", "exact target", "base reweighted"} == set(names) - {
        "exact target at strength 1"
    }
