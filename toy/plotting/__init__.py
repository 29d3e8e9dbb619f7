"""Figures of laws, samples and experiments; the only room of ``toy`` that imports matplotlib."""

from toy.plotting.laws import (
    OKABE_ITO,
    Cloud,
    Style,
    compare_figure,
    contours_2d,
    density_1d,
    figure_bytes,
    histogram_1d,
    member_style,
    panels,
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
