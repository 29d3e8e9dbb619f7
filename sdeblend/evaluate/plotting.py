"""Figures of an evaluation: Pareto fronts, reward and distance against what varies, win rates.

Figures are ``matplotlib.figure.Figure`` objects, in Okabe and Ito's colours; every method keeps its colour, line and
marker in all figures of a summary.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sdeblend.evaluate.measures import Array
from sdeblend.evaluate.summary import exact_reward, label

_COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7A7A7A")
_LINES: Final = ("-", "--", "-.")
_MARKERS: Final = "osD^vPX*"
_EXACT: Final[Mapping[str, Any]] = {
    "color": "black", "linestyle": ":", "linewidth": 2.5, "marker": "o", "mfc": "white", "ms": 6,
}  # fmt: skip
SHOWN: Final = 6
Curve = Callable[[Mapping[str, Any]], Mapping[str, Any] | None]


def figures(summary: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the figures of a summary as png files, by name."""
    names = list(dict.fromkeys(name for group in summary["groups"] for name in group["methods"]))
    styles = {
        name: {
            "color": _COLOURS[i % len(_COLOURS)],
            "linestyle": _LINES[i // len(_COLOURS) % len(_LINES)],
            "marker": _MARKERS[(i + i // len(_MARKERS)) % len(_MARKERS)],
        }
        for i, name in enumerate(names)
    }
    out = {}
    fronts = [front for front in summary["fronts"] if len(front["rewards"]) == 2]
    if fronts:
        out["pareto"] = _bytes(_pareto(fronts[:SHOWN], styles))
    distances = dict.fromkeys(
        name for group in summary["groups"] for m in group["methods"].values() for name in m["distances"]
    )
    axes = _axes(summary["groups"])
    for axis in axes:
        others = [other for other in axes if other != axis]
        for name in distances:
            figure = _curves(summary, axis, others, styles, name, _distance(name))
            out[f"{name.lower().replace(' ', '-')}-by-{axis}"] = _bytes(figure)
        figure = _curves(summary, axis, others, styles, "mean r(w)", lambda m: m["weighted"], exact_reward)
        out[f"reward-by-{axis}"] = _bytes(figure)
    if any("win_rate" in m for group in summary["groups"] for m in group["methods"].values()):
        out["win-rates"] = _bytes(_win_rates(summary, styles))
    return out


def _axes(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what varies among the groups: the strength, numbers of the variants."""
    names = dict.fromkeys(["strength", *(key for group in groups for key in group["values"])])
    return [name for name in names if len({_at(group, name) for group in groups} - {None}) > 1]


def _at(group: Mapping[str, Any], axis: str) -> float | None:
    place: float | None = group["strength"] if axis == "strength" else group["values"].get(axis)
    return place


def _curves(
    summary: Mapping[str, Any], axis: str, others: Sequence[str], styles: Mapping[str, Mapping[str, Any]], what: str,
    get: Curve, exact: Callable[[Mapping[str, Any]], float | None] | None = None,
) -> Figure:  # fmt: skip
    """Return a panel for each preference and each value of what varies besides."""
    panelled: dict[str, list[tuple[float, Mapping[str, Any]]]] = {}
    for group in summary["groups"]:
        if (place := _at(group, axis)) is not None:
            fixed = [(other, value) for other in others if (value := _at(group, other)) is not None]
            title = ", ".join([_preference(group), *(f"{other.replace('_', ' ')} {value:g}" for other, value in fixed)])
            panelled.setdefault(title, []).append((place, group))
    figure, panels = _panels(len(panelled))
    for axes, (title, own) in zip(panels, panelled.items(), strict=True):
        for name, style in styles.items():
            at: dict[float, list[Mapping[str, Any]]] = {}
            for place, group in own:
                found = get(group["methods"][name]) if name in group["methods"] else None
                if found is not None and found["value"] is not None:
                    at.setdefault(place, []).append(found)
            if not at:
                continue
            x = sorted(at)
            y = [float(np.mean([found["value"] for found in at[place]])) for place in x]
            axes.plot(x, y, label=label(name), markersize=4, linewidth=1.3, **style)
            # On a logarithmic axis the bands of a distance hide each other; the tables have them.
            if all(len(at[p]) == 1 and at[p][0]["low"] is not None and "floor" not in at[p][0] for p in x):
                axes.fill_between(
                    x, [at[p][0]["low"] for p in x], [at[p][0]["high"] for p in x], color=style["color"], alpha=0.12,
                    linewidth=0,
                )  # fmt: skip
        floors: dict[float, float] = {}
        for place, group in own:
            shown = [f["floor"] for m in group["methods"].values() if (f := get(m)) is not None and "floor" in f]
            if shown:
                # Weighted samples have a higher one, of as many as they are worth.
                floors[place] = min(shown)
        targets = {place: exact(group) for place, group in own} if exact else {}
        known = {place: value for place, value in targets.items() if value is not None}
        if known:
            x = sorted(known)
            axes.plot(x, [known[p] for p in x], label="exact target", zorder=5, **_EXACT)
        if floors:
            x = sorted(floors)
            axes.plot(x, [floors[p] for p in x], color="0.6", linewidth=4, alpha=0.5, zorder=0, label="exact samples")
            axes.set_yscale("log")
        if axis == "kl_weight":
            axes.set_xscale("log")
        axes.set(xlabel=axis.replace("_", " "), ylabel=what, title=title)
    _legend(figure, panels[0])
    figure.suptitle(summary["title"], fontsize=10, x=0.02, horizontalalignment="left")
    return figure


def _distance(name: str) -> Curve:
    return lambda method: method["distances"].get(name)


def _pareto(fronts: Sequence[Mapping[str, Any]], styles: Mapping[str, Mapping[str, Any]]) -> Figure:
    figure, panels = _panels(len(fronts), *((6.5, 4.6) if len(fronts) == 1 else (4.6, 3.6)))
    for axes, front in zip(panels, fronts, strict=True):
        for name, method in front["methods"].items():
            style, points, inside = styles[name], np.array(method["points"]), np.array(method["dominated"])
            best = points[~inside][np.argsort(points[~inside, 0])]
            axes.plot(*best.T, label=label(name), markersize=5, linewidth=1.2, **style)
            # Hollow and beside the line: another preference of the same method dominates them.
            axes.plot(*points[inside].T, **{**style, "linestyle": "none"}, markersize=5, mfc="white")
            across, along = (_bars([point[i] for point in method["intervals"]]) for i in (0, 1))
            axes.errorbar(
                points[:, 0], points[:, 1], xerr=across, yerr=along, fmt="none", ecolor=style["color"],
                elinewidth=0.7, alpha=0.5,
            )  # fmt: skip
        if front["target"]:
            exact = np.array(sorted(front["target"]))
            axes.plot(*exact.T, label="exact target", zorder=5, **_EXACT)
        first, second = front["rewards"]
        axes.set(xlabel=f"mean {first}", ylabel=f"mean {second}")
        axes.set_title(f"{front['group']}, strength {front['strength']:g}", fontsize=9)
    _legend(figure, panels[0])
    return figure


def _win_rates(summary: Mapping[str, Any], styles: Mapping[str, Mapping[str, Any]]) -> Figure:
    groups = [g for g in summary["groups"] if any("win_rate" in m for m in g["methods"].values())][:SHOWN]
    count = max(len(g["methods"]) for g in groups)
    figure, panels = _panels(len(groups), height=0.9 + 0.22 * count)
    for axes, group in zip(panels, groups, strict=True):
        rates = [(name, m["win_rate"]) for name, m in group["methods"].items() if "win_rate" in m]
        shown = [(name, rate) for name, rate in rates if rate["value"] is not None]
        for place, (name, rate) in enumerate(reversed(shown)):
            axes.errorbar(rate["value"], place, xerr=_bars([rate]), fmt="o", markersize=4, color=styles[name]["color"])
        axes.axvline(0.5, color="0.6", linewidth=1, zorder=0)
        axes.set_yticks(range(len(shown)), [label(name) for name, _ in reversed(shown)], fontsize=7)
        axes.set_title(f"{group['group']}, {_preference(group)}, strength {group['strength']:g}", fontsize=8)
        axes.set_xlabel(f"win rate over {label(summary['reference'])}", fontsize=8)
        axes.tick_params(axis="x", labelsize=7)
    return figure


def _bars(intervals: Sequence[Mapping[str, Any]]) -> Array:
    """Return how far each interval reaches below and above its estimate, (2, n), nan where an end is not known."""
    value, low, high = (np.array([one[key] for one in intervals], dtype=np.float64) for key in ("value", "low", "high"))
    # A percentile interval may lie beside its estimate, and a bar may not.
    return np.maximum(np.stack([value - low, high - value]), 0)


def _preference(group: Mapping[str, Any]) -> str:
    values = list(group["preference"].values())
    if len(values) > 1 and len(set(values)) == 1:
        return "equal weights"
    return "preference " + ", ".join(f"{v:.2g}" for v in values)


def _panels(count: int, width: float = 4.6, height: float = 3.6) -> tuple[Figure, list[Axes]]:
    columns = min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns + 1.8, height * rows + 0.6), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for unused in grid[count:]:
        unused.remove()
    for axes in grid[:count]:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, list(grid[:count])


def _legend(figure: Figure, axes: Axes) -> None:
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", frameon=False, fontsize=7)


def _bytes(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110, facecolor="white", metadata={"Software": None})
    return stream.getvalue()
