"""From stored cells to numbers: what tables and figures tell, as one object that JSON can hold.

Nothing here samples. Cells of one group of variants, preference and strength are compared method by method, on the
seeds that all of them have; distances are averaged over blocks, which are independent replicates. A hypervolume needs
two rewards and two preferences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from sdeblend.evaluate.measures import (
    Array,
    Interval,
    Resampled,
    Sample,
    bootstrap_counts,
    each_row,
    hypervolumes,
    over_replicates,
)
from sdeblend.evaluate.methods import METHODS
from sdeblend.evaluate.rows import Folder, Row

Cells = list[tuple[dict[str, Any], list[Row]]]
_FACTS = ("certificate", "ess")
# What the distance and the costs of one group mean is an average over its cells.
_COSTS = ("model_calls", "gradient_calls", "reward_calls", "seconds")


@dataclass(frozen=True)
class Stored:
    """Results of one configuration, from one folder or several.

    Attributes:
        manifest: of the first folder.
        cells: each once.
        folders: where each cell lies.
    """

    manifest: Mapping[str, Any]
    cells: Cells
    folders: Sequence[Path] = ()


def load(folders: Sequence[Folder]) -> list[Stored]:
    """Read results; folders that sampled the same problems with the same seed are told together.

    Raises:
        ValueError: for a folder without results, or with a damaged cell.
    """
    found: dict[str, tuple[Mapping[str, Any], dict[str, tuple[dict[str, Any], list[Row], Path]]]] = {}
    for folder in folders:
        manifest = folder.manifest()
        keys = folder.stored()
        if manifest is None or not keys:
            raise ValueError(f"{folder.path}: holds no results; name a folder that 'sdeblend evaluate' wrote")
        fixed = manifest["fixed"]
        same = {k: v for k, v in fixed.items() if k in ("kind", "seed") or k.startswith(("backend.", "identity."))}
        _, cells = found.setdefault(repr(sorted(same.items())), (manifest, {}))
        for key in keys:
            if key not in cells:
                cells[key] = (*folder.read(key), folder.path)
    out = []
    for pinned, own in found.values():
        ordered = sorted(own.values(), key=lambda cell: cell[0]["index"])
        out.append(Stored(pinned, [cell[:2] for cell in ordered], [cell[2] for cell in ordered]))
    return out


def summarise(stored: Stored) -> dict[str, Any]:
    """Return all numbers of one configuration.

    Args:
        stored: what ``load`` read.

    Returns:
        title, confidence, reference, groups (one a group of variants, preference and strength) and fronts.
    """
    manifest, report = stored.manifest, stored.manifest["report"]
    together = {v["name"]: v for v in manifest["variants"]}
    grouped: dict[tuple[str, tuple[tuple[str, float], ...], float], Cells] = {}
    for head, rows in stored.cells:
        key = together[head["variant"]]["group"], tuple(head["weights"].items()), head["strength"]
        grouped.setdefault(key, []).append((head, rows))
    counts: dict[tuple[int, int, int], Resampled] = {}
    groups, curves = [], {}
    for (name, weights, strength), cells in grouped.items():
        group = _Group(cells, report, counts)
        values = next(v["values"] for v in manifest["variants"] if v["group"] == name)
        groups.append(
            {
                "group": name,
                "values": values,
                "preference": dict(weights),
                "strength": strength,
                **group.numbers(),
            }
        )
        curves[name, weights, strength] = group
    return {
        "title": manifest["title"],
        "confidence": report["confidence"],
        "reference": report["reference"],
        "groups": groups,
        "fronts": _fronts(curves, report),
        "published": manifest.get("published", []),
    }


class _Group:
    """The methods on one group of variants, preference and strength."""

    def __init__(
        self, cells: Cells, report: Mapping[str, Any], counts: dict[tuple[int, int, int], Resampled]
    ) -> None:
        self.reference, self.confidence = report["reference"], report["confidence"]
        self.order: Sequence[str] = report.get("order", ())
        self.weights: dict[str, float] = cells[0][0]["weights"]
        self.absent: dict[str, str] = {}
        by_method: dict[str, Cells] = {}
        for head, rows in cells:
            why = head.get("failed") or head.get("left_out")
            if why:
                self.absent[head["method"]] = f"failed: {why}" if head.get("failed") else why
            by_method.setdefault(head["method"], []).append((head, rows))
        kept = {name: own for name, own in by_method.items() if name not in self.absent}
        strata = sorted({(h["variant"], h["prompt"]) for own in kept.values() for h, _ in own})
        blocks = [
            {h["first_seed"]: h["count"] for h, _ in own if (h["variant"], h["prompt"]) == stratum}
            for own in kept.values()
            for stratum in strata
        ]
        # Only what every method has can be paired: the rest of a run that is not finished waits.
        common = sorted(set.intersection(*map(set, blocks))) if blocks else []
        self.incomplete = any(set(found) != set(common) for found in blocks)
        place: dict[int, int] = {}
        for first in common:
            for seed in range(first, first + blocks[0][first]):
                place[seed] = len(place)
        self.count = len(place) * len(strata)
        self.blocks = len(common) * len(strata)
        self.cells = {
            name: [(h, rows) for h, rows in own if h["first_seed"] in set(common)] for name, own in kept.items()
        }
        if not common:
            self.cells = {}
            return
        variants = len({variant for variant, _ in strata})
        size = (len(strata) // variants, len(place), variants)
        if size not in counts:
            counts[size] = Resampled(
                bootstrap_counts(size[0], size[1], report["resamples"], variants=variants), self.confidence
            )
        self.resampled = counts[size]
        self.rows = {name: [row for _, rows in own for row in rows] for name, own in self.cells.items()}
        self.samples = {name: _sample(rows, strata, place) for name, rows in self.rows.items()}

    def numbers(self) -> dict[str, Any]:
        """Return what is told of each method."""
        methods = {name: self._method(name) for name in self.cells}
        claimed = [name for name in self.order if name in self.cells]
        return {
            "n": self.count, "blocks": self.blocks, "incomplete": self.incomplete, "methods": methods,
            "absent": self.absent, "target": self.target(),
            "order": [{"low": a, "high": b, "difference": self.difference(b, a)} for a, b in pairwise(claimed)],
        }  # fmt: skip

    def target(self) -> dict[str, float]:
        """Return the mean of each reward under the exact target, over variants and prompts alike; empty if unknown."""
        each = {(h["variant"], h["prompt"]): h.get("target", {}) for own in self.cells.values() for h, _ in own}
        means = {name: _average([found.get(name) for found in each.values()]) for name in next(iter(each.values()), {})}
        return {name: value for name, value in means.items() if value is not None}

    def difference(self, name: str, other: str) -> dict[str, Any]:
        """Return by how much a method's mean r(w) exceeds another's, paired."""
        (mean, drawn), (base, base_drawn) = (
            self.resampled.mean(self.samples[m], each_row(self.rows[m], lambda row: row["weighted"]))
            for m in (name, other)
        )
        interval = self.resampled.interval(mean - base, drawn - base_drawn)
        return {**_listed(interval), "significant": interval.excludes(0)}

    def mean(self, name: str, reward: str) -> tuple[float, Array]:
        """Return a method's mean of one reward, and that of each resample."""
        return self.resampled.mean(self.samples[name], each_row(self.rows[name], lambda row: row["rewards"][reward]))

    def _method(self, name: str) -> dict[str, Any]:
        rows, sample, heads = self.rows[name], self.samples[name], [head for head, _ in self.cells[name]]
        weighted = each_row(rows, lambda row: row["weighted"])
        mean, drawn = self.resampled.mean(sample, weighted)
        out: dict[str, Any] = {
            "effective": sample.effective,
            "effective_share": sample.effective / len(rows),
            "missing": int(sum(None in row["rewards"].values() for row in rows)),
            "rewards": {
                reward: _listed(self.resampled.interval(*self.mean(name, reward))) for reward in rows[0]["rewards"]
            },
            "weighted": _listed(self.resampled.interval(mean, drawn)),
            "distances": self._distances(heads),
            "measures": {
                name: _average([head["measures"].get(name) for head in heads]) for name in heads[0].get("measures", {})
            },
            **{fact: _average([head["facts"].get(fact) for head in heads]) for fact in _FACTS},
            **{cost: _average([head[cost] for head in heads]) for cost in _COSTS},
        }
        if self.reference in self.cells and name != self.reference:
            other = self.samples[self.reference]
            others = each_row(self.rows[self.reference], lambda row: row["weighted"])
            out["difference"] = self.difference(name, self.reference)
            rate = self.resampled.win_rate(sample, weighted, other, others)
            out["win_rate"] = {**_listed(rate), "significant": rate.excludes(0.5)}
        return out

    def _distances(self, heads: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for name in heads[0]["distances"]:
            found = [head["distances"][name] for head in heads]
            values = [value for value, _, _ in found]
            if None in values:
                continue
            out[name] = _listed(over_replicates(values, self.confidence))
            if not any(None in entry for entry in found):
                excess = float(np.mean([value - floor for value, floor, _ in found]))
                # Exact samples would give as many blocks of this spread; the floor itself is known from sixteen.
                spread = math.sqrt(sum(sd**2 for _, _, sd in found) * (1 / len(found) + 1 / 16) / len(found))
                bound = float(stats.t.ppf((1 + self.confidence) / 2, 15)) * spread
                out[name] |= {"floor": float(np.mean([floor for _, floor, _ in found])), "above_floor": excess > bound}
        return out


def _sample(rows: Sequence[Row], strata: Sequence[tuple[str, str]], place: Mapping[int, int]) -> Sample:
    stratum = np.array([strata.index((row["variant"], row["prompt"])) for row in rows])
    unit = stratum * len(place) + np.array([place[row["ancestor"]] for row in rows])
    # A weight of zero has no logarithm to store.
    weight = np.array([0.0 if row["log_weight"] is None else math.exp(row["log_weight"]) for row in rows])
    return Sample(unit, weight, stratum)


def _fronts(groups: Mapping[tuple[str, Any, float], _Group], report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return Pareto fronts over the preferences of each group of variants and strength."""
    out = []
    for name, strength in dict.fromkeys((name, strength) for name, _, strength in groups):
        own = [(dict(w), group) for (n, w, s), group in groups.items() if (n, s) == (name, strength)]
        rewards = list(own[0][0])
        if len(own) < 2 or len(rewards) < 2:
            continue
        methods = [m for m in own[0][1].cells if all(m in group.cells for _, group in own)]
        means = {m: [[group.mean(m, reward) for reward in rewards] for _, group in own] for m in methods}
        points = {m: np.array([[value for value, _ in point] for point in found]) for m, found in means.items()}
        if not methods or not all(np.isfinite(p).all() for p in points.values()):
            continue
        drawn = {
            m: np.stack([np.stack([d for _, d in point], 1) for point in found], 1) for m, found in means.items()
        }
        reference = report["hypervolume_reference"]
        if len(reference) != len(rewards):
            everything = np.concatenate(list(points.values()))
            reference = (everything.min(0) - 0.05 * np.ptp(everything, axis=0)).tolist()
        resampled = own[0][1].resampled
        over = report.get("hypervolume_over") or report["reference"]
        volumes = hypervolumes(points, drawn, reference, resampled, over)
        exact = [[group.target().get(reward) for reward in rewards] for _, group in own]
        out.append(
            {
                "group": name,
                "strength": strength,
                "rewards": rewards,
                "preferences": [list(w.values()) for w, _ in own],
                "reference_point": list(reference),
                "ratio_over": over,
                "target": [] if any(None in point for point in exact) else exact,
                "n": own[0][1].count,
                "methods": {
                    m: {
                        "points": points[m].tolist(),
                        "hypervolume": _listed(volumes[m][0]),
                        "ratio": None if (ratio := volumes[m][1]) is None else _listed(ratio),
                    }
                    for m in methods
                },
            }
        )
    return out


def _listed(interval: Interval) -> dict[str, float | None]:
    return {key: v if math.isfinite(v := getattr(interval, key)) else None for key in ("value", "low", "high")}


def _average(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def label(method: str) -> str:
    """Return what people call a method."""
    return METHODS[method].label if method in METHODS else method
