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

from sdeblend.evaluate.summary import label

_COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7A7A7A")
_LINES: Final = ("-", "--", "-.")
_MARKERS: Final = "osD^vPX*"
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
    axis = _axis(summary["groups"])
    if axis is not None:
        distances = dict.fromkeys(
            name for group in summary["groups"] for m in group["methods"].values() for name in m["distances"]
        )
        for name in distances:
            figure = _curves(summary, axis, styles, name, _distance(name))
            out[f"{name.lower().replace(' ', '-')}-by-{axis}"] = _bytes(figure)
        out[f"reward-by-{axis}"] = _bytes(_curves(summary, axis, styles, "mean r(w)", lambda m: m["weighted"]))
    if any("win_rate" in m for group in summary["groups"] for m in group["methods"].values()):
        out["win-rates"] = _bytes(_win_rates(summary, styles))
    return out


def _axis(groups: Sequence[Mapping[str, Any]]) -> str | None:
    """Return what varies most often among the groups: the strength, or a number of the variants."""
    values = {"strength": {g["strength"] for g in groups}}
    for key in dict.fromkeys(key for g in groups for key in g["values"]):
        values[key] = {g["values"].get(key) for g in groups} - {None}
    best = max(values, key=lambda key: len(values[key]))
    return best if len(values[best]) > 1 else None


def _curves(
    summary: Mapping[str, Any], axis: str, styles: Mapping[str, Mapping[str, Any]], what: str, get: Curve
) -> Figure:
    preferences = list(dict.fromkeys(_preference(g) for g in summary["groups"]))
    figure, panels = _panels(len(preferences))
    for axes, preference in zip(panels, preferences, strict=True):
        own = [g for g in summary["groups"] if _preference(g) == preference]
        for name, style in styles.items():
            at: dict[float, list[Mapping[str, Any]]] = {}
            for group in own:
                found = get(group["methods"][name]) if name in group["methods"] else None
                if found is not None and found["value"] is not None:
                    place = group["strength"] if axis == "strength" else group["values"].get(axis)
                    at.setdefault(place, []).append(found)
            if not at:
                continue
            x = sorted(place for place in at if place is not None)
            y = [float(np.mean([found["value"] for found in at[place]])) for place in x]
            axes.plot(x, y, label=label(name), markersize=4, linewidth=1.3, **style)
            # On a logarithmic axis the bands of a distance hide each other; the tables have them.
            if all(len(at[p]) == 1 and at[p][0]["low"] is not None and "floor" not in at[p][0] for p in x):
                axes.fill_between(
                    x, [at[p][0]["low"] for p in x], [at[p][0]["high"] for p in x], color=style["color"], alpha=0.12,
                    linewidth=0,
                )  # fmt: skip
        floors: dict[float, float] = {}
        for group in own:
            where = group["strength"] if axis == "strength" else group["values"].get(axis)
            shown = [f["floor"] for m in group["methods"].values() if (f := get(m)) is not None and "floor" in f]
            if shown:
                # Weighted samples have a higher one, of as many as they are worth.
                floors[where] = min(shown)
        if floors:
            x = sorted(floors)
            axes.plot(x, [floors[p] for p in x], color="0.6", linewidth=4, alpha=0.5, zorder=0, label="exact samples")
            axes.set_yscale("log")
        if axis == "kl_weight":
            axes.set_xscale("log")
        axes.set(xlabel=axis.replace("_", " "), ylabel=what, title=preference)
    _legend(figure, panels[0])
    figure.suptitle(summary["title"], fontsize=10, x=0.02, horizontalalignment="left")
    return figure


def _distance(name: str) -> Curve:
    return lambda method: method["distances"].get(name)


def _pareto(fronts: Sequence[Mapping[str, Any]], styles: Mapping[str, Mapping[str, Any]]) -> Figure:
    figure, panels = _panels(len(fronts), *((6.5, 4.6) if len(fronts) == 1 else (4.6, 3.6)))
    for axes, front in zip(panels, fronts, strict=True):
        for name, method in front["methods"].items():
            points = np.array(method["points"])
            points = points[np.argsort(points[:, 0])]
            axes.plot(points[:, 0], points[:, 1], label=label(name), markersize=5, linewidth=1.2, **styles[name])
        if front["target"]:
            exact = np.array(front["target"])
            axes.plot(*exact.T, color="black", linestyle=":", linewidth=2.5, marker="o", mfc="white", ms=6, zorder=5,
                      label="exact target")  # fmt: skip
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
        shown = [(name, m["win_rate"]) for name, m in group["methods"].items() if "win_rate" in m]
        for place, (name, rate) in enumerate(reversed(shown)):
            ends = [[rate["value"] - rate["low"]], [rate["high"] - rate["value"]]] if rate["low"] is not None else None
            axes.errorbar(rate["value"], place, xerr=ends, fmt="o", markersize=4, color=styles[name]["color"])
        axes.axvline(0.5, color="0.6", linewidth=1, zorder=0)
        axes.set_yticks(range(len(shown)), [label(name) for name, _ in reversed(shown)], fontsize=7)
        axes.set_title(f"{group['group']}, {_preference(group)}, strength {group['strength']:g}", fontsize=8)
        axes.set_xlabel(f"win rate over {label(summary['reference'])}", fontsize=8)
        axes.tick_params(axis="x", labelsize=7)
    return figure


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
