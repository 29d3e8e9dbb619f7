"""Rewards as trainers see them: checked, weighted, batched.

A reward takes what ``Tunable.decode`` returns and the condition, and gives one number a sample. Several are combined
as r = sum_i w_i r_i, which is what a model tuned for one preference is tuned for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Reward = Callable[[Tensor, Any], Tensor]


class WeightedReward:
    """r(x) = sum_i w_i r_i(x), each part checked.

    Args:
        rewards: name -> reward, (samples, condition) -> (B,).
        weights: name -> w_i; 1 for all if left out.

    Raises:
        ValueError: no rewards, or weights that name others.
    """

    def __init__(self, rewards: Mapping[str, Reward], weights: Mapping[str, float] | None = None) -> None:
        self.rewards = dict(rewards)
        self.weights = dict.fromkeys(self.rewards, 1.0) if weights is None else dict(weights)
        if not self.rewards or set(self.weights) != set(self.rewards):
            raise ValueError(
                f"each reward needs one weight, got rewards {', '.join(self.rewards) or 'none'} and weights for "
                f"{', '.join(self.weights) or 'none'}; name the same"
            )

    def parts(self, samples: Tensor, condition: Any) -> dict[str, Tensor]:
        """Return each reward by name, (B,) float32 or float64.

        Raises:
            ValueError: a reward of another shape, or one that is not finite.
        """
        return {name: checked(name, reward(samples, condition), samples) for name, reward in self.rewards.items()}

    def __call__(self, samples: Tensor, condition: Any) -> Tensor:
        """Return the weighted sum, (B,)."""
        parts = self.parts(samples, condition)
        return torch.stack([self.weights[name] * value for name, value in parts.items()]).sum(0)


def checked(name: str, value: Any, samples: Tensor) -> Tensor:
    """Return the value of a reward on its samples' device, or raise a ValueError if it is not one number a sample."""
    if not isinstance(value, Tensor) or value.shape != (len(samples),):
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"reward {name!r} must give a tensor of shape ({len(samples)},), got {got}; one a sample")
    bad = ~value.isfinite()
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(f"reward {name!r} must be finite, got {float(value[row])} for sample {row}; mend the reward")
    value = value if value.is_floating_point() else value.float()
    return value.to(samples.device)
