"""Reward-gradient guidance: the score plus the gradient of the reward of the predicted clean sample.

    S(x, t) + scale * grad_x sum_i w_i r_i( E[x_0 | x_t = x] ) / n_i,        n_i = 1, or |grad_x r_i| a sample.

With scale 1/alpha and n_i = 1 it replaces E[exp(r/alpha) | x_t] by exp(r(E[x_0 | x_t])/alpha) in the exact control:
Jensen's inequality twice, so it has no target. Normalised, each reward pulls with the same force whatever its
units, and the force no longer vanishes where the reward is flat.

Predictions in noise say little of the reward, and guidance may be tempered: step n of a run, counted from 0, is guided
by min((1 + gamma)^n - 1, 1) times the scale. The published baseline of Diffusion Blend is normalised, at scale 10 with
gamma 0.024 over 50 steps.

Where a reward is not finite it does not pull: that sample goes on without it for this step.

Source: Chung et al. 2209.14687 (DPS); Bansal et al. 2302.07121 (universal guidance); Kim et al. 2501.05803 (tempering).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import torch
from pydantic import Field
from torch import Tensor

from sdeblend.methods.case import Case, Drawn, NotApplicable, StateReward, usable
from sdeblend.methods.draws import Draws
from sdeblend.methods.method import Method, Sampler
from sdeblend.preference import Preference
from sdeblend.schedule import NoiseSchedule
from sdeblend.score import Bound, ScoreFunction, restrict_rows
from sdeblend.shell.settings import Settings

_TINY = 1e-12


class Guidance(Settings):
    """Options of guidance.

    Attributes:
        scale: of the gradient; 0 stands for 1/kl_weight.
        gamma: growth of the scale a step, see the module; 0 stands for none.
    """

    scale: float = Field(default=0.0, ge=0)
    gamma: float = Field(default=0.0, ge=0)


class RewardGuidance(Bound):
    """A ``ScoreFunction``: a score guided by rewards; one differentiated evaluation a call.

    Args:
        score: differentiable in x; the base.
        schedule: its forward process.
        rewards: name -> differentiable reward of clean samples.
        weights: name -> w_i.
        scale: 1/alpha for the method's own reading of a KL weight; a number, or a function of the time t.
        normalised: divide each reward's gradient by its norm, one a sample.

    Raises:
        ValueError: weights and rewards of different names.
    """

    def __init__(
        self,
        score: ScoreFunction,
        schedule: NoiseSchedule,
        rewards: Mapping[str, StateReward],
        weights: Mapping[str, float],
        scale: float | Callable[[Tensor], float],
        *,
        normalised: bool = False,
    ) -> None:
        if set(rewards) != set(weights) or not rewards:
            raise ValueError(
                f"each reward needs one weight, got rewards {', '.join(rewards) or 'none'} and weights for "
                f"{', '.join(weights) or 'none'}; name the same"
            )
        self.score, self.schedule, self.normalised = score, schedule, normalised
        self.scale = scale if callable(scale) else float(scale)
        self.rewards, self.weights = dict(rewards), dict(weights)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the guided score (B, *event) at x (B, *event) and time t.

        Raises:
            FloatingPointError: a reward that is finite for no sample.
        """
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            score = self.score(point, t)
            clean = (point + float(self.schedule.sigma(t).square()) * score) / float(self.schedule.alpha(t))
            values = {name: reward(clean) for name, reward in self.rewards.items() if self.weights[name]}
            total = torch.zeros_like(x)
            for place, (name, value) in enumerate(values.items()):
                column = (-1, *[1] * (x.ndim - 1))
                there = usable(value).isfinite().reshape(column)
                (gradient,) = torch.autograd.grad(value.sum(), point, retain_graph=place < len(values) - 1)
                gradient = torch.where(there, gradient, 0)
                if self.normalised:
                    gradient = gradient / gradient.flatten(1).norm(dim=1).clamp_min(_TINY).reshape(column)
                total += self.weights[name] * gradient
        scale = self.scale(t) if callable(self.scale) else self.scale
        return score.detach() + scale * total

    def rows(self, index: Tensor) -> RewardGuidance:
        """Return the guided score of the rows ``index``."""
        rewards = {name: restrict_rows(reward, index) for name, reward in self.rewards.items()}
        score = restrict_rows(self.score, index)
        return RewardGuidance(score, self.schedule, rewards, self.weights, self.scale, normalised=self.normalised)


def tempered(scale: float, gamma: float, grid: Tensor) -> Callable[[Tensor], float]:
    """Return scale min((1 + gamma)^n - 1, 1) as a function of the time t, where n is the step of ``grid`` it is in.

    Args:
        scale: at the end.
        gamma: growth a step, above 0.
        grid: decreasing times.

    Raises:
        ValueError: for a gamma that is not above 0.
    """
    if not gamma > 0:
        raise ValueError(f"tempering needs a gamma above 0, got {gamma}; leave it out for none")
    rising = grid.flip(0)

    def at(t: Tensor) -> float:
        # The step that starts at t, or that t lies within.
        step = len(grid) - 1 - int(torch.searchsorted(rising, t.to(rising)))
        return scale * min((1 + gamma) ** step - 1, 1.0)

    return at


def _guided(*, normalised: bool) -> Sampler:
    def sample(case: Case, preference: Preference, draws: Draws, options: Guidance) -> Drawn:
        base = case.differentiable_base(len(draws))
        if base is None:
            raise NotApplicable("it needs a base that can be differentiated")
        if not options.scale and case.kl_weight is None:
            raise NotApplicable("its scale is 1/kl_weight, which is not known here; set one")
        used = {name: w for name, w in case.weights(preference).items() if w}
        if not used:
            raise NotApplicable("it needs a reward with a weight other than 0")
        rewards = {}
        for name in used:
            reward = case.differentiable(name)
            if reward is None:
                raise NotApplicable(f"it needs rewards with a gradient, which {name} has not")
            rewards[name] = reward
        full = float(preference.strength) * (options.scale or 1 / float(case.kl_weight or 1))
        scale = tempered(full, options.gamma, case.grid) if options.gamma else full
        drawn = case.solve(RewardGuidance(base, case.schedule, rewards, used, scale, normalised=normalised), draws)
        return Drawn(drawn.samples, drawn.model_calls, drawn.model_calls, reward_calls=drawn.model_calls)

    return sample


_COST = "1 model call and gradient a step, 1 reward call and gradient a step"
METHODS: Final = (
    Method(
        "guidance", "reward guidance", _guided(normalised=False), "Chung et al. 2209.14687 (DPS); scale 1/kl_weight",
        _COST, Guidance,
    ),
    Method(
        "guidance-normalised", "reward guidance, normalised", _guided(normalised=True),
        "Bansal et al. 2302.07121; unit gradients", _COST, Guidance, aims=False,
    ),
)  # fmt: skip
