"""What an evaluation found, as types: estimates, distances, methods, groups, fronts, and the summary of them all."""

from __future__ import annotations

import math
from typing import Any

from pydantic import Field, JsonValue, model_validator

from sdeblend.evaluate.backend import Scale
from sdeblend.evaluate.codec import Number, Result, StoredPreference, plain_weights
from sdeblend.evaluate.plan import Published


class Interval(Result):
    """An estimate with a confidence interval.

    Attributes:
        value: the estimate.
        low, high: the ends; nan where there are too few replicates.
    """

    value: Number
    low: Number
    high: Number

    def excludes(self, number: float) -> bool:
        """Return whether ``number`` lies outside the interval."""
        return not (math.isnan(self.low) or self.low <= number <= self.high)


class Estimate(Interval):
    """An estimate that is set against another, or averaged over blocks of seeds.

    Attributes:
        significant: whether a difference is not zero, or a rate not one half; None where this is neither.
        over: what the replicates of the interval are, "" if there is one.
        cells, of: how many blocks of how many it is known of; both 0 where it is not of blocks.
    """

    significant: bool | None = None
    over: str = ""
    cells: int = 0
    of: int = 0


class DistanceResult(Estimate):
    """A distance to the exact target.

    Attributes:
        floor: what exact samples have, as many as these are worth; None if not known.
        above_floor: whether exact samples could not have this; None if not known.
        difference: from the reference, on the same blocks; None for the reference itself.
    """

    floor: float | None = None
    above_floor: bool | None = None
    difference: Estimate | None = None


class MethodResult(Result):
    """What one method gave on one group.

    Attributes:
        effective, effective_share: how many independent samples of equal weight these are worth, and of all.
        missing: samples without a value of some reward.
        rewards, weighted: the mean of each reward and of r(w).
        distances, measures: by name; a measure is None where it is not known.
        certificate: in nats; None without one. ess: effective share without resampling, likewise.
        model_calls, gradient_calls, reward_calls: a sample. seconds: a block.
        difference, win_rate: of r(w), from and over the reference; None for the reference itself.
    """

    effective: float
    effective_share: float
    missing: int
    rewards: dict[str, Interval]
    weighted: Interval
    distances: dict[str, DistanceResult]
    measures: dict[str, float | None]
    certificate: float | None
    ess: float | None
    model_calls: float
    gradient_calls: float
    reward_calls: float
    seconds: float
    difference: Estimate | None = None
    win_rate: Estimate | None = None


class Claim(Result):
    """A claimed order of two methods' mean r(w), and their difference, high less low.

    Attributes:
        low, high: the methods.
        strict: whether they are claimed to differ.
        difference: what was found.
    """

    low: str
    high: str
    strict: bool = True
    difference: Estimate

    @property
    def pair(self) -> tuple[str, str, bool]:
        """What is claimed."""
        return self.low, self.high, self.strict

    @property
    def verdict(self) -> str:
        """"holds", "contradicted" or "open"."""
        if math.isnan(self.difference.low) or (self.strict and not self.difference.significant):
            return "open"
        return "contradicted" if self.difference.significant and self.difference.value <= 0 else "holds"


class GroupResult(Result):
    """The methods on one group of variants, preference and strength.

    Attributes:
        group: name of the variants. values: numbers that tell them from others.
        preference: what was asked for.
        scales: what rewards are divided by, by name.
        n, blocks: samples and blocks a method. incomplete: whether some method has others, which are left out.
        methods: what each gave. absent: why others gave nothing.
        target: the mean of each reward under the exact target, as far as it is known.
        order: the pairs of the claimed order.
    """

    group: str
    values: dict[str, float]
    preference: StoredPreference
    scales: dict[str, float] = Field(default_factory=dict)
    n: int
    blocks: int
    incomplete: bool
    methods: dict[str, MethodResult]
    absent: dict[str, str]
    target: dict[str, float]
    order: list[Claim]

    @model_validator(mode="before")
    @classmethod
    def _of_before(cls, data: Any) -> Any:
        # Version 0.1 stored weights and strength side by side.
        if isinstance(data, dict) and "strength" in data:
            return data | {"preference": {"weights": data["preference"], "strength": data["strength"]}}
        return data

    @property
    def weights(self) -> tuple[float, ...]:
        """The weights in the order of the rewards."""
        return tuple(plain_weights(self.preference).values())

    @property
    def strength(self) -> float:
        """Lambda."""
        return float(self.preference.strength)

    def exact_reward(self) -> float | None:
        """Return r(w) of the exact target, None if a mean that it needs is unknown."""
        used = {name: w for name, w in plain_weights(self.preference).items() if w}
        return sum(w * self.target[name] for name, w in used.items()) if set(used) <= set(self.target) else None


class FrontMethod(Result):
    """One method along a front.

    Attributes:
        points, intervals: the mean of each reward at each preference; no intervals where they were not stored.
        dominated: whether another point of the method dominates each; likewise.
        hypervolume: above the reference point. ratio: to that of another method, None if that is not there.
    """

    points: list[list[float]]
    intervals: list[list[Interval]] = Field(default_factory=list)
    dominated: list[bool] = Field(default_factory=list)
    hypervolume: Interval
    ratio: Interval | None = None

    @property
    def inside(self) -> list[bool]:
        """Whether each point is dominated, as far as it was stored."""
        return self.dominated or [False] * len(self.points)


class Front(Result):
    """The methods along the preferences of one group of variants and strength.

    Attributes:
        group, strength, rewards, preferences: what is compared; weights in the order of the rewards.
        reference_point: the corner that hypervolumes are above. ratio_over: the method that ratios are to.
        target: the mean of each reward under the exact target at each preference; empty if one is unknown.
        n: samples a method and preference.
        methods: those that have all preferences.
    """

    group: str
    strength: float
    rewards: list[str]
    preferences: list[list[float]]
    reference_point: list[float]
    ratio_over: str
    target: list[list[float]]
    n: int
    methods: dict[str, FrontMethod]


class Summary(Result):
    """All numbers of one configuration; see the types of its parts.

    Attributes:
        title, note, confidence, reference, published: as in the settings.
        rewards: their scales. options: of each method, those that are not its defaults. Both None where a version did
            not store them.
    """

    title: str
    note: str = ""
    confidence: float
    reference: str
    rewards: list[Scale] | None = None
    options: dict[str, dict[str, JsonValue]] | None = None
    groups: list[GroupResult]
    fronts: list[Front]
    published: list[Published]
