"""From stored cells to numbers: what tables and figures show, as one object that JSON can hold.

Nothing here samples. Cells of one group of variants, preference and strength are compared method by method, on the
seeds that all of them have. A front is over the preferences of one group and strength, of the methods that have all of
them; it needs two rewards and two preferences.
"""

from __future__ import annotations

import numpy as np
from pydantic import JsonValue

from sdeblend.evaluate.codec import plain_weights
from sdeblend.evaluate.groups import Group
from sdeblend.evaluate.plan import Report
from sdeblend.evaluate.results import Front, FrontMethod, GroupResult, Summary
from sdeblend.evaluate.statistics import Resampled, hypervolumes, pareto_front
from sdeblend.evaluate.store import CellRows, Stored
from sdeblend.methods.registry import method_of
from sdeblend.preference import Preference

Groups = dict[tuple[str, Preference], Group]


def summarise(stored: Stored) -> Summary:
    """Return all numbers of one configuration."""
    manifest, report = stored.manifest, stored.manifest.report
    names = {variant.name: variant.together for variant in manifest.variants}
    cells: dict[tuple[str, Preference], list[CellRows]] = {}
    for cell in stored.cells:
        cells.setdefault((names[cell.record.variant], cell.record.preference), []).append(cell)
    counts: dict[tuple[int, int, int], Resampled] = {}
    groups = {key: Group(own, report, counts) for key, own in cells.items()}
    return Summary(
        title=manifest.title,
        note=report.note,
        confidence=report.confidence,
        reference=report.reference,
        rewards=None if manifest.rewards is None else list(manifest.rewards),
        options={name: _chosen(name, options) for name, options in stored.options.items()},
        groups=[_result(stored, name, preference, group) for (name, preference), group in groups.items()],
        fronts=_fronts(groups, report),
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


def _fronts(groups: Groups, report: Report) -> list[Front]:
    out = []
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
