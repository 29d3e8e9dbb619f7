"""The backward SDE of a score.

Time runs down from noise to data. With the schedule's f and g and a score S,

    dx = [f x - g^2 S_t(x)] dt + g dw               (SDE),
    dx = [f x - g^2 S_t(x) / 2] dt                  (probability-flow ODE, same marginals),
    E[x_0 | x_t = x] = (x + sigma^2 S_t(x)) / alpha (Tweedie).

The score comes first and the drift is derived from it: exponential steps need S apart from f x, and a
trained table has no beta(t) of its own.

Source: Anderson 1982; Song et al. 2011.13456; Diffusion Blend 2505.18547, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdeblend.schedule import NoiseSchedule, Time, as_time
from sdeblend.score import ScoreFunction


@dataclass(frozen=True)
class BackwardSDE:
    """A schedule and a score: all that a solver needs.

    Args:
        schedule: the forward process.
        score: (x (B, *event), t 0-dim float64) -> (B, *event); a ``Blend`` is one.
    """

    schedule: NoiseSchedule
    score: ScoreFunction

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, NoiseSchedule):
            raise TypeError(f"BackwardSDE needs a NoiseSchedule first, got {type(self.schedule).__name__}")
        if not callable(self.score):
            raise TypeError(f"BackwardSDE needs a score function (x, t) -> score, got {type(self.score).__name__}")

    def drift(self, x: Tensor, t: Time) -> Tensor:
        """Return f x - g^2 S, (B, *event); time runs down."""
        t = as_time(t)
        f, g2 = float(self.schedule.drift_coef(t)), float(self.schedule.diffusion_sq(t))
        return f * x - g2 * self.score(x, t)

    def diffusion(self, t: Time) -> Tensor:
        """Return g(t), float64, shaped as t."""
        return self.schedule.diffusion_sq(t).sqrt()

    def denoised(self, x: Tensor, t: Time) -> Tensor:
        """Return the posterior mean E[x_0 | x_t = x], (B, *event); at t = 0 it is x."""
        t = as_time(t)
        if float(t) == 0:
            return x
        alpha, variance = float(self.schedule.alpha(t)), float(self.schedule.sigma(t).square())
        return (x + variance * self.score(x, t)) / alpha


def check_state(x: Tensor) -> Tensor:
    """Return ``x`` if it can be a state: float32 or float64, at least one row, finite.

    Raises:
        TypeError: for another dtype (a half-precision state is ten times worse than its network).
        ValueError: without a batch dimension or with a non-finite entry.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"a state must be a torch tensor of shape (B, *event), got {type(x).__name__}")
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"a state must be float32 or float64, got {str(x.dtype).removeprefix('torch.')}; "
            "keep half precision inside the network and call .float() on the state"
        )
    if x.ndim < 2 or len(x) == 0:
        raise ValueError(f"a state must have shape (B, *event) with B >= 1, got {tuple(x.shape)}")
    if not bool(x.isfinite().all()):
        row = int((~x.isfinite()).flatten(1).any(1).nonzero()[0])
        raise ValueError(f"the start of a run must be finite, got a non-finite value in sample {row}")
    return x
