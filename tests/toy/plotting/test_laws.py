"""Figures: what a panel shows, and that contours and histograms mean what they say."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.contour import ContourSet

from sdeblend.shell.figures import FORMATS, OKABE_ITO, encoded, panels
from toy.experiment.settings import USUAL
from toy.mixtures.mixture import GaussianMixture
from toy.plotting.compare import compare_figure, telling_pair
from toy.plotting.laws import Cloud, contours_2d, histogram_1d, member_style, points_2d, style_of, window_of
from toy.problems import high_dimension, line2, ring8


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_each_method_has_a_colour_and_a_line_of_its_own() -> None:
    styles = [style_of(name) for name in USUAL]
    assert len({style.colour for style in styles}) == len({str(style.line) for style in styles}) == len(USUAL)
    assert {style.colour for style in styles} <= set(OKABE_ITO.values()) - {style_of("target").colour}
    assert style_of("something new").label == "something new"
    assert len({(member_style(i, "r").colour, str(member_style(i, "r").line)) for i in range(30)}) == 30


def test_contours_enclose_their_share() -> None:
    # Of a standard normal in the plane, the share within radius r is 1 - exp(-r^2/2).
    law = GaussianMixture([1.0], [[0.0, 0.0]], [1.0])
    _, (axes,) = panels(1)
    contours_2d(axes, law, style_of("target"), [(-5, 5), (-5, 5)])
    (drawn,) = [artist for artist in axes.get_children() if isinstance(artist, ContourSet)]
    radii = [float(np.linalg.norm(path.vertices, axis=1).mean()) for path in drawn.get_paths()]
    expected = [math.sqrt(-2 * math.log(1 - share)) for share in (0.95, 0.5)]
    assert radii == pytest.approx(expected, rel=0.01)
    assert radii != pytest.approx(expected[::-1], rel=0.1)


def test_histogram_is_a_density_over_all_samples_and_their_weights() -> None:
    points = torch.tensor([[0.5], [0.5], [1.5], [9.0]])
    log_weights = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    _, (axes,) = panels(1)
    histogram_1d(axes, Cloud(points, log_weights), style_of("mpa"), (0, 2), bins=2)
    assert axes.patches[0].get_data().values == pytest.approx([0.3, 0.3])  # type: ignore[attr-defined]


def test_weighted_points_are_shown_as_often_as_they_weigh() -> None:
    points = torch.stack([torch.arange(4000.0), torch.zeros(4000)], dim=1)
    log_weights = torch.where(points[:, 0] < 1000, 0.0, -math.inf)
    _, (axes,) = panels(1)
    points_2d(axes, Cloud(points, log_weights), style_of("mpa"))
    shown = np.asarray(axes.lines[0].get_xdata())
    assert len(shown) == 1500 and shown.max() < 1000


def test_window_holds_laws_and_samples_but_no_runaway() -> None:
    law = GaussianMixture([1.0], [[1.0]], [0.25])
    assert window_of([law]) == [pytest.approx((1 - 1.65, 1 + 1.65))]
    away = Cloud(torch.full((100, 1), 1e6))
    (low, high), = window_of([law], [away])
    assert low == pytest.approx(-0.65) and high == pytest.approx(2.65 + 3.3)


def test_pair_is_where_the_laws_differ() -> None:
    base = GaussianMixture([1.0], [[0.0] * 4], [[[1.0 * (i == j) for j in range(4)] for i in range(4)]])
    moved = GaussianMixture([1.0], [[0.0, 0.1, 2.0, -3.0]], [1.0])
    assert telling_pair(base, [moved]) == (2, 3)


@pytest.mark.parametrize("make", [line2, ring8, high_dimension])
def test_figure_has_a_panel_a_method_and_the_target_in_each(make) -> None:
    problem = make()
    target = problem.target([0.5, 0.5])
    names = ["exact", "mpa", "ls"]
    clouds = {name: Cloud(target.sample(200, generator=generator()).float()) for name in names}
    members = dict(zip(problem.names, problem.members(), strict=True))
    figure = compare_figure(problem.base, members, target, clouds, title="a title")
    dim = problem.base.dim
    titled = [axes for axes in figure.axes if axes.get_title()]
    assert len(titled) == 1 + len(names)
    main = [axes for axes in figure.axes if axes.get_xlabel()]
    assert len(main) == 1 + len(names) and all(axes.get_ylabel() for axes in main)
    black = style_of("target").colour
    for axes in main:
        if dim == 1:
            assert any(line.get_color() == black for line in axes.lines)
        else:
            sets = [artist for artist in axes.get_children() if isinstance(artist, ContourSet)]
            edges = [edge for drawn in sets for edge in np.asarray(drawn.get_edgecolor())]
            assert black in {to_hex(tuple(edge)) for edge in edges}
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts[0] == "base" and "exact target" in texts and "DB-MPA" in texts
    assert all(f"member tuned for '{name}'" in texts for name in problem.names)


@pytest.mark.parametrize("kind", FORMATS)
def test_the_same_figure_is_the_same_file(kind: str) -> None:
    def draw(seed: int) -> bytes:
        law = GaussianMixture([1.0], [[0.0, 0.0]], [1.0])
        figure, (axes,) = panels(1)
        contours_2d(axes, law, style_of("target"), [(-3, 3), (-3, 3)])
        points_2d(axes, Cloud(law.sample(50, generator=generator(seed))), style_of("mpa"))
        return encoded(figure, kind)

    assert draw(0) == draw(0) != draw(1)


def test_format_must_be_known() -> None:
    figure, _ = panels(1)
    with pytest.raises(ValueError, match="a figure can be png, svg, pdf, got 'gif'"):
        encoded(figure, "gif")


def test_no_global_figure_is_made() -> None:
    program = "import sys, toy.plotting, toy.plotting.compare; print('matplotlib.pyplot' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
