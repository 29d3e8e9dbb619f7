"""The ancestral step, DDIM with eta: sample x_s given x_t and the predicted x_0.

    var = eta^2 sigma_s^2 (1 - e^(l_t - l_s)),
    x_s = alpha_s x0 + sqrt(sigma_s^2 - var) eps + sqrt(var) z.

eta = 1 is DDPM's posterior (and the first-order exponential SDE step), eta = 0 is DDIM. For a variance
preserving schedule var is diffusers' (sigma_s/sigma_t)^2 (1 - alpha_t^2/alpha_s^2) eta^2.

Source: Song, Meng and Ermon 2010.02502, equations 12 and 16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdeblend.schedule import NoiseSchedule
from sdeblend.steps.base import Step, StepCoefficients, log_snr_gap


@dataclass(frozen=True)
class Ancestral(Step):
    """DDIM step with noise level eta.

    Args:
        eta: 1 ancestral (DDPM), 0 deterministic (DDIM), between them the family of the paper.

    Raises:
        ValueError: eta outside [0, 1].
    """

    eta: float = 1.0
    order = 1

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie within [0, 1], got {self.eta}; 1 is ancestral, 0 is DDIM")

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        return self.eta > 0

    @property
    def strong_order(self) -> float | None:  # type: ignore[override]
        return 1.0 if self.stochastic else None

    def coefficients(self, schedule: NoiseSchedule, grid: Tensor) -> StepCoefficients:
        alpha, sigma = schedule.alpha(grid), schedule.sigma(grid)
        variance = self.eta**2 * sigma[1:].square() * -torch.expm1(-log_snr_gap(schedule, grid))
        a = alpha[1:] / alpha[:-1]
        eps = (sigma[1:].square() - variance).clamp_min(0).sqrt() - a * sigma[:-1]
        return StepCoefficients(a, -sigma[:-1] * eps, torch.zeros_like(a), variance.sqrt())
