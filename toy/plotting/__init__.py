"""Figures of laws, samples and experiments; the only room of ``toy`` that imports matplotlib."""

from sdeblend.shell.figures import OKABE_ITO, panels
from sdeblend.shell.figures import encoded as figure_bytes
from toy.plotting.laws import (
    Cloud,
    Style,
    compare_figure,
    contours_2d,
    density_1d,
    histogram_1d,
    member_style,
    points_2d,
    style_of,
    window_of,
)

__all__ = [
    "OKABE_ITO",
    "Cloud",
    "Style",
    "compare_figure",
    "contours_2d",
    "density_1d",
    "figure_bytes",
    "histogram_1d",
    "member_style",
    "panels",
    "points_2d",
    "style_of",
    "window_of",
]
