"""The certificate of a blend and its exact correction, from the member scores the blend has computed anyway.

For coefficients c (sum one, signs allowed) the wanted target p_base exp(lambda r(w)/alpha) is the t = 0 member
of q_t ~ prod_i p_{i,t}^{c_i}. Along paths of the blended backward SDE, with S = sum c_i S_i,

    d log W = -(g^2/2) ( sum_i c_i |S_i|^2 - |S|^2 ) dt,

and the W-weighted paths have law q_t (Feynman-Kac). In discrete time, with member i's transition mean m_i and the
common variance V of the sampler's own step, exactly

    log W += -( sum_i c_i |m_i|^2 - |sum_i c_i m_i|^2 ) / (2 V).

Certificate: KL(law of the blend || target) <= log E[W] - E[log W]. With the discrete weights the right side *is* the
KL divergence between the blended chain and the normalised geometric mean of the members' chains,
prod_n prod_i R_i(x_{n-1} | x_n)^{c_i}, for any networks and any number of steps; the samples' own KL is below it. That
geometric mean ends in the target when the members are the tilts at one KL weight and reverse the same forward
process, up to the step size. With c_i >= 0, W <= 1 and -E[log W] is itself a bound, for one sample even.

Correction: weigh the samples by W, or resample on the way (sequential Monte Carlo) when the effective sample size
falls below a threshold. It fails quietly where the blend hardly visits a mode of the target, so the effective
sample size without resampling is always reported beside.

A step without noise (V = 0), the last one to t = 0 included, has no weight. Coefficients must not depend on time.

Source: Del Moral 2004 (Feynman-Kac); Skreta et al. 2503.02819 for scores; theory of the certificate: README.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

CorrectionMode = Literal["certify", "resample"]
WARN_NATS = 0.1
WARN_ESS = 0.5
# Fewer effective paths than this do not estimate log E[W]: one path would give a certificate of 0.
ENOUGH_PATHS = 10
# A resampled run remembers the plain blend through its surviving paths; below this share it has forgotten too much.
ENOUGH_MEMORY = 0.1


@dataclass(frozen=True)
class Correction:
    """How the weights of a run are used.

    Args:
        mode: "certify" keeps them and leaves the samples alone; "resample" corrects on the way.
        threshold: resample a group when its effective sample size falls below this fraction, within (0, 1].
        tempering: exponent of the weights that steer resampling, within (0, 1]; below 1 the correction is partial.
        active: (low, high), times between which weights steer resampling; others are left out. None: all.
        generator: draws the ancestors and nothing else; needed to resample.
        groups: which samples are particles of one problem, long (B,); None: all.

    Raises:
        ValueError: a value outside its range.
    """

    mode: CorrectionMode = "certify"
    threshold: float = 0.5
    tempering: float = 1.0
    active: tuple[float, float] | None = None
    generator: torch.Generator | None = None
    groups: Tensor | None = None

    def __post_init__(self) -> None:
        if self.mode not in get_args(CorrectionMode):
            raise ValueError(f"a correction must be one of {', '.join(get_args(CorrectionMode))}, got {self.mode!r}")
        for name in ("threshold", "tempering"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise ValueError(f"the {name} of a correction must lie within (0, 1], got {value}; 1 is the full one")
        if self.active is not None and not 0 <= self.active[0] < self.active[1]:
            raise ValueError(f"the active interval must be (low, high) with 0 <= low < high, got {self.active}")

    @property
    def exact(self) -> bool:
        """Whether the weights that steer are the full ones."""
        return self.tempering == 1 and self.active is None

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the result must know: one sentence for each way in which the correction is partial."""
        notes = []
        if self.mode == "resample" and self.tempering != 1:
            notes.append(f"the weights were tempered by {self.tempering:g}: the correction is partial")
        if self.mode == "resample" and self.active is not None:
            low, high = self.active
            notes.append(f"weights steered only for t in [{low:g}, {high:g}]: the correction is partial")
        return tuple(notes)

    def steers_at(self, t: float) -> bool:
        """Return whether weights gathered at time t steer resampling."""
        return self.active is None or self.active[0] <= t <= self.active[1]


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


def systematic_resample(log_weights: Tensor, generator: torch.Generator) -> Tensor:
    """Draw ancestors with one uniform number: sample i has floor or ceil of B W_i / sum W descendants.

    Args:
        log_weights: (B,).
        generator: on the CPU.

    Returns:
        ancestors, long (B,), sorted.

    Raises:
        ValueError: weights that are NaN or all zero.

    Source: Kitagawa 1996; Douc, Cappe and Moulines 2005.
    """
    log = log_weights.detach().double().cpu()
    if bool(log.isnan().any()) or not bool((log > -math.inf).any()):
        raise ValueError("resampling needs weights that are numbers and not all zero; use fewer or closer members")
    edges = log.softmax(0).cumsum(0)
    edges[-1] = 1.0
    count = len(log)
    offset = torch.rand(1, generator=generator, dtype=torch.float64)
    points = (torch.arange(count, dtype=torch.float64) + offset) / count
    return torch.searchsorted(edges, points).clamp(max=count - 1).to(log_weights.device)


def log_mean_exp(log_weights: Tensor) -> tuple[float, float]:
    """Return log E[W] and its standard error (delta method) from log W (B,)."""
    log, count = log_weights.double(), len(log_weights)
    value = float(log.logsumexp(0)) - math.log(count)
    relative = (log - value).exp()
    return value, float(relative.std()) / math.sqrt(count) if count > 1 else math.inf


class Weights:
    """The running weights of one solve; one object a run, driven by ``sdeblend.solve``.

    Three logs are kept a sample: ``path`` (the full weight along its ancestry), ``steer`` (the tempered part that
    drives resampling, along its ancestry) and ``residual`` (the part of ``steer`` since the last resampling).
    ``residual - steer`` undoes every resampling, which is how the certificate of the plain blend
    comes out of a corrected run.
    """

    def __init__(self, correction: Correction, batch: int, device: torch.device, nonnegative: bool) -> None:
        self.correction, self.nonnegative = correction, nonnegative
        if correction.mode == "resample" and correction.generator is None:
            raise ValueError(
                "resampling needs a generator of its own, got None; pass Correction('resample', generator=...)"
            )
        groups = torch.zeros(batch, dtype=torch.long) if correction.groups is None else correction.groups.long().cpu()
        if groups.shape != (batch,):
            raise ValueError(f"groups must name one problem a sample, shape ({batch},), got {tuple(groups.shape)}")
        names = groups.unique().tolist()
        self.members_of: list[Tensor | slice] = [(groups == g).nonzero().flatten().to(device) for g in names]
        if len(names) == 1:
            self.members_of = [slice(None)]  # a view where an index would copy, every step
        self.path = torch.zeros(batch, dtype=torch.float64, device=device)
        resample = correction.mode == "resample"
        # Without resampling nothing is steered: one tensor under three names.
        self.steer, self.residual = (self.path.clone() if resample else self.path for _ in range(2))
        self.eve = torch.arange(batch, device=device)
        self.log_normalizer = [0.0] * len(self.members_of)
        self.profile: list[list[float]] = [[] for _ in self.members_of]
        self.resampled: list[int] = []

    def add(self, spread_of_means: Tensor, variance: float, t: float) -> None:
        """Add one step: ``spread_of_means`` (B,) of the members' transition means, ``variance`` of the step."""
        increment = spread_of_means.to(self.path) * (-0.5 / variance)
        for record, index in zip(self.profile, self.members_of, strict=True):
            if self.resampled:
                undo = (self.residual - self.steer)[index].softmax(0)
                record.append(-float((undo * increment[index]).sum()))
            else:
                record.append(-float(increment[index].mean()))
        self.path += increment
        if self.correction.mode == "resample" and self.correction.steers_at(t):
            increment *= self.correction.tempering
            self.steer += increment
            self.residual += increment

    def skip(self) -> None:
        """Record a step without noise: it adds nothing."""
        for record in self.profile:
            record.append(0.0)

    def resample(self, step: int) -> Tensor | None:
        """Resample the groups that need it; return the ancestors (B,) if any did."""
        if self.correction.mode != "resample":
            return None
        ancestors, any_group = torch.arange(len(self.path), device=self.path.device), False
        for g, index in enumerate(self.members_of):
            residual = self.residual[index]
            if float(effective_sample_size(residual)) >= self.correction.threshold * len(residual):
                continue
            assert self.correction.generator is not None  # checked at construction
            any_group = True
            self.log_normalizer[g] += log_mean_exp(residual)[0]
            ancestors[index] = ancestors[index][systematic_resample(residual, self.correction.generator)]
            self.residual[index] = 0.0
        if not any_group:
            return None
        self.path, self.steer, self.eve = self.path[ancestors], self.steer[ancestors], self.eve[ancestors]
        self.resampled.append(step)
        return ancestors

    def certificates(self) -> list[Certificate]:
        """Return one certificate a group, of the blend without resampling."""
        return [
            _certificate(
                self.path[i],
                (self.residual - self.steer)[i],
                self.profile[g],
                self.nonnegative,
                self.normalizers()[g][0] if self.resampled and self.correction.exact else None,
            )
            for g, i in enumerate(self.members_of)
        ]

    def normalizers(self) -> list[tuple[float, float]]:
        """Return log E[W] of the steering weights and its standard error, one a group."""
        out = []
        for g, index in enumerate(self.members_of):
            value, error = log_mean_exp(self.residual[index])
            if self.resampled:
                error = _genealogical_error(self.residual[index], self.eve[index], len(self.resampled))
            out.append((self.log_normalizer[g] + value, error))
        return out


def _certificate(
    path: Tensor, undo: Tensor, profile: list[float], nonnegative: bool, log_normalizer: float | None = None
) -> Certificate:
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


def _genealogical_error(residual: Tensor, eve: Tensor, resamplings: int) -> float:
    """Return the standard error of log E[W] after resampling, from the weight of each first ancestor.

    Source: Chan and Lai 2013; Lee and Whiteley 2018.
    """
    weight = residual.softmax(0)
    families = torch.zeros_like(weight).scatter_add_(0, (eve - eve.min()).clamp(max=len(weight) - 1), weight)
    count = len(weight)
    return math.sqrt(max(float(families.square().sum()) - 1 / count, 0.0))
