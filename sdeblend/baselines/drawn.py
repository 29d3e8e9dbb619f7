"""What every sampling method returns, whatever it is: samples and what they cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sdeblend.noise import NoiseSource
from sdeblend.schedule import NoiseSchedule, as_time
from sdeblend.score import ScoreFunction, restrict_rows
from sdeblend.steps import Step

# Clean samples (B, *event) -> rewards (B,), NaN where it failed; bound to its batch if it has ``rows``.
Reward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Drawn:
    """Samples of a method.

    Attributes:
        samples: (B, *event).
        model_calls: network evaluations a returned sample, forward passes of one member each.
        gradient_calls: how many of them were differentiated as well, a returned sample.
        reward_calls: reward evaluations a returned sample.
        log_weights: importance weights, (B,); None where samples count alike.
        ancestors: which start each sample descends from, long (B,); None where sample i comes from start i.
        paired: whether a sample saw the noise that other methods see from its start, resampling apart.
        facts: further numbers worth recording, by name.
    """

    samples: Tensor
    model_calls: float
    gradient_calls: float = 0.0
    reward_calls: float = 0.0
    log_weights: Tensor | None = None
    ancestors: Tensor | None = None
    paired: bool = True
    facts: dict[str, float] = field(default_factory=dict)

    @property
    def effective(self) -> int:
        """How many independent samples of equal weight these are worth, to two digits, at least 2."""
        n = len(self.samples)
        if self.log_weights is None and self.ancestors is None:
            return n
        weights = torch.full((n,), 1 / n).double()
        if self.log_weights is not None:
            weights = self.log_weights.double().softmax(0).cpu()
        if self.ancestors is not None:
            weights = torch.zeros(n, dtype=torch.float64).index_add_(0, self.ancestors.cpu(), weights)
        return max(2, int(float(f"{1 / float(weights.square().sum()):.2g}")))


def usable(values: Tensor) -> Tensor:
    """Return rewards as they are compared, (B,): minus infinity where one failed, so that nothing is worse.

    Args:
        values: (B,), not finite where the reward failed.

    Raises:
        FloatingPointError: it failed everywhere.
    """
    there = values.isfinite()
    if not bool(there.any()):
        raise FloatingPointError(
            f"a reward must be finite for at least one of {len(values)} samples, got none; try it on a sample alone"
        )
    return values.masked_fill(~there, -torch.inf)


def denoised(schedule: NoiseSchedule, score: ScoreFunction, x: Tensor, t: Tensor) -> Tensor:
    """Return E[x_0 | x_t = x] = (x + sigma^2 score) / alpha, (B, *event); one evaluation. At t = 0 it is x."""
    if float(t) == 0:
        return x
    t = as_time(t)
    return (x + float(schedule.sigma(t).square()) * score(x, t)) / float(schedule.alpha(t))


def repeated(score: ScoreFunction, batch: int, times: int) -> ScoreFunction:
    """Return the score for a batch in which each of ``batch`` rows stands ``times`` times in a row."""
    return restrict_rows(score, torch.arange(batch).repeat_interleave(times))


def advance(
    step: Step, schedule: NoiseSchedule, score: ScoreFunction, x: Tensor, grid: Tensor, first: int, noise: NoiseSource
) -> Tensor:
    """Take the steps of ``grid`` (k + 1,) from x at grid[0]; ``first`` is the number of its first step in the run.

    Multistep methods start afresh: what they remember belongs to other paths.
    """
    old: Tensor | None = None
    for k, move in enumerate(step.plan(schedule, grid)):
        value = score(x, move.t)
        z = noise(first + k, move.t, move.s, x) if move.g else None
        moved = step.advance(move, x, value, old, z, score)
        if step.multistep:
            old = move.p * x + move.q * value
        x = moved
    return x


def evaluations(score: ScoreFunction) -> int:
    """Return how many members one call of a score evaluates: those of a blend that are not zero, else 1."""
    coefficients = getattr(score, "coefficients", None)
    if not isinstance(coefficients, Tensor):
        return 1
    return int((coefficients.reshape(-1, coefficients.shape[-1]) != 0).any(0).sum())
