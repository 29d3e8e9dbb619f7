"""Pareto fronts over the preferences of each group of variants and strength: points, hypervolume, what is dominated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sdeblend.evaluate.groups import Group
from sdeblend.evaluate.measures import hypervolumes, pareto_front


def fronts(groups: Mapping[tuple[str, Any, float], Group], report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the fronts, each with the methods that have all of its preferences.

    Args:
        groups: by name, preference and strength.
        report: how results are told.
    """
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
                        "intervals": [[resampled.interval(*mean).listed() for mean in point] for point in means[m]],
                        "dominated": (~pareto_front(points[m])).tolist(),
                        "hypervolume": volumes[m][0].listed(),
                        "ratio": None if (ratio := volumes[m][1]) is None else ratio.listed(),
                    }
                    for m in methods
                },
            }
        )
    return out
