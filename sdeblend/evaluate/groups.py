"""The methods on one group of variants, preference and strength, compared on the seeds that all of them have.

Rewards are averaged over samples. A distance is known of a block of seeds, so it is averaged over blocks, those that
have it; differences of distances are between a method and the reference on the same block.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from sdeblend.evaluate.measures import (
    Array,
    Interval,
    Resampled,
    Sample,
    bootstrap_counts,
    cell_weights,
    each_row,
    over_cells,
)
from sdeblend.evaluate.report import claimed_pairs
from sdeblend.evaluate.rows import Row
from sdeblend.methods.method import Method
from sdeblend.methods.registry import METHODS

Head = Mapping[str, Any]
Cells = list[tuple[dict[str, Any], list[Row]]]
_FACTS = ("certificate", "ess")
# What the distance and the costs of one group mean is an average over its cells.
_COSTS = ("model_calls", "gradient_calls", "reward_calls", "seconds")
# One model evaluated in two ways differs by the rounding of its chain, which is nobody's merit.
_ROUNDING = 1e-6
# Sets of exact samples that a floor is the mean of, at least.
_FLOORS = 16


def method_of(name: str) -> Method | None:
    """Return the method that results go by this name of, options in brackets left out; None if there is none now."""
    return METHODS.get(name.partition(" (")[0])


class Group:
    """The methods on one group of variants, preference and strength.

    Args:
        cells: of the group.
        report: how results are told.
        counts: bootstrap draws by (prompts, seeds, variants), shared by all groups.
    """

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
        return {
            "n": self.count, "blocks": self.blocks, "incomplete": self.incomplete,
            "methods": {name: self._method(name) for name in self.cells},
            "absent": self.absent, "target": self.target(),
            "order": [
                {"low": low, "high": high, "strict": strict, "difference": self.difference(high, low)}
                for low, high, strict in claimed_pairs(self.order, self.cells)
            ],
        }  # fmt: skip

    def target(self) -> dict[str, float]:
        """Return the mean of each reward under the exact target, over variants and prompts alike; empty if unknown."""
        each = {(h["variant"], h["prompt"]): h.get("target", {}) for own in self.cells.values() for h, _ in own}
        means = {name: _average([found.get(name) for found in each.values()]) for name in next(iter(each.values()), {})}
        return {name: value for name, value in means.items() if value is not None}

    def difference(self, name: str, other: str) -> dict[str, Any]:
        """Return by how much a method's mean r(w) exceeds another's, paired."""
        own, others = (each_row(self.rows[m], lambda row: row["weighted"]) for m in (name, other))
        (mean, drawn), (base, base_drawn) = (
            self.resampled.mean(self.samples[m], values) for m, values in ((name, own), (other, others))
        )
        interval = self.resampled.interval(mean - base, drawn - base_drawn)
        return {**interval.listed(), "significant": _significant(interval, others)}

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
                reward: self.resampled.interval(*self.mean(name, reward)).listed() for reward in rows[0]["rewards"]
            },
            "weighted": self.resampled.interval(mean, drawn).listed(),
            "distances": {measure: self._distance(name, measure) for measure in _named(heads, "distances")},
            "measures": {
                name: _average([head["measures"].get(name) for head in heads]) for name in _named(heads, "measures")
            },
            **{fact: _average([head["facts"].get(fact) for head in heads]) for fact in _FACTS},
            **{cost: _average([head[cost] for head in heads]) for cost in _COSTS},
        }
        if self.reference in self.cells and name != self.reference:
            other = self.samples[self.reference]
            others = each_row(self.rows[self.reference], lambda row: row["weighted"])
            out["difference"] = self.difference(name, self.reference)
            rate = self.resampled.win_rate(sample, weighted, other, others)
            out["win_rate"] = {**rate.listed(), "significant": rate.excludes(0.5)}
        return out

    def _distance(self, name: str, measure: str) -> dict[str, Any]:
        """Return one distance of a method: over which blocks, beside what exact samples have, and less the reference's.

        A block of which it is not known is left out; ``cells`` of ``of`` says how many are not.
        """
        cells = self.cells[name]
        found = _known(cells, measure)
        if not found:
            return {"value": None, "low": None, "high": None, "over": "", "cells": 0, "of": len(cells)}
        out, _ = self._over({place: value for place, (value, _, _) in found.items()}, len(cells))
        floors = [(floor, sd) for _, floor, sd in found.values() if floor is not None and sd is not None]
        if len(floors) == len(found):
            weights = cell_weights([v for v, _, _ in found], [p for _, p, _ in found])
            floor = float(weights @ [one for one, _ in floors])
            # Exact samples would give as many blocks of this spread; the floor itself is known from sixteen.
            variance = np.array([sd**2 for _, sd in floors])
            spread = math.sqrt(weights**2 @ variance + weights @ variance / _FLOORS)
            bound = float(stats.t.ppf((1 + self.confidence) / 2, _FLOORS - 1)) * spread
            out |= {"floor": floor, "above_floor": out["value"] - floor > bound}
        if name != self.reference and self.reference in self.cells:
            theirs = _known(self.cells[self.reference], measure)
            both = {place: value - theirs[place][0] for place, (value, _, _) in found.items() if place in theirs}
            if both:
                told, interval = self._over(both, len(cells))
                scale = np.array([value for value, _, _ in theirs.values()])
                out["difference"] = told | {"significant": _significant(interval, scale)}
        return out

    def _over(self, values: Mapping[tuple[str, str, int], float], of: int) -> tuple[dict[str, Any], Interval]:
        interval, over = over_cells(
            list(values.values()), [v for v, _, _ in values], [p for _, p, _ in values], self.confidence
        )
        return {**interval.listed(), "over": over, "cells": len(values), "of": of}, interval


def _significant(difference: Interval, values: Array) -> bool:
    """Return whether a difference is neither chance nor rounding, beside values of this size."""
    size = float(np.abs(values[np.isfinite(values)]).max(initial=0))
    return difference.excludes(0) and abs(difference.value) > _ROUNDING * size


def _known(cells: Cells, measure: str) -> dict[tuple[str, str, int], tuple[float, float | None, float | None]]:
    """Return (distance, floor, its deviation) of each (variant, prompt, block) that has the distance."""
    found = {(h["variant"], h["prompt"], h["first_seed"]): h["distances"].get(measure) for h, _ in cells}
    return {place: tuple(three) for place, three in found.items() if three is not None and three[0] is not None}


def _named(heads: Iterable[Head], what: str) -> list[str]:
    """Return the names of distances or measures that any cell has."""
    return list(dict.fromkeys(name for head in heads for name in head.get(what, {})))


def _sample(rows: Sequence[Row], strata: Sequence[tuple[str, str]], place: Mapping[int, int]) -> Sample:
    stratum = np.array([strata.index((row["variant"], row["prompt"])) for row in rows])
    unit = stratum * len(place) + np.array([place[row["ancestor"]] for row in rows])
    # A weight of zero has no logarithm to store.
    weight = np.array([0.0 if row["log_weight"] is None else math.exp(row["log_weight"]) for row in rows])
    return Sample(unit, weight, stratum)


def _average(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None
