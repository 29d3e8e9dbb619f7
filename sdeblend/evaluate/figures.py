"""Figures of an evaluation: Pareto fronts, reward and distance against what varies, win rates, sheets of images.

Every method keeps its colour, line and marker in all figures of a summary. A sheet has a row a method and a column a
preference, with the same prompts and seeds in every cell; rows of results say where an image is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from sdeblend.evaluate.results import DistanceResult, Estimate, Front, GroupResult, Interval, MethodResult, Summary
from sdeblend.evaluate.store import Row, Stored
from sdeblend.methods.registry import label
from sdeblend.shell.figures import COLOURS, contact_sheet, encoded, panels

_LINES: Final = ("-", "--", "-.")
_MARKERS: Final = "osD^vPX*"
_EXACT: Final[Mapping[str, Any]] = {
    "color": "black", "linestyle": ":", "linewidth": 2.5, "marker": "o", "mfc": "white", "ms": 6,
}  # fmt: skip
SHOWN: Final = 6
# Prompts a sheet, and images a prompt.
PROMPTS: Final = 4
EACH: Final = 2
Style = Mapping[str, str]
Curve = Callable[[MethodResult], Interval | None]


def figures(summary: Summary) -> dict[str, bytes]:
    """Return the figures of a summary as png files, by name."""
    groups, styles = summary.groups, _styles(name for group in summary.groups for name in group.methods)
    out = {}
    fronts = [front for front in summary.fronts if len(front.rewards) == 2]
    if fronts:
        out["pareto"] = _pareto(fronts[:SHOWN], styles)
    distances = dict.fromkeys(name for group in groups for m in group.methods.values() for name in m.distances)
    axes = _axes(groups)
    for axis in axes:
        others = [other for other in axes if other != axis]
        for name in distances:
            get: Curve = lambda m, name=name: m.distances.get(name)  # type: ignore[misc]  # noqa: E731
            out[f"{name.lower().replace(' ', '-')}-by-{axis}"] = _curves(summary, axis, others, styles, name, get)
        out[f"reward-by-{axis}"] = _curves(
            summary, axis, others, styles, "mean r(w)", lambda m: m.weighted, GroupResult.exact_reward
        )
    rated = [group for group in groups if any(m.win_rate for m in group.methods.values())]
    if rated:
        out["win-rates"] = _win_rates(rated[:SHOWN], label(summary.reference), styles)
    return {name: encoded(figure, dpi=110) for name, figure in out.items()}


def _styles(names: Iterable[str]) -> dict[str, Style]:
    return {
        name: {
            "color": COLOURS[i % len(COLOURS)],
            "linestyle": _LINES[i // len(COLOURS) % len(_LINES)],
            "marker": _MARKERS[(i + i // len(_MARKERS)) % len(_MARKERS)],
        }
        for i, name in enumerate(dict.fromkeys(names))
    }


def _axes(groups: Sequence[GroupResult]) -> list[str]:
    """Return what varies among the groups: the strength, numbers of the variants."""
    names = dict.fromkeys(["strength", *(key for group in groups for key in group.values)])
    return [name for name in names if len({_at(group, name) for group in groups} - {None}) > 1]


def _at(group: GroupResult, axis: str) -> float | None:
    return group.strength if axis == "strength" else group.values.get(axis)


def _curves(
    summary: Summary, axis: str, others: Sequence[str], styles: Mapping[str, Style], what: str, get: Curve,
    exact: Callable[[GroupResult], float | None] | None = None,
) -> Figure:  # fmt: skip
    """Return a panel for each preference and each value of what varies besides."""
    panelled: dict[str, list[tuple[float, GroupResult]]] = {}
    for group in summary.groups:
        if (place := _at(group, axis)) is not None:
            fixed = [(other, value) for other in others if (value := _at(group, other)) is not None]
            title = ", ".join([_preference(group), *(f"{other.replace('_', ' ')} {value:g}" for other, value in fixed)])
            panelled.setdefault(title, []).append((place, group))
    figure, places = panels(len(panelled), width=4.6, height=3.6, beside=1.8, above=0.6)
    for axes, (title, own) in zip(places, panelled.items(), strict=True):
        for name, style in styles.items():
            _curve(axes, [(place, get(g.methods[name])) for place, g in own if name in g.methods], label(name), style)
        # Weighted samples have a higher floor, of as many as they are worth.
        floors = {place: min(found) for place, group in own if (found := _floors(group, get))}
        known = {place: value for place, group in own if exact and (value := exact(group)) is not None}
        if known:
            axes.plot(*zip(*sorted(known.items()), strict=True), label="exact target", zorder=5, **_EXACT)
        if floors:
            line = zip(*sorted(floors.items()), strict=True)
            axes.plot(*line, color="0.6", linewidth=4, alpha=0.5, zorder=0, label="exact samples")
            axes.set_yscale("log")
        if axis == "kl_weight":
            axes.set_xscale("log")
        axes.set(xlabel=axis.replace("_", " "), ylabel=what, title=title)
    _legend(figure, places[0])
    figure.suptitle(summary.title, fontsize=10, x=0.02, horizontalalignment="left")
    return figure


def _curve(axes: Axes, found: Sequence[tuple[float, Interval | None]], name: str, style: Style) -> None:
    """Draw one method: means where there are several values at a place, else with a band of the interval."""
    at: dict[float, list[Interval]] = {}
    for place, one in found:
        if one is not None and not math.isnan(one.value):
            at.setdefault(place, []).append(one)
    if not at:
        return
    x, each = zip(*sorted(at.items()), strict=True)
    axes.plot(x, [np.mean([one.value for one in here]) for here in each], label=name, markersize=4, linewidth=1.3,
              **style)  # type: ignore[arg-type]  # fmt: skip
    # On a logarithmic axis the bands of a distance hide each other; the tables have them.
    if all(len(here) == 1 and not math.isnan(here[0].low) and _floor(here[0]) is None for here in each):
        low, high = ([getattr(here[0], end) for here in each] for end in ("low", "high"))
        axes.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)


def _floor(found: Interval | None) -> float | None:
    return found.floor if isinstance(found, DistanceResult) else None


def _floors(group: GroupResult, get: Curve) -> list[float]:
    return [floor for m in group.methods.values() if (floor := _floor(get(m))) is not None]


def _pareto(fronts: Sequence[Front], styles: Mapping[str, Style]) -> Figure:
    width, height = (6.5, 4.6) if len(fronts) == 1 else (4.6, 3.6)
    figure, places = panels(len(fronts), width=width, height=height, beside=1.8, above=0.6)
    for axes, front in zip(places, fronts, strict=True):
        for name, method in front.methods.items():
            style, points, inside = styles[name], np.array(method.points), np.array(method.inside)
            best = points[~inside][np.argsort(points[~inside, 0])]
            axes.plot(*best.T, label=label(name), markersize=5, linewidth=1.2, **style)  # type: ignore[arg-type]
            # Hollow and beside the line: another preference of the same method dominates them.
            hollow: dict[str, Any] = {**style, "linestyle": "none"}
            axes.plot(*points[inside].T, **hollow, markersize=5, mfc="white")
            if not method.intervals:
                continue
            across, along = (_bars([point[i] for point in method.intervals]) for i in (0, 1))
            axes.errorbar(
                points[:, 0], points[:, 1], xerr=across, yerr=along, fmt="none", ecolor=style["color"],
                elinewidth=0.7, alpha=0.5,
            )  # fmt: skip
        if front.target:
            axes.plot(*np.array(sorted(front.target)).T, label="exact target", zorder=5, **_EXACT)
        first, second = front.rewards
        axes.set(xlabel=f"mean {first}", ylabel=f"mean {second}")
        axes.set_title(f"{front.group}, strength {front.strength:g}", fontsize=9)
    _legend(figure, places[0])
    return figure


def _win_rates(groups: Sequence[GroupResult], reference: str, styles: Mapping[str, Style]) -> Figure:
    height = 0.9 + 0.22 * max(len(g.methods) for g in groups)
    figure, places = panels(len(groups), width=4.6, height=height, beside=1.8, above=0.6)
    for axes, group in zip(places, groups, strict=True):
        rates: list[tuple[str, Estimate]] = [
            (name, m.win_rate) for name, m in group.methods.items() if m.win_rate and not math.isnan(m.win_rate.value)
        ]
        for place, (name, rate) in enumerate(reversed(rates)):
            axes.errorbar(rate.value, place, xerr=_bars([rate]), fmt="o", markersize=4, color=styles[name]["color"])
        axes.axvline(0.5, color="0.6", linewidth=1, zorder=0)
        axes.set_yticks(range(len(rates)), [label(name) for name, _ in reversed(rates)], fontsize=7)
        axes.set_title(f"{group.group}, {_preference(group)}, strength {group.strength:g}", fontsize=8)
        axes.set_xlabel(f"win rate over {reference}", fontsize=8)
        axes.tick_params(axis="x", labelsize=7)
    return figure


def _bars(intervals: Sequence[Interval]) -> np.ndarray:
    """Return how far each interval reaches below and above its estimate, (2, n), nan where an end is not known."""
    value, low, high = np.array([(one.value, one.low, one.high) for one in intervals]).T
    # A percentile interval may lie beside its estimate, and a bar may not.
    return np.maximum(np.stack([value - low, high - value]), 0)


def _preference(group: GroupResult) -> str:
    weights = group.weights
    if len(weights) > 1 and len(set(weights)) == 1:
        return "equal weights"
    return "preference " + ", ".join(f"{v:.2g}" for v in weights)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", frameon=False, fontsize=7)


def sheets(stored: Stored) -> dict[str, bytes]:
    """Return one sheet of images a variant and strength as png files, by name; none if no images were kept."""
    found: dict[tuple[str, float], dict[tuple[str, tuple[float, ...]], list[tuple[Path, Row]]]] = {}
    for record, rows, folder in stored.cells:
        if rows and rows[0].image:
            cells = found.setdefault((record.variant, record.strength), {})
            key = record.method, tuple(record.weights.values())
            cells.setdefault(key, []).extend((folder, row) for row in rows)
    out = {}
    for (variant, strength), cells in found.items():
        name = "sheet" + "".join(f"-{part}" for part in (variant, f"strength {strength:g}") if len(found) > 1)
        methods, preferences = (dict.fromkeys(one) for one in zip(*cells, strict=True))
        first = next(iter(cells.values()))
        prompts = list(dict.fromkeys(row.prompt for _, row in first))[:PROMPTS]
        opened: dict[Path, Image.Image] = {}
        sheet = contact_sheet(
            [[_images(cells.get((m, w), []), prompts, opened) for w in preferences] for m in methods],
            rows=[label(method) for method in methods],
            columns=[", ".join(f"{w:.2g}" for w in weights) for weights in preferences],
            title=f"{variant}, strength {strength:g}; columns: weights of {', '.join(first[0][1].preference)}\n"
            + "; ".join(f"“{prompt}”" for prompt in prompts if prompt),
            across=min(len(prompts), 2) * EACH,
        )
        out[name.replace(" ", "-").replace(",", "")] = encoded(sheet)
    return out


def _images(
    rows: Sequence[tuple[Path, Row]], prompts: Sequence[str], opened: dict[Path, Image.Image]
) -> Tensor | None:
    """Return the first images of each prompt, (N, 3, H, W) in [0, 1], or None if one is not there."""
    tiles = []
    for prompt in prompts:
        own = sorted(((row.seed, folder, row) for folder, row in rows if row.prompt == prompt), key=lambda one: one[0])
        for _, folder, row in own[:EACH]:
            assert row.image is not None
            file = folder / row.image.file
            if file not in opened:
                try:
                    with Image.open(file) as image:
                        opened[file] = image.convert("RGB")
                except OSError:
                    return None
            tiles.append(np.asarray(opened[file].crop(row.image.box)) / 255)
    if len(tiles) < EACH * len(prompts):
        return None
    return torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2)
