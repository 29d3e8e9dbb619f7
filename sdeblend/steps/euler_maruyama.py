"""Euler-Maruyama, uniform in t: x' = x - h (f x - g^2 S) + g sqrt(h) z, h = t - s.

Source: Kloeden and Platen 1992, section 10.2. Additive noise makes its strong order one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdeblend.schedule import NoiseSchedule
from sdeblend.steps.base import Step, StepCoefficients


@dataclass(frozen=True)
class EulerMaruyama(Step):
    """The plain discretisation of the backward SDE; weak and strong order one."""

    order = 1
    strong_order = 1.0

    def coefficients(self, schedule: NoiseSchedule, grid: Tensor) -> StepCoefficients:
        t, h = grid[:-1], -grid.diff()
        g2 = schedule.diffusion_sq(t)
        return StepCoefficients(1 - h * schedule.drift_coef(t), h * g2, torch.zeros_like(h), (h * g2).sqrt())
