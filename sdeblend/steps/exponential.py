"""Exponential multistep in log-SNR: DPM-Solver++ 2M, as an ODE and as an SDE.

With h = (l_s - l_t)/2 and D the posterior mean, extrapolated from the last two evaluations,
D* = D + (D - D_old)/(2 r), r = h_old/h:

    ODE:  x_s = (sigma_s/sigma_t) x + alpha_s (1 - e^-h) D*,
    SDE:  x_s = (sigma_s/sigma_t) e^-h x + alpha_s (1 - e^-2h) D* + sigma_s sqrt(1 - e^-2h) z.

The linear part is exact, so the error is that of D* alone. The first step has no D_old and is of first
order (for the SDE this is the ancestral step). The SDE is of weak order two: extrapolation places the noise of D
one step late, which moves a path by h^(3/2) (strong order one) but the law by h^2 only.

Source: Lu et al. 2211.01095, algorithm 2 and appendix A; a grid uniform in log-SNR serves it best.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdeblend.schedule import NoiseSchedule
from sdeblend.steps.base import Step, StepCoefficients, log_snr_gap


@dataclass(frozen=True)
class ExponentialMultistep(Step):
    """DPM-Solver++ 2M.

    Args:
        stochastic: the SDE (default) or the probability-flow ODE.
    """

    stochastic: bool = True
    order = 2
    multistep = True

    @property
    def strong_order(self) -> float | None:  # type: ignore[override]
        return 1.0 if self.stochastic else None

    def coefficients(self, schedule: NoiseSchedule, grid: Tensor) -> StepCoefficients:
        alpha, sigma = schedule.alpha(grid), schedule.sigma(grid)
        h = log_snr_gap(schedule, grid) / 2
        ratio = sigma[1:] / sigma[:-1]
        if self.stochastic:
            kept = -torch.expm1(-2 * h)
            x_factor, g = ratio * (-h).exp(), sigma[1:] * kept.sqrt()
        else:
            kept = -torch.expm1(-h)
            x_factor, g = ratio, torch.zeros_like(h)
        weight = alpha[1:] * kept
        extra = torch.zeros_like(h)
        extra[1:] = torch.where(h[1:].isfinite(), h[1:] / (2 * h[:-1]), 0)  # 1/(2r)
        new = weight * (1 + extra)
        a = x_factor + new / alpha[:-1]
        return StepCoefficients(a, new * sigma[:-1].square() / alpha[:-1], -weight * extra, g)
