"""Noise schedules: the forward process and everything that follows from two functions of time.

Data live at t = 0, noise at t = t_max. The forward process is

    dx = f(t) x dt + g(t) dw,        x_t = alpha(t) x_0 + sigma(t) eps,     eps ~ N(0, I).

With the log signal-to-noise ratio l(t) = 2 log(alpha / sigma), every coefficient is a closed form:

    f(t) = d log alpha / dt,         g(t)^2 = d sigma^2/dt - 2 f sigma^2 = -sigma^2 dl/dt.

Times and values are float64 whatever the dtype of the state; t = 0 is always legal and means data
(alpha = 1, sigma = 0). Where alpha^2 + sigma^2 = 1 (variance preserving), l alone fixes both, and
f = -g^2 / 2.

Source: Song et al., Score-Based Generative Modeling through SDEs (2011.13456); Kingma et al.,
Variational Diffusion Models (2107.00630), for l; Karras et al. (2206.00364) for sigma(t) = t.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Time = float | Tensor


def as_time(t: Time) -> Tensor:
    """Return ``t`` as a float64 tensor (any shape); times are float64 everywhere."""
    return torch.as_tensor(t, dtype=torch.float64)


class NoiseSchedule(ABC):
    """A forward process ``x_t = alpha(t) x_0 + sigma(t) eps`` on ``0 < t_min <= t <= t_max``.

    Every method takes a float or a tensor of times (any shape) and returns float64 of that shape.
    A subclass gives ``log_alpha``, ``sigma``, ``log_snr_rate``, ``drift_coef`` and ``time_of_log_snr``.
    """

    t_min: float
    t_max: float

    @abstractmethod
    def log_alpha(self, t: Time) -> Tensor:
        """Return log alpha(t), zero at t = 0."""

    @abstractmethod
    def sigma(self, t: Time) -> Tensor:
        """Return the noise scale sigma(t), zero at t = 0."""

    @abstractmethod
    def log_snr_rate(self, t: Time) -> Tensor:
        """Return d log_snr / dt, negative."""

    @abstractmethod
    def drift_coef(self, t: Time) -> Tensor:
        """Return f(t) = d log alpha / dt (one over time)."""

    @abstractmethod
    def time_of_log_snr(self, log_snr: Time) -> Tensor:
        """Return the time at which ``log_snr`` takes the given value."""

    def alpha(self, t: Time) -> Tensor:
        """Return the signal scale alpha(t), one at t = 0."""
        return self.log_alpha(t).exp()

    def log_snr(self, t: Time) -> Tensor:
        """Return l(t) = 2 log(alpha / sigma), plus infinity at t = 0."""
        return 2 * (self.log_alpha(t) - self.sigma(t).log())

    def diffusion_sq(self, t: Time) -> Tensor:
        """Return g(t)^2 = -sigma^2 dl/dt (variance over time)."""
        return -self.sigma(t).square() * self.log_snr_rate(t)

    def alpha_rate(self, t: Time) -> Tensor:
        """Return d alpha / dt."""
        return self.alpha(t) * self.drift_coef(t)

    def sigma_rate(self, t: Time) -> Tensor:
        """Return d sigma / dt = sigma (f - l'/2)."""
        return self.sigma(t) * (self.drift_coef(t) - self.log_snr_rate(t) / 2)

    def prior_std(self) -> float:
        """Return the standard deviation of x at t_max for data of unit variance."""
        return math.hypot(float(self.alpha(self.t_max)), float(self.sigma(self.t_max)))

    def prior(
        self,
        shape: Sequence[int],
        *,
        generator: torch.Generator | None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw the start of a backward run, N(0, prior_std^2 I).

        Args:
            shape: (B, *event).
            generator: the generator that draws; required, the global one is never used.
            dtype: float32 or float64.
            device: where the state lives; the generator's by default.

        Returns:
            x at t_max, (B, *event).
        """
        if generator is None:
            raise TypeError("prior needs a torch.Generator, got None; pass torch.Generator().manual_seed(seed)")
        noise = torch.randn(tuple(shape), generator=generator, dtype=dtype, device=device or generator.device)
        return noise * self.prior_std()

    def check_time(self, t: Time) -> Tensor:
        """Return ``t`` as float64, or raise if a time is neither 0 nor within [t_min, t_max]."""
        time = as_time(t)
        slack = 1e-12 * self.t_max
        bad = ~(((time >= self.t_min - slack) & (time <= self.t_max + slack)) | (time == 0))
        if bool(bad.any()):
            raise ValueError(
                f"times must be 0 or within [{self.t_min:g}, {self.t_max:g}] for {type(self).__name__}, "
                f"got {float(time[bad].flatten()[0]):g}; choose the grid with sdeblend.time_grid"
            )
        return time


class _VariancePreserving(NoiseSchedule):
    """alpha^2 + sigma^2 = 1; a subclass gives log alpha and f, the rest follows."""

    def sigma(self, t: Time) -> Tensor:
        # 1 - exp(2 log alpha) loses every digit for small t; expm1 keeps them.
        return (-torch.expm1(2 * self.log_alpha(t))).clamp_min(0).sqrt()

    def diffusion_sq(self, t: Time) -> Tensor:
        return -2 * self.drift_coef(t)

    def log_snr_rate(self, t: Time) -> Tensor:
        return 2 * self.drift_coef(t) / self.sigma(t).square()


class VPLinear(_VariancePreserving):
    """Variance preserving with beta(t) linear: f = -beta/2, g^2 = beta, t in [0, 1].

    Args:
        beta_min: beta(0), noise per unit time.
        beta_max: beta(1).
        t_min: last time before the final denoising step to 0.

    Source: Song et al. 2011.13456, equation 32.
    """

    t_max = 1.0

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-3) -> None:
        if not (0 < beta_min <= beta_max and math.isfinite(beta_max)):
            raise ValueError(
                f"VPLinear needs 0 < beta_min <= beta_max, got {beta_min} and {beta_max}; the usual pair is 0.1, 20"
            )
        self.beta_min, self.beta_max, self.t_min = float(beta_min), float(beta_max), _check_t_min(t_min, 1.0)

    def log_alpha(self, t: Time) -> Tensor:
        t = as_time(t)
        return -(self.beta_min * t + (self.beta_max - self.beta_min) * t.square() / 2) / 2

    def drift_coef(self, t: Time) -> Tensor:
        return -(self.beta_min + (self.beta_max - self.beta_min) * as_time(t)) / 2

    def time_of_log_snr(self, log_snr: Time) -> Tensor:
        # -2 log alpha = softplus(-l) = beta_min t + (beta_max - beta_min) t^2 / 2
        total = torch.nn.functional.softplus(-as_time(log_snr))
        slope = self.beta_max - self.beta_min
        return 2 * total / (self.beta_min + (self.beta_min**2 + 2 * slope * total).sqrt())


class VPCosine(_VariancePreserving):
    """Variance preserving with alpha(t) = cos((t + s)/(1 + s) pi/2), normalised to 1 at t = 0.

    Args:
        offset: s, keeps the noise near t = 0 from vanishing.
        t_min: last time before the final denoising step to 0.
        t_max: first time; alpha vanishes and beta diverges at 1.

    Source: Nichol and Dhariwal 2102.09672, equation 17.
    """

    def __init__(self, offset: float = 0.008, t_min: float = 1e-3, t_max: float = 0.9946) -> None:
        if not 0 < offset < 1 or not 0 < t_max < 1:
            raise ValueError(
                f"VPCosine needs 0 < offset < 1 and 0 < t_max < 1, got {offset} and {t_max}; try 0.008, 0.9946"
            )
        self.offset, self.t_min, self.t_max = float(offset), _check_t_min(t_min, t_max), float(t_max)
        self._rate = math.pi / 2 / (1 + offset)
        self._log_start = math.log(math.cos(self._rate * offset))

    def _angle(self, t: Time) -> Tensor:
        return self._rate * (as_time(t) + self.offset)

    def log_alpha(self, t: Time) -> Tensor:
        # cos(a + b) / cos(a) = cos b - sin b tan a: one minus that keeps its digits for small b.
        step, start = self._rate * as_time(t), self._rate * self.offset
        return torch.log1p(-2 * (step / 2).sin().square() - step.sin() * math.tan(start))

    def drift_coef(self, t: Time) -> Tensor:
        return -self._rate * self._angle(t).tan()

    def time_of_log_snr(self, log_snr: Time) -> Tensor:
        log_alpha = -torch.nn.functional.softplus(-as_time(log_snr)) / 2
        return (log_alpha + self._log_start).exp().clamp(max=1).arccos() / self._rate - self.offset


class TrainedTable(_VariancePreserving):
    """The discrete schedule of a trained network, made continuous: exact on the table.

    Index i of N is t = (i + 1)/N; between trained indices the log signal-to-noise ratio is linear in t,
    so f and g^2 are piecewise smooth. ``timestep(t)`` is the real number such a network is called with.

    Args:
        alphas_cumprod: alpha^2 at the N trained indices, decreasing within (0, 1), noise last.

    Raises:
        ValueError: for a table that does not decrease within (0, 1). A last entry of 0 (zero terminal
            signal) has no score; give the table before rescaling.
    """

    t_max = 1.0

    def __init__(self, alphas_cumprod: Sequence[float] | Tensor) -> None:
        table = as_time(torch.as_tensor(alphas_cumprod)).flatten().cpu()
        ok = len(table) >= 2 and bool(((table > 0) & (table < 1)).all()) and bool((table.diff() < 0).all())
        if not ok:
            raise ValueError(
                "TrainedTable needs at least two values of alphas_cumprod that decrease within (0, 1), got "
                f"{len(table)} from {float(table.max()) if len(table) else math.nan:g} to "
                f"{float(table.min()) if len(table) else math.nan:g}; pass scheduler.alphas_cumprod as trained"
            )
        self.count = len(table)
        self.t_min = 1 / self.count
        self._knots = torch.arange(1, self.count + 1, dtype=torch.float64) / self.count
        self._log_snr = torch.log(table) - torch.log1p(-table)
        self._slope = self._log_snr.diff() * self.count

    @classmethod
    def stable_diffusion(cls) -> TrainedTable:
        """Return Stable Diffusion's table: scaled-linear beta from 0.00085 to 0.012, 1000 steps."""
        root = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64)
        return cls(torch.cumprod(1 - root.square(), 0))

    def timestep(self, t: Time) -> Tensor:
        """Return N t - 1, the (real) index that the trained network expects at time t."""
        return as_time(t) * self.count - 1

    def time_of_timestep(self, timestep: Time) -> Tensor:
        """Return (timestep + 1)/N, the inverse of ``timestep``."""
        return (as_time(timestep) + 1) / self.count

    def _segment(self, t: Tensor) -> Tensor:
        return (t * self.count - 1).floor().long().clamp(0, self.count - 2)

    def log_snr(self, t: Time) -> Tensor:
        t = as_time(t)
        i = self._segment(t)
        knots, values, slope = (v.to(t.device)[i] for v in (self._knots, self._log_snr, self._slope))
        return torch.where(t > 0, values + slope * (t - knots), math.inf)

    def log_alpha(self, t: Time) -> Tensor:
        return -torch.nn.functional.softplus(-self.log_snr(t)) / 2

    def sigma(self, t: Time) -> Tensor:
        return torch.sigmoid(-self.log_snr(t)).sqrt()

    def log_snr_rate(self, t: Time) -> Tensor:
        t = as_time(t)
        return self._slope.to(t.device)[self._segment(t)]

    def drift_coef(self, t: Time) -> Tensor:
        return self.sigma(t).square() * self.log_snr_rate(t) / 2

    def time_of_log_snr(self, log_snr: Time) -> Tensor:
        value = as_time(log_snr)
        i = (torch.searchsorted(-self._log_snr, -value.contiguous(), right=True) - 1).clamp(0, self.count - 2)
        return self._knots[i] + (value - self._log_snr[i]) / self._slope[i]


class KarrasVE(NoiseSchedule):
    """Variance exploding in the units of Karras et al.: alpha = 1, sigma(t) = t, so t is the noise scale.

    Args:
        sigma_min: t_min.
        sigma_max: t_max; the prior is N(0, 1 + sigma_max^2).

    Source: Karras et al. 2206.00364, section 3.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        if not (0 < sigma_min < sigma_max and math.isfinite(sigma_max)):
            raise ValueError(
                f"KarrasVE needs 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}; try 0.002, 80"
            )
        self.t_min, self.t_max = float(sigma_min), float(sigma_max)

    def log_alpha(self, t: Time) -> Tensor:
        return torch.zeros_like(as_time(t))

    def sigma(self, t: Time) -> Tensor:
        return as_time(t).clone()

    def log_snr_rate(self, t: Time) -> Tensor:
        return -2 / as_time(t)

    def drift_coef(self, t: Time) -> Tensor:
        return torch.zeros_like(as_time(t))

    def diffusion_sq(self, t: Time) -> Tensor:
        return 2 * as_time(t)

    def time_of_log_snr(self, log_snr: Time) -> Tensor:
        return (-as_time(log_snr) / 2).exp()


class RectifiedFlow(NoiseSchedule):
    """Straight paths: alpha = 1 - t, sigma = t; the velocity is eps - x0.

    At t = 1 the signal is gone, and with it f and g^2 diverge; runs of the SDE start at ``t_max`` < 1.

    Args:
        t_min: last time before the final denoising step to 0.
        t_max: first time.

    Source: Liu et al. 2209.03003; Lipman et al. 2210.02747.
    """

    def __init__(self, t_min: float = 1e-3, t_max: float = 0.999) -> None:
        if not 0 < t_max < 1:
            raise ValueError(f"RectifiedFlow needs 0 < t_max < 1, got {t_max}; try 0.999")
        self.t_min, self.t_max = _check_t_min(t_min, t_max), float(t_max)

    def log_alpha(self, t: Time) -> Tensor:
        return torch.log1p(-as_time(t))

    def sigma(self, t: Time) -> Tensor:
        return as_time(t).clone()

    def log_snr_rate(self, t: Time) -> Tensor:
        t = as_time(t)
        return -2 / (t * (1 - t))

    def drift_coef(self, t: Time) -> Tensor:
        return -1 / (1 - as_time(t))

    def diffusion_sq(self, t: Time) -> Tensor:
        t = as_time(t)
        return 2 * t / (1 - t)

    def time_of_log_snr(self, log_snr: Time) -> Tensor:
        return torch.sigmoid(-as_time(log_snr) / 2)


def _check_t_min(t_min: float, t_max: float) -> float:
    if not 0 < t_min < t_max:
        raise ValueError(f"t_min must lie within (0, {t_max:g}), got {t_min}; 1e-3 keeps float32 exact enough")
    return float(t_min)


SCHEDULES: dict[str, Callable[[], NoiseSchedule]] = {
    "vp-linear": VPLinear,
    "vp-cosine": VPCosine,
    "stable-diffusion": TrainedTable.stable_diffusion,
    "karras": KarrasVE,
    "rectified-flow": RectifiedFlow,
}
