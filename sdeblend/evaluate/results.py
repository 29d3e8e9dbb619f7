"""What is stored and what is found, as types with one codec: what ``Result.written`` wrote, ``model_validate`` reads.

A number that is not known is nan here and null in JSON, which no strict reader refuses.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, PlainSerializer, model_validator

from sdeblend.preference import Preference
from sdeblend.shell.settings import Settings

DIGITS: Final = 9
Number = Annotated[
    float,
    BeforeValidator(lambda value: math.nan if value is None else value),
    PlainSerializer(lambda value: value if math.isfinite(value) else None),
]
StoredPreference = Annotated[
    Preference,
    BeforeValidator(lambda value: value if isinstance(value, Preference) else Preference.from_json(value)),
    PlainSerializer(Preference.to_json),
]


class Result(BaseModel):
    """Something that is stored; fields that a version does not know are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore", arbitrary_types_allowed=True)

    def written(self, indent: int | None = None, *, defaults: bool = False) -> str:
        """Return it as JSON text with a final newline.

        Args:
            indent: blanks a level; all in one line if left out.
            defaults: whether fields that have their default are written.
        """
        plain = self.model_dump(mode="json", exclude_defaults=not defaults)
        return json.dumps(plain, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"


def plain_weights(preference: Preference) -> dict[str, float]:
    """Return the weights of a preference by name, as those of an evaluation are."""
    weights: dict[str, float] = preference.to_json()["weights"]
    return weights


def rounded(value: float) -> float:
    """Return a number as it is stored: nine digits, nan if it is not finite."""
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else math.nan


def number(value: float) -> float | None:
    """Return a number as it is stored where it may be missing: nine digits, None if it is not finite."""
    return rounded(value) if math.isfinite(value) else None


@dataclass(frozen=True)
class Variant:
    """One of a backend's problems.

    Attributes:
        name: unique.
        rewards: names of the members' rewards, in order.
        values: numbers that tell it from the others (``{"kl_weight": .25}``), for the axes of figures.
        group: variants of one group are replicates of each other, and reported together.
    """

    name: str
    rewards: tuple[str, ...]
    values: Mapping[str, float] = field(default_factory=dict)
    group: str = ""

    @property
    def together(self) -> str:
        """The name of the group, or its own."""
        return self.group or self.name


class Distance(NamedTuple):
    """A distance to the exact target.

    Attributes:
        value: of the samples; NaN if it is not known.
        floor: what exact samples of the same number have on average; None if not known.
        floor_sd: standard deviation of that from one set of exact samples to another.
    """

    value: Number
    floor: float | None = None
    floor_sd: float | None = None


class Scale(Result):
    """What a reward is divided by.

    Attributes:
        name: of the reward. unit: of its value before. variants: where it is so.
    """

    name: str
    scale: float
    unit: str
    variants: list[str]


class Published(Settings):
    """A printed number to stand beside the results.

    Attributes:
        label: whose it is.
        group: of variants that it belongs to; all if left out.
        reward, value: the mean of which reward.
        source: where it is printed.
    """

    label: str
    group: str = ""
    reward: str
    value: float
    source: str


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
