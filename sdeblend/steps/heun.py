"""Heun's method on the probability-flow ODE, in the clock where it is straight.

With y = x/alpha and nu = sigma/alpha the ODE is dy/dnu = eps(x, t), so for a constant eps every step is exact:

    y~ = y + (nu_s - nu_t) eps_t,      y_s = y + (nu_s - nu_t) (eps_t + eps_s(y~)) / 2.

A step to 0 is Euler's, the posterior mean. Two evaluations a step.

Source: Karras et al. 2206.00364, algorithm 1 with no churn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdeblend.schedule import NoiseSchedule
from sdeblend.score import ScoreFunction
from sdeblend.steps.base import Move, Step, StepCoefficients


@dataclass(frozen=True)
class Heun(Step):
    """Second order without noise; two evaluations a step (one for the step to 0)."""

    order = 2
    evaluations = 2
    stochastic = False

    def coefficients(self, schedule: NoiseSchedule, grid: Tensor) -> StepCoefficients:
        # a, b: Euler's predictor; c: what b would be for the score at s.
        alpha, sigma = schedule.alpha(grid), schedule.sigma(grid)
        gap = sigma[1:] / alpha[1:] - sigma[:-1] / alpha[:-1]
        b = -alpha[1:] * gap * sigma[:-1]
        return StepCoefficients(alpha[1:] / alpha[:-1], b, b * sigma[1:] / sigma[:-1], torch.zeros_like(gap))

    def advance(
        self, move: Move, x: Tensor, score: Tensor, old: Tensor | None, noise: Tensor | None, again: ScoreFunction
    ) -> Tensor:
        out = (x * move.a).add_(score, alpha=move.b)
        if move.c == 0:
            return out
        second = again(out, move.s)
        return out.add_(score, alpha=-move.b / 2).add_(second, alpha=move.c / 2)
