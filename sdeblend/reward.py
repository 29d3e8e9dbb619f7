"""Rewards: one type for mixtures and images, found by name in one way.

A reward takes clean samples (points, images) and what they are conditioned on, one row a sample, and gives one number
a sample. What a method of sampling calls is a function of states alone (``sdeblend.methods.case.StateReward``), in
which decoder and condition are bound. Several rewards are combined as r = sum_i w_i r_i, which is what a model tuned
for one preference is tuned for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class Condition(Protocol):
    """What a batch is conditioned on, one row a sample.

    Attributes:
        prompts: the rows as text.
    """

    @property
    def prompts(self) -> tuple[str, ...]: ...

    def rows(self, index: Tensor, /) -> Condition:
        """Return the condition of the rows ``index``, long (N,), repeated rows allowed."""


# A condition is whatever the model draws; what a reward reads of it is between the two.
RewardFunction = Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class Reward:
    """A reward with what is known of it.

    Attributes:
        name: as settings name it.
        function: (samples (B, ...), condition) -> (B,).
        differentiable: whether gradients reach the samples.
        unit: of its values.
    """

    name: str
    function: RewardFunction
    differentiable: bool = True
    unit: str = ""

    def __call__(self, samples: Tensor, condition: Condition | None = None, /) -> Tensor:
        """Return the rewards, (B,)."""
        return self.function(samples, condition)


# Name -> reward, or what makes it of options of its own when it is asked for.
Rewards = Mapping[str, Reward | Callable[..., Reward]]


def find_reward(name: str, known: Rewards, **options: Any) -> Reward:
    """Return a reward by its name, or one's own by ``"package.module:function"``.

    A function of one's own takes (samples, condition) and is taken to be differentiable unless it has an attribute
    ``differentiable`` that is False.

    Args:
        name: of a reward.
        known: the rewards of a backend.
        options: of one that is made when asked for; others take none.

    Raises:
        ValueError: for a name that is neither, naming what exists, or options for a reward that takes none.
    """
    module, colon, attribute = name.partition(":")
    if name not in known and not colon:
        raise ValueError(
            f"a reward must be one of {', '.join(known)} or 'package.module:function', got {name!r}; correct it"
        )
    found = known.get(name)
    if found is not None and not isinstance(found, Reward):
        return found(**options)
    if options:
        given = ", ".join(f"{key} {value!r}" for key, value in options.items())
        raise ValueError(f"reward {name!r} takes no options, got {given}; leave them out")
    if found is not None:
        return found
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"a reward of your own must be an importable 'package.module:function', got {name!r} ({error}); check that "
            "Python finds the module"
        ) from error
    return as_reward(name, function)


def as_reward(name: str, function: RewardFunction) -> Reward:
    """Return a function of (samples, condition) as a reward; a reward stays as it is.

    Raises:
        ValueError: if it is no function.
    """
    if isinstance(function, Reward):
        return function
    if not callable(function):
        raise ValueError(
            f"a reward must be a function of (samples, condition), got {type(function).__name__}: {name!r}"
        )
    return Reward(name, function, bool(getattr(function, "differentiable", True)), "its own")


class WeightedReward:
    """r(x) = sum_i w_i r_i(x), each part checked.

    Args:
        rewards: name -> reward, or function of (samples, condition).
        weights: name -> w_i; 1 for all if left out.

    Raises:
        ValueError: no rewards, or weights that name others.
    """

    def __init__(self, rewards: Mapping[str, RewardFunction], weights: Mapping[str, float] | None = None) -> None:
        self.rewards = {name: as_reward(name, reward) for name, reward in rewards.items()}
        self.weights = dict.fromkeys(self.rewards, 1.0) if weights is None else dict(weights)
        if not self.rewards or set(self.weights) != set(self.rewards):
            raise ValueError(
                f"each reward needs one weight, got rewards {', '.join(self.rewards) or 'none'} and weights for "
                f"{', '.join(self.weights) or 'none'}; name the same"
            )

    def __call__(self, samples: Tensor, condition: Condition | None = None, /) -> Tensor:
        """Return the weighted sum, (B,).

        Raises:
            ValueError: a reward of another shape, or one that is not finite.
        """
        parts = [self.weights[name] * one_each(name, r(samples, condition), samples) for name, r in
                 self.rewards.items()]  # fmt: skip
        return torch.stack(parts).sum(0)


def one_each(name: str, value: Tensor, samples: Tensor) -> Tensor:
    """Return the value of a reward, (B,) float32 or float64, on its samples' device.

    Raises:
        ValueError: if it is not one finite number a sample.
    """
    if not isinstance(value, Tensor) or value.shape != (len(samples),):
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"reward {name!r} must give a tensor of shape ({len(samples)},), got {got}; one a sample")
    bad = ~value.isfinite()
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(f"reward {name!r} must be finite, got {float(value[row])} for sample {row}; mend the reward")
    value = value if value.is_floating_point() else value.float()
    return value.to(samples.device)
