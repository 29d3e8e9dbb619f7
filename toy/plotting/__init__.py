"""Figures of laws, samples and experiments; the only room of ``toy`` that imports matplotlib.

Figures are ``matplotlib.figure.Figure`` objects: no pyplot, no global state, no window; ``encoded`` writes them.
"""

from sdeblend.shell.figures import OKABE_ITO, encoded, panels
from toy.plotting.compare import compare_figure, experiment_figure
from toy.plotting.laws import Cloud, Style, contours_2d, member_style, points_2d, style_of, window_of

__all__ = [
    "OKABE_ITO",
    "Cloud",
    "Style",
    "compare_figure",
    "contours_2d",
    "encoded",
    "experiment_figure",
    "member_style",
    "panels",
    "points_2d",
    "style_of",
    "window_of",
]
