"""How near a tuned model is to the tilt it should be: the KL weight it shows, and what is left beside that.

With delta = eps_tuned - eps_base, what was learned, and delta* the same of the exact tilt and the exact base, both at
noised samples of the tilt with log-SNR even over an interval, where the mean of |delta*|^2 is the path's KL but for the
ends,

    slope = <delta, delta*> / <delta*, delta*>,        residual = <|delta - delta*|^2> / <|delta*|^2>.

A weak tilt at twice the KL weight has half the control: the slope is the strength that was reached, 1 where the KL
weight is the one stated.

Source: Diffusion Blend 2505.18547, Proposition 1 (the control).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdeblend.finetune.model import noised
from toy.mixtures.mixture import GaussianMixture
from toy.networks.tunable import ExactEps, MixtureTunable

LOG_SNR = (-6.0, 6.0)


@dataclass(frozen=True)
class Recovery:
    """What was learned against the exact control.

    Attributes:
        slope: strength that was reached, 1 if the KL weight is the stated one.
        residual: square error of the control over its square norm.
        base_residual: square error of the base's eps over the same norm; 0 for an exact base.
    """

    slope: float
    residual: float
    base_residual: float


def recovered(model: MixtureTunable, target: GaussianMixture, *, count: int = 20_000, seed: int = 0) -> Recovery:
    """Compare the tuned control with that of ``target``, at ``count`` states.

    Args:
        model: after tuning.
        target: the tilt of its mixture.
        count: states, one a sample of the target.
        seed: of samples, log-SNRs and noise.
    """
    x, t = _states(model, target, count, seed)
    base, tilt = ExactEps(model.mixture, model.schedule)(x, t), ExactEps(target, model.schedule)(x, t)
    with torch.no_grad():
        own = model.base(x, t)
        learned = model.tuned(x, t) - own
    wanted = tilt - base
    norm = float(wanted.square().sum())
    return Recovery(
        slope=float((learned * wanted).sum()) / norm,
        residual=float((learned - wanted).square().sum()) / norm,
        base_residual=float((own - base).square().sum()) / norm,
    )


def _states(model: MixtureTunable, target: GaussianMixture, count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x0 = target.sample(count, generator=generator, dtype=torch.float32)
    low, high = LOG_SNR
    t = model.schedule.time_of_log_snr(low + (high - low) * torch.rand(count, generator=generator, dtype=torch.float64))
    return noised(model.schedule, x0, t, torch.randn(x0.shape, generator=generator)), t
