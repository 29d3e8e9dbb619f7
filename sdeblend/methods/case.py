"""What a method samples, and what it returns: a case and the samples drawn of it.

A ``Case`` is one problem with its sampler: schedule, grid and step that all methods share, the stack of base and
members, and the rewards. What a case cannot give it leaves out (None), and a method that needs it raises
``NotApplicable``, so that the rest can go on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from sdeblend.blend import Blend
from sdeblend.correct import Correction
from sdeblend.corrector import Corrector
from sdeblend.methods.draws import Draws
from sdeblend.preference import Preference
from sdeblend.schedule import NoiseSchedule
from sdeblend.score import ScoreFunction, ScoreStack
from sdeblend.sde import BackwardSDE
from sdeblend.solve import Solution, solve
from sdeblend.steps import Step

# Clean samples (B, *event) -> rewards (B,), NaN where it failed; bound to its batch if it has ``rows``.
StateReward = Callable[[Tensor], Tensor]
OneModel = Literal["exact", "soup-deltas", "soup-factors"]
MoreMembers = Literal["half", "pairs"]


class NotApplicable(Exception):
    """A method does not serve a case; the message is the reason, one phrase."""


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
        solution: of the run, where it is one that was certified or corrected; None otherwise.
        paired: whether a sample saw the noise that other methods see from its start, resampling apart.
        facts: further numbers worth recording, by name.
    """

    samples: Tensor
    model_calls: float
    gradient_calls: float = 0.0
    reward_calls: float = 0.0
    log_weights: Tensor | None = None
    ancestors: Tensor | None = None
    solution: Solution | None = None
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


class Case(ABC):
    """One problem, ready to be sampled.

    Attributes:
        names: the members' rewards, in the order of ``stack`` after the base.
        schedule, grid, step: the sampler that all methods share.
        like: a tensor (*event) of the dtype and on the device of the state.
        kl_weight: alpha of the members, None if not known.
        progress: called with (steps done, steps in all) after each step of a run, or None.
    """

    names: tuple[str, ...]
    schedule: NoiseSchedule
    grid: Tensor
    step: Step
    like: Tensor
    kl_weight: float | None = None
    progress: Callable[[int, int], None] | None = None

    @abstractmethod
    def stack(self, batch: int) -> ScoreStack:
        """Return base and members, for a batch of this many rows."""

    @abstractmethod
    def reward(self, name: str) -> StateReward:
        """Return one member's reward as methods see it, clean states (B, *event) -> (B,), NaN where it failed."""

    def differentiable(self, name: str) -> StateReward | None:
        """Return one member's reward, or what stands in for it, with a gradient; None if there is none."""
        return self.reward(name)

    def differentiable_base(self, batch: int) -> ScoreFunction | None:
        """Return the base's score as a function that is differentiable in x."""
        return None

    def score(self, role: OneModel, preference: Preference, batch: int) -> ScoreFunction | None:
        """Return a score of one model, or None: "exact" is tuned for r(w) itself, the soups average weights."""
        return None

    def higher_order(
        self, role: MoreMembers, preference: Preference, batch: int
    ) -> tuple[ScoreStack, tuple[str, ...]] | None:
        """Return more members and their names, the base first.

        Args:
            role: "half": base, then "half:name" and "full:name" of each reward, tuned at twice the KL weight and at
                the KL weight. "pairs": base, members by name, then "a+b" tuned for (r_a + r_b) / 2.
            preference: what for.
            batch: rows.
        """
        return None

    def union_weights(self, preference: Preference) -> Sequence[float]:
        """Return v_i of the mixture of members that p_base sum_i w_i exp(r_i / alpha) is; w_i Z_i, if Z_i is known."""
        return list(self.weights(preference).values())

    def weights(self, preference: Preference) -> dict[str, float]:
        """Return w by name of the rewards, in their order; 0 where a preference leaves one out.

        Raises:
            ValueError: for a preference that weighs what is no reward here.
        """
        preference.coefficients(self.names)  # which refuses what is none
        weights = preference.weights
        named = weights if isinstance(weights, dict) else dict(zip(self.names, weights, strict=True))
        return {name: float(named.get(name, 0.0)) for name in self.names}

    def shares(self, preference: Preference) -> dict[str, float]:
        """Return lambda w_i by name of the rewards, in their order: the members' coefficients."""
        return {name: float(preference.strength) * w for name, w in self.weights(preference).items()}

    def weighted(self, preference: Preference) -> StateReward:
        """Return lambda r(w) as methods see it."""
        parts = [(share, self.reward(name)) for name, share in self.shares(preference).items() if share]

        def total(x: Tensor) -> Tensor:
            out = torch.zeros(len(x), dtype=x.dtype, device=x.device)
            for weight, reward in parts:
                out = out + weight * reward(x)
            return out

        return total

    def base(self, batch: int) -> Blend:
        """Return the base's score, for a batch of this many rows."""
        return Blend(self.stack(batch), torch.tensor([1.0, *[0.0] * len(self.names)], dtype=torch.float64))

    def start(self, draws: Draws, candidates: int = 1) -> Tensor:
        """Return the starts of some draws, (B * candidates, *event), those of a seed side by side."""
        return draws.start(self.like, self.schedule.prior_std(), candidates)

    def solve(
        self, score: ScoreFunction, draws: Draws, correct: Correction | None = None, corrector: Corrector | None = None
    ) -> Drawn:
        """Solve the backward SDE of a score; with a correction, weights, certificate and ancestors come with it."""
        sde = BackwardSDE(self.schedule, score)
        end = solve(
            sde, self.start(draws), self.grid, step=self.step, noise=draws.noise(), correct=correct,
            corrector=corrector, progress=self.progress,
        )  # fmt: skip
        if end.certificate is None:
            return Drawn(end.samples, end.evaluations)
        log_normalizer, error = end.log_normalizers[0]
        facts = {
            "certificate": end.certificate.value,
            "certificate_se": end.certificate.standard_error,
            "ess": end.certificate.ess_fraction,
            "log_normalizer": log_normalizer,
            "log_normalizer_se": error,
        }
        return Drawn(
            end.samples,
            end.evaluations,
            log_weights=end.log_weights,
            ancestors=end.ancestors,
            solution=end,
            facts=facts,
        )


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
