"""From stored cells to numbers: methods on one group of variants and preference, fronts over preferences, a summary.

Nothing here samples. Cells of one group of variants and preference are compared method by method, on the seeds that all
of them have. Rewards are averaged over samples. A distance is known of a block of seeds, so it is averaged over blocks,
those that have it; differences of distances are between a method and the reference on the same block. A front is over
the preferences of one group and strength, of the methods that have all of them; it needs two rewards and two
preferences.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import numpy as np
from pydantic import JsonValue
from scipy import stats

from sdeblend.evaluate.results import (
    Claim,
    Distance,
    DistanceResult,
    Estimate,
    Front,
    FrontMethod,
    GroupResult,
    Interval,
    MethodResult,
    Summary,
    plain_weights,
)
from sdeblend.evaluate.statistics import (
    Array,
    Resampled,
    Sample,
    bootstrap_counts,
    cell_weights,
    hypervolumes,
    over_cells,
    pareto_front,
)
from sdeblend.evaluate.store import CellRecord, CellRows, Manifest, Row, Stored
from sdeblend.methods.registry import method_of
from sdeblend.preference import Preference

# One model evaluated in two ways differs by the rounding of its chain, which is nobody's merit.
_ROUNDING: Final = 1e-6
# Sets of exact samples that a floor is the mean of, at least.
_FLOORS: Final = 16
Block = tuple[str, str, int]


class Group:
    """The methods on one group of variants and preference.

    Args:
        cells: of the group.
        manifest: which says how results are shown.
        counts: bootstrap draws by (prompts, seeds, variants), shared by all groups.

    Attributes:
        count, blocks: samples and blocks a method. incomplete: whether some method has others, which are left out.
        records: the cells of each method that has samples. absent: why others have none.
        resampled: what its intervals are made of.
    """

    def __init__(
        self, cells: Sequence[CellRows], manifest: Manifest, counts: dict[tuple[int, int, int], Resampled]
    ) -> None:
        self.report, self.reference = manifest.report, manifest.report.reference
        self.absent: dict[str, str] = {}
        by_method: dict[str, list[CellRows]] = {}
        for cell in cells:
            record = cell.record
            if record.failed or record.left_out:
                self.absent[record.method] = f"failed: {record.failed}" if record.failed else record.left_out
            by_method.setdefault(record.method, []).append(cell)
        kept = {name: own for name, own in by_method.items() if name not in self.absent}
        strata = sorted({cell.record.stratum for own in kept.values() for cell in own})
        blocks = [
            {cell.record.first_seed: cell.record.count for cell in own if cell.record.stratum == stratum}
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
        self.count, self.blocks = len(place) * len(strata), len(common) * len(strata)
        paired = {name: [cell for cell in own if cell.record.first_seed in common] for name, own in kept.items()}
        self.records = {name: [cell.record for cell in own] for name, own in paired.items() if common}
        if not common:
            return
        variants = len({variant for variant, _ in strata})
        size = (len(strata) // variants, len(place), variants)
        if size not in counts:
            draws = bootstrap_counts(size[0], size[1], self.report.resamples, variants=variants)
            counts[size] = Resampled(draws, self.report.confidence)
        self.resampled = counts[size]
        rows = {name: [row for cell in own for row in cell.rows] for name, own in paired.items()}
        self._samples = {name: _sample(own, strata, place) for name, own in rows.items()}
        self._weighted = {name: _known([row.weighted for row in own]) for name, own in rows.items()}
        self._rewards = {
            name: {reward: _known([row.rewards[reward] for row in own]) for reward in own[0].rewards}
            for name, own in rows.items()
        }

    def target(self) -> dict[str, float]:
        """Return the mean of each reward under the exact target, over variants and prompts alike; empty if unknown."""
        each = {record.stratum: record.target for own in self.records.values() for record in own}
        means = {name: _average([found.get(name) for found in each.values()]) for name in next(iter(each.values()), {})}
        return {name: value for name, value in means.items() if value is not None}

    def claims(self) -> list[Claim]:
        """Return the pairs of the claimed order with what was found."""
        return [
            Claim(low=low, high=high, strict=strict, difference=self.difference(high, low))
            for low, high, strict in self.report.claimed(self.records)
        ]

    def difference(self, name: str, other: str) -> Estimate:
        """Return by how much a method's mean r(w) exceeds another's, paired."""
        (mean, drawn), (base, base_drawn) = (
            self.resampled.mean(self._samples[m], self._weighted[m]) for m in (name, other)
        )
        interval = self.resampled.interval(mean - base, drawn - base_drawn)
        return _estimate(interval, significant=_significant(interval, self._weighted[other]))

    def mean(self, name: str, reward: str) -> tuple[float, Array]:
        """Return a method's mean of one reward, and that of each resample."""
        return self.resampled.mean(self._samples[name], self._rewards[name][reward])

    def result(self, name: str) -> MethodResult:
        """Return what a method gave."""
        sample, records = self._samples[name], self.records[name]
        rewards, weighted = self._rewards[name], self._weighted[name]
        difference = win_rate = None
        if self.reference in self.records and name != self.reference:
            others = self._samples[self.reference], self._weighted[self.reference]
            difference = self.difference(name, self.reference)
            rate = self.resampled.win_rate(sample, weighted, *others)
            win_rate = _estimate(rate, significant=rate.excludes(0.5))
        return MethodResult(
            effective=sample.effective,
            effective_share=sample.effective / len(weighted),
            missing=int(np.isnan(np.stack(list(rewards.values()))).any(0).sum()),
            rewards={reward: self.resampled.interval(*self.mean(name, reward)) for reward in rewards},
            weighted=self.resampled.interval(*self.resampled.mean(sample, weighted)),
            distances={measure: self._distance(name, measure) for measure in _named(r.distances for r in records)},
            measures={
                measure: _average([r.measures.get(measure) for r in records])
                for measure in _named(r.measures for r in records)
            },
            certificate=_average([r.facts.get("certificate") for r in records]),
            ess=_average([r.facts.get("ess") for r in records]),
            model_calls=_mean([r.model_calls for r in records]),
            gradient_calls=_mean([r.gradient_calls for r in records]),
            reward_calls=_mean([r.reward_calls for r in records]),
            seconds=_mean([r.seconds for r in records]),
            difference=difference,
            win_rate=win_rate,
        )

    def _distance(self, name: str, measure: str) -> DistanceResult:
        """Return one distance of a method: over which blocks, beside what exact samples have, and less the reference's.

        A block of which it is not known is left out; ``cells`` of ``of`` says how many are not.
        """
        of, found = len(self.records[name]), _blocks(self.records[name], measure)
        if not found:
            return DistanceResult(value=math.nan, low=math.nan, high=math.nan, of=of)
        mean, over = self._over({block: distance.value for block, distance in found.items()})
        floor = above = difference = None
        floors = [(d.floor, d.floor_sd) for d in found.values() if d.floor is not None and d.floor_sd is not None]
        if len(floors) == len(found):
            weights = cell_weights([v for v, _, _ in found], [p for _, p, _ in found])
            floor = float(weights @ [one for one, _ in floors])
            # Exact samples would give as many blocks of this spread; the floor itself is known from sixteen.
            variance = np.array([sd**2 for _, sd in floors])
            spread = math.sqrt(weights**2 @ variance + weights @ variance / _FLOORS)
            above = mean.value - floor > float(stats.t.ppf((1 + self.report.confidence) / 2, _FLOORS - 1)) * spread
        if name != self.reference and self.reference in self.records:
            theirs = _blocks(self.records[self.reference], measure)
            both = {block: d.value - theirs[block].value for block, d in found.items() if block in theirs}
            if both:
                interval, blocks = self._over(both)
                size = np.array([d.value for d in theirs.values()])
                difference = _estimate(
                    interval, significant=_significant(interval, size), over=blocks, cells=len(both), of=of
                )
        return DistanceResult(
            **dict(mean), over=over, cells=len(found), of=of, floor=floor, above_floor=above, difference=difference
        )

    def _over(self, values: Mapping[Block, float]) -> tuple[Interval, str]:
        blocks = list(values)
        return over_cells(
            list(values.values()), [v for v, _, _ in blocks], [p for _, p, _ in blocks], self.report.confidence
        )


def _estimate(
    interval: Interval, *, significant: bool, over: str = "", cells: int = 0, of: int = 0
) -> Estimate:
    return Estimate(**dict(interval), significant=significant, over=over, cells=cells, of=of)


def _significant(difference: Interval, values: Array) -> bool:
    """Return whether a difference is neither chance nor rounding, beside values of this size."""
    size = float(np.abs(values[np.isfinite(values)]).max(initial=0))
    return difference.excludes(0) and abs(difference.value) > _ROUNDING * size


def _blocks(records: Iterable[CellRecord], measure: str) -> dict[Block, Distance]:
    """Return the distance of each block that has it."""
    found = {record.block: record.distances[measure] for record in records if measure in record.distances}
    return {block: distance for block, distance in found.items() if not math.isnan(distance.value)}


def _named(each: Iterable[Mapping[str, object]]) -> list[str]:
    """Return the names that any of some mappings has."""
    return list(dict.fromkeys(name for one in each for name in one))


def _known(values: Sequence[float | None]) -> Array:
    """Return one number a row, nan where there is none."""
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _sample(rows: Sequence[Row], strata: Sequence[tuple[str, str]], place: Mapping[int, int]) -> Sample:
    stratum = np.array([strata.index((row.variant, row.prompt)) for row in rows])
    unit = stratum * len(place) + np.array([place[row.ancestor] for row in rows])
    # A weight of zero has no logarithm to store.
    weight = np.array([0.0 if row.log_weight is None else math.exp(row.log_weight) for row in rows])
    return Sample(unit, weight, stratum)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _average(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return _mean(there) if there else None


Groups = dict[tuple[str, Preference], Group]


def summarise(stored: Stored) -> Summary:
    """Return all numbers of one configuration."""
    manifest, report = stored.manifest, stored.manifest.report
    names = {variant.name: variant.together for variant in manifest.variants}
    cells: dict[tuple[str, Preference], list[CellRows]] = {}
    for cell in stored.cells:
        cells.setdefault((names[cell.record.variant], cell.record.preference), []).append(cell)
    counts: dict[tuple[int, int, int], Resampled] = {}
    groups = {key: Group(own, manifest, counts) for key, own in cells.items()}
    return Summary(
        title=manifest.title,
        note=report.note,
        confidence=report.confidence,
        reference=report.reference,
        rewards=None if manifest.rewards is None else list(manifest.rewards),
        options={name: _chosen(name, options) for name, options in stored.options.items()},
        groups=[_result(stored, name, preference, group) for (name, preference), group in groups.items()],
        fronts=_fronts(groups, manifest),
        published=list(manifest.published),
    )


def _result(stored: Stored, name: str, preference: Preference, group: Group) -> GroupResult:
    variants = [variant for variant in stored.manifest.variants if variant.together == name]
    own = {variant.name for variant in variants}
    return GroupResult(
        group=name,
        values=dict(variants[0].values),
        preference=preference,
        scales={r.name: r.scale for r in stored.manifest.rewards or () if own & set(r.variants)},
        n=group.count,
        blocks=group.blocks,
        incomplete=group.incomplete,
        methods={method: group.result(method) for method in group.records},
        absent=group.absent,
        target=group.target(),
        order=group.claims(),
    )


def _chosen(name: str, options: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """Return the options of a method that are not its defaults."""
    method = method_of(name)
    defaults = {} if method is None else method.options().model_dump()
    return {key: value for key, value in options.items() if key not in defaults or defaults[key] != value}


def _fronts(groups: Groups, manifest: Manifest) -> list[Front]:
    out, report = [], manifest.report
    for name, strength in dict.fromkeys((name, float(preference.strength)) for name, preference in groups):
        own = {p: group for (n, p), group in groups.items() if (n, p.strength) == (name, strength)}
        first, rewards = next(iter(own.values())), list(plain_weights(next(iter(own))))
        methods = [m for m in first.records if all(m in group.records for group in own.values())]
        if len(own) < 2 or len(rewards) < 2 or not methods:
            continue
        means = {m: [[group.mean(m, reward) for reward in rewards] for group in own.values()] for m in methods}
        points = {m: np.array([[value for value, _ in point] for point in found]) for m, found in means.items()}
        if not all(np.isfinite(p).all() for p in points.values()):
            continue
        drawn = {
            m: np.stack([np.stack([d for _, d in point], 1) for point in found], 1) for m, found in means.items()
        }
        reference = list(report.hypervolume_reference)
        if len(reference) != len(rewards):
            everything = np.concatenate(list(points.values()))
            reference = (everything.min(0) - 0.05 * np.ptp(everything, axis=0)).tolist()
        over = report.hypervolume_over or report.reference
        volumes = hypervolumes(points, drawn, reference, first.resampled, over)
        targets = [group.target() for group in own.values()]
        known = all(set(rewards) <= set(target) for target in targets)
        out.append(
            Front(
                group=name,
                strength=strength,
                rewards=rewards,
                preferences=[list(plain_weights(preference).values()) for preference in own],
                reference_point=reference,
                ratio_over=over,
                target=[[target[r] for r in rewards] for target in targets] if known else [],
                n=first.count,
                methods={
                    m: FrontMethod(
                        points=points[m].tolist(),
                        intervals=[[first.resampled.interval(*mean) for mean in point] for point in means[m]],
                        dominated=(~pareto_front(points[m])).tolist(),
                        hypervolume=volumes[m][0],
                        ratio=volumes[m][1],
                    )
                    for m in methods
                },
            )
        )
    return out
