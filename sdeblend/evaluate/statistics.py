"""Statistics of an evaluation: paired bootstrap, win rates, Pareto fronts and hypervolume, distances over replicates.

The unit of resampling is a seed of a prompt: all methods and preferences saw the same start and step noise there, so
that the same resampled seeds serve them all, and differences are paired. Prompts are resampled first where there are
several, seeds within them next; variants that are replicates of each other stay (they were chosen, not drawn).
A distance has one value a block of seeds, whose variance is likewise that within a variant (``over_cells``).
With log weights w_i the mean of f is sum w_i f_i / sum w_i; samples that were resampled on the way count for the seed
they descend from, since families and not samples are independent (Lee and Whiteley). Intervals are percentiles.

Win rate: P(r(x) > r(y)) + P(r(x) = r(y)) / 2 for independent samples x of the method and y of the reference, of one
prompt (Mann and Whitney); its interval bootstraps the placements r(x) -> P(r(x) > r(y)) of both sides (DeLong).

Source: Efron and Tibshirani 1993, chapters 8 and 13; Lee and Whiteley 2018; DeLong et al. 1988.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from sdeblend.evaluate.results import Interval

Array = NDArray[np.float64]
_CHUNK = 100


def bootstrap_counts(prompts: int, seeds: int, resamples: int, *, seed: int = 0, variants: int = 1) -> np.ndarray:
    """Return how often each unit is drawn in each resample.

    Args:
        prompts: of a variant; resampled if more than one.
        seeds: of a prompt.
        resamples: R.
        seed: of the draws; the same for everything that is to be paired.
        variants: strata.

    Returns:
        uint16 (R, variants * prompts * seeds), variant by variant, prompt by prompt.
    """
    rng = np.random.default_rng(seed)
    out = np.empty((resamples, variants * prompts, seeds), dtype=np.uint16)
    for resample in range(resamples):
        for first in range(0, variants * prompts, prompts):
            drawn = np.ones(1, dtype=np.int64)
            if prompts > 1:
                drawn = np.bincount(rng.integers(0, prompts, prompts), minlength=prompts)
            for prompt, times in enumerate(drawn):
                picked = rng.integers(0, seeds, int(times) * seeds)
                out[resample, first + prompt] = np.bincount(picked, minlength=seeds)
    return out.reshape(resamples, -1)


@dataclass(frozen=True)
class Sample:
    """What one method gave, one entry a sample.

    Attributes:
        unit: which unit each sample belongs to (the seed it descends from), (n,).
        weight: not negative, of mean one in each block, (n,).
        stratum: which (variant, prompt) it is from, (n,).
    """

    unit: np.ndarray
    weight: Array
    stratum: np.ndarray

    @property
    def effective(self) -> float:
        """How many independent samples of equal weight it is worth: one over the sum of squared family weights."""
        families = np.bincount(self.unit, self.weight)
        return float(families.sum() ** 2 / (families**2).sum())


class Resampled:
    """Means over bootstrap resamples, all from the same draws.

    Args:
        counts: (R, units), from ``bootstrap_counts``.
        confidence: of the intervals.
    """

    def __init__(self, counts: np.ndarray, confidence: float = 0.95) -> None:
        self.counts, self.confidence = counts, confidence

    def mean(self, sample: Sample, values: Array) -> tuple[float, Array]:
        """Return the weighted mean of ``values`` (n,), nan left out, and that of each resample (R,)."""
        there = np.isfinite(values)
        units = self.counts.shape[1]
        weight = np.where(there, sample.weight, 0.0)
        sums = np.stack(
            [np.bincount(sample.unit, w, minlength=units) for w in (weight * np.where(there, values, 0.0), weight)], 1
        )
        drawn = np.concatenate(
            [self.counts[i : i + _CHUNK].astype(np.float64) @ sums for i in range(0, len(self.counts), _CHUNK)]
        )
        total = sums.sum(0)
        with np.errstate(invalid="ignore", divide="ignore"):
            return float(total[0] / total[1]), drawn[:, 0] / drawn[:, 1]

    def interval(self, value: float, resampled: Array) -> Interval:
        """Return the percentile interval."""
        there = resampled[np.isfinite(resampled)]
        if len(there) < 2:
            return Interval(value=value, low=np.nan, high=np.nan)
        tail = (1 - self.confidence) / 2
        low, high = np.quantile(there, [tail, 1 - tail])
        return Interval(value=value, low=low, high=high)

    def win_rate(self, sample: Sample, values: Array, other: Sample, others: Array) -> Interval:
        """Return the win rate of ``values`` over ``others``, compared within each stratum; nan counts for neither."""
        above, below = np.full(len(values), np.nan), np.full(len(others), np.nan)
        for stratum in np.unique(sample.stratum):
            a, b = sample.stratum == stratum, other.stratum == stratum
            if not b.any():
                continue
            above[a] = placements(values[a], others[b], other.weight[b])
            below[b] = 1 - placements(others[b], values[a], sample.weight[a])
        value, first = self.mean(sample, above)
        _, second = self.mean(other, below)
        return self.interval(value, first + second - value)


def placements(values: Array, others: Array, weight: Array) -> Array:
    """Return P(other < value) + P(other = value) / 2 for each value, (n,).

    Args:
        values: (n,).
        others: (m,); nan is left out.
        weight: of the others, (m,).
    """
    there = np.isfinite(others)
    order = np.argsort(others[there], kind="stable")
    ordered, mass = others[there][order], np.concatenate([[0.0], weight[there][order].cumsum()])
    if not len(ordered) or mass[-1] == 0:
        return np.full(len(values), np.nan)
    low, high = (np.searchsorted(ordered, values, side=side) for side in ("left", "right"))
    share: Array = (mass[low] + mass[high]) / (2 * mass[-1])
    return np.where(np.isfinite(values), share, np.nan)


def pareto_front(points: Array) -> np.ndarray:
    """Return which points (n, m) no other point dominates, all maximised, bool (n,); of equal points all count."""
    at_least = (points[:, None] >= points[None]).all(2)
    better = (points[:, None] > points[None]).any(2)
    return np.asarray(~(at_least & better).any(0))


def hypervolume(points: Array, reference: Sequence[float]) -> float:
    """Return the volume between ``reference`` and the points (n, m), all maximised.

    Args:
        points: (n, m).
        reference: (m,); points that are not above it in every coordinate add nothing.

    Source: moocore (Fonseca et al. 2006, dimension sweep).
    """
    import moocore

    return float(moocore.hypervolume(points, ref=np.asarray(reference, dtype=np.float64), maximise=True))


def hypervolumes(
    fronts: Mapping[str, Array], drawn: Mapping[str, Array], reference: Sequence[float], resampled: Resampled, to: str
) -> dict[str, tuple[Interval, Interval | None]]:
    """Return hypervolume and its ratio to that of method ``to``, with intervals.

    Args:
        fronts: method -> mean rewards at each preference, (P, m).
        drawn: method -> the same in each resample, (R, P, m).
        reference: (m,).
        resampled: for its confidence.
        to: the method that ratios are taken to; none if it is not there.

    Returns:
        method -> (hypervolume, ratio or None).
    """
    value = {name: hypervolume(points, reference) for name, points in fronts.items()}
    each = {name: np.array([hypervolume(p, reference) for p in points]) for name, points in drawn.items()}
    out: dict[str, tuple[Interval, Interval | None]] = {}
    for name in fronts:
        ratio = None
        if to in value and value[to] > 0:
            with np.errstate(divide="ignore", invalid="ignore"):
                ratio = resampled.interval(value[name] / value[to], each[name] / each[to])
        out[name] = (resampled.interval(value[name], each[name]), ratio)
    return out


def cell_weights(variants: Sequence[str], prompts: Sequence[str]) -> Array:
    """Return what each cell weighs in the mean over variants, prompts within them and blocks within these, (n,)."""
    blocks = Counter(zip(variants, prompts, strict=True))
    each = Counter(variant for variant, _ in blocks)
    return np.array([1 / (len(each) * each[v] * blocks[v, p]) for v, p in zip(variants, prompts, strict=True)])


def over_cells(
    values: Sequence[float], variants: Sequence[str], prompts: Sequence[str], confidence: float = 0.95
) -> tuple[Interval, str]:
    """Return the mean of cells, which are blocks of seeds, with Student's interval, and what its replicates are.

    Variants are strata here as in the bootstrap: the variance is that within each of them, between prompts if there are
    several and else between blocks, and the degrees of freedom are Welch's. Where some variant has a single replicate
    the variants themselves are the replicates.

    Args:
        values: of each cell, (n,).
        variants: of each cell.
        prompts: of each cell.
        confidence: of the interval.

    Returns:
        the mean that ``cell_weights`` gives, and "blocks", "prompts", "blocks within variants", "prompts within
        variants" or "variants"; "" if there is one cell.

    Source: Welch 1938; Satterthwaite 1946.
    """
    within: dict[str, dict[str, list[float]]] = {}
    for value, variant, prompt in zip(values, variants, prompts, strict=True):
        within.setdefault(variant, {}).setdefault(prompt, []).append(value)
    several = any(len(found) > 1 for found in within.values())
    strata = [
        np.array([np.mean(blocks) for blocks in found.values()] if several else next(iter(found.values())))
        for found in within.values()
    ]
    over = "prompts" if several else "blocks"
    if len(strata) > 1 and min(map(len, strata)) < 2:
        strata, over = [np.array([stratum.mean() for stratum in strata])], "variants"
    elif len(strata) > 1:
        over += " within variants"
    return _student(strata, confidence), over if len(values) > 1 else ""


def _student(strata: Sequence[Array], confidence: float) -> Interval:
    """Return the mean of the means of strata, with the variance within them; nan ends if one has a single value."""
    mean = float(np.mean([stratum.mean() for stratum in strata]))
    if min(map(len, strata)) < 2:
        return Interval(value=mean, low=np.nan, high=np.nan)
    parts = np.array([stratum.var(ddof=1) / len(stratum) for stratum in strata]) / len(strata) ** 2
    free = np.array([len(stratum) - 1 for stratum in strata])
    total = float(parts.sum())
    freedom = total**2 / float((parts**2 / free).sum()) if total > 0 else float(free.sum())
    half = float(stats.t.ppf((1 + confidence) / 2, freedom)) * total**0.5
    return Interval(value=mean, low=mean - half, high=mean + half)
