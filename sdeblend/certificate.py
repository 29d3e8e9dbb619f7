"""The certificate of a blend, from the member scores that it has computed anyway.

Along paths of the blend with weights W (``sdeblend.correct`` says which) and target q,

    KL(law of the blend || q) <= log E[W] - E[log W].

With the discrete weights the right side *is* the KL divergence between the blended chain and the normalised geometric
mean of the members' chains, prod_n prod_i R_i(x_{n-1} | x_n)^{c_i}, for any networks and any number of steps; the
samples' own KL is below it. That geometric mean ends in the target when the members are the tilts at one KL weight and
reverse the same forward process, up to the step size. With c_i >= 0, W <= 1 and -E[log W] is itself a bound, for one
sample even.

Source: data processing; Girsanov's theorem for the continuous case.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

WARN_NATS = 0.1
WARN_ESS = 0.5
# Fewer effective paths than this do not estimate log E[W]: one path would give a certificate of 0.
ENOUGH_PATHS = 10
# A resampled run remembers the plain blend through its surviving paths; below this share it has forgotten too much.
ENOUGH_MEMORY = 0.1


@dataclass(frozen=True)
class Certificate:
    """An upper bound, in nats, on KL(law of the blend || target), from the paths of the blend itself.

    Attributes:
        value: log E[W] - E[log W]; the path-space KL divergence (module docstring). With too few effective
            paths to estimate log E[W] and no negative coefficient, -E[log W], which is never below it.
        standard_error: of ``value``; infinite for a single path.
        ess_fraction: (E W)^2 / E W^2, the effective share of the samples without resampling.
        per_sample: -log W, (B,); with coefficients >= 0 its mean is a bound by itself, whatever the batch size.
        profile: what each step adds to -E[log W], (n,).
        samples: how many paths it comes from (after undoing any resampling, effectively).
        nonnegative: whether all coefficients are >= 0, so that -E[log W] >= value >= 0.
        normalised: whether log E[W] was estimated; False where its bound 0 stands for it.
    """

    value: float
    standard_error: float
    ess_fraction: float
    per_sample: Tensor
    profile: Tensor
    samples: float
    nonnegative: bool
    normalised: bool = True

    @property
    def reliable(self) -> bool:
        """Whether ``value`` can be trusted as a bound.

        It needs enough effective paths, or no negative coefficient; and a resampled run must still hold enough of
        the plain blend's paths.
        """
        if self.samples < ENOUGH_MEMORY * len(self.per_sample):
            return False
        return self.nonnegative or self.ess_fraction * self.samples >= ENOUGH_PATHS

    @property
    def tv_bound(self) -> float:
        """Bound on the total variation distance, sqrt(KL/2) at most 1 (Pinsker)."""
        return min(1.0, math.sqrt(max(self.value, 0.0) / 2))

    @property
    def warning(self) -> str | None:
        """One sentence if the blend should not be trusted uncorrected, else None."""
        if self.samples < ENOUGH_MEMORY * len(self.per_sample):
            return (
                f"this certificate comes from {self.samples:.0f} paths of the blend that resampling has left, of "
                f"{len(self.per_sample)}; run again with correct='certify' for one to trust"
            )
        if not self.reliable:
            return (
                f"this certificate needs {ENOUGH_PATHS} effective samples as some coefficients are negative, got "
                f"{self.ess_fraction * self.samples:.1f}; draw more samples of this prompt"
            )
        if self.value <= WARN_NATS and (self.ess_fraction >= WARN_ESS or not self.normalised):
            return None
        return (
            f"this blend may be {self.value:.3g} nats from its target and keeps {self.ess_fraction:.0%} of its samples "
            f"(trusted up to {WARN_NATS} nats and above {WARN_ESS:.0%}); correct it with correct='resample'"
        )

    def __str__(self) -> str:
        value = f"{'' if self.normalised else 'at most '}{self.value:.4g} +- {self.standard_error:.2g} nats"
        return f"{value} (effective samples {self.ess_fraction:.0%})"


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """Return (sum W)^2 / sum W^2 over the last dimension, between 1 and its size.

    Args:
        log_weights: (..., B), any offset; not all minus infinity.
    """
    log = log_weights.double()
    return (2 * log.logsumexp(-1) - (2 * log).logsumexp(-1)).exp()


def log_mean_exp(log_weights: Tensor) -> tuple[float, float]:
    """Return log E[W] and its standard error (delta method) from log W (B,)."""
    log, count = log_weights.double(), len(log_weights)
    value = float(log.logsumexp(0)) - math.log(count)
    relative = (log - value).exp()
    return value, float(relative.std()) / math.sqrt(count) if count > 1 else math.inf


def certify(
    path: Tensor, undo: Tensor, profile: list[float], nonnegative: bool, log_normalizer: float | None = None
) -> Certificate:
    """Return the certificate of paths.

    Args:
        path: log W of each, float64 (B,).
        undo: log of what undoes resampling, up to a constant, (B,).
        profile: what each step added to -E[log W].
        nonnegative: whether all coefficients are >= 0.
        log_normalizer: log E[W] if the run knows it better than its surviving paths.
    """
    # Weighted means over the plain blend's paths: undo is constant unless the run was resampled. Then the sampler's
    # own normaliser and the step-by-step profile forget less than the surviving paths do.
    weight, log = undo.softmax(0), path
    log_mean = float((undo + log).logsumexp(0) - undo.logsumexp(0)) if log_normalizer is None else log_normalizer
    relative = (log - log_mean).exp()
    influence = relative - 1 - (log - (weight * log).sum())
    ess, samples = min(1 / float((weight * relative.square()).sum()), 1.0), float(effective_sample_size(undo))
    # With c_i >= 0 every W <= 1, so log E[W] <= 0: the sound choice where it cannot be estimated.
    normalised = not nonnegative or ess * samples >= ENOUGH_PATHS
    if not normalised:
        log_mean, influence = 0.0, (weight * log).sum() - log
    return Certificate(
        value=log_mean + sum(profile),
        standard_error=float((weight * influence).square().sum().sqrt()) if len(path) > 1 else math.inf,
        ess_fraction=ess,
        per_sample=-path,
        profile=torch.tensor(profile, dtype=torch.float64),
        samples=samples,
        nonnegative=nonnegative,
        normalised=normalised,
    )
