"""The certificate of a blend, from the member scores that it has computed anyway.

Along paths of the blend with weights W (``sdeblend.correct`` says which) and target q,

    KL(law of the blend || q) <= log E[W] - E[log W].

With the discrete weights the right side *is* the KL divergence between the blended chain and the normalised geometric
mean of the members' chains, prod_n prod_i R_i(x_{n-1} | x_n)^{c_i}, for any networks and any number of steps; the
samples' own KL is below it. That geometric mean ends in the target when the members are the tilts at one KL weight and
reverse the same forward process, up to the step size. With c_i >= 0, W <= 1 and -E[log W] is itself a bound, for one
sample even.

At every noise level: the weights gathered up to step n bound the law *there*, KL(P_n || q_n), with q_n ~ prod_i
p_{i,n}^{c_i} the members' product as seen through the noise level sigma_n / alpha_n. The blend's own remaining steps
finish both alike and cannot part them. So the samples are within that number of "q at this level, finished by the
blend", which is what differences finer than the level do not count in.

Reading it: importance sampling needs about exp(KL(q || blend)) samples; the total variation is at most sqrt(KL/2), and
at most sqrt(1 - exp(-KL)).

Source: data processing; Girsanov's theorem for the continuous case; Chatterjee and Diaconis 2018 (samples needed);
Bretagnolle and Huber 1979.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

# Measured on 29 mixtures (ring8, line2, conflict_line, high_dimension(16), random; KL weights 2 to .1; 4096 samples):
# mode-weight TV to the target was at most .028 where a certificate was below the first of these, .012 to .073 below the
# second, and .084 to .76 above it (as many exact samples: .014).
EXACT_NATS = 0.005
WARN_NATS = 0.1
WARN_ESS = 0.5
# Fewer effective paths than this do not estimate log E[W]: one path would give a certificate of 0. Nor do they correct:
# on the same mixtures weights left 1.0 of the TV at 2 to 6 effective samples, .64 at 10 to 15, .5 at 25 to 60 (median).
ENOUGH_PATHS = 10
# A resampled run remembers the plain blend through its surviving paths; below this share it has forgotten too much.
ENOUGH_MEMORY = 0.1


@dataclass(frozen=True, eq=False)
class Mark:
    """What a run knew after one step, before any resampling there: what its certificate at that noise level needs.

    Attributes:
        steps: how many it had taken.
        level: sigma / alpha at the end of the last; None where the run was not told its noise levels.
        path: log W of each sample along its ancestry, float64 (B,).
        residual, steer: logs of what steers resampling, since the last one and along the ancestry; ``path`` without.
        past: log E[W] of the steering weights up to the last resampling; None unless they are the full ones and were
            used: then the surviving paths are all that is known.
    """

    steps: int
    level: float | None
    path: Tensor
    residual: Tensor
    steer: Tensor
    past: float | None = None


class Curve(NamedTuple):
    """A certificate at every noise level, float64 (m,) each, from noise to data; attributes as ``Certificate`` has."""

    level: Tensor
    nats: Tensor
    standard_error: Tensor
    ess_fraction: Tensor
    needed: Tensor


class RewardGap(NamedTuple):
    """How far a mean reward of the target may lie from the blend's, in standard deviations of the blend's samples.

    Attributes:
        value: (E_W[r] - E[r]) / sd(r), the weights taken at their word.
        low, high: its 95 % interval; it says little below ten effective samples.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False, repr=False)
class Certificate:
    """An upper bound, in nats, on KL(law of the blend || target), from the paths of the blend itself.

    Attributes:
        value: log E[W] - E[log W]; the path-space KL divergence (module docstring). With too few effective
            paths to estimate log E[W] and no negative coefficient, -E[log W], which is never below it.
        standard_error: of ``value``; infinite for a single path.
        ess_fraction: (E W)^2 / E W^2, the effective share of the samples without resampling.
        per_sample: -log W, (B,); with coefficients >= 0 its mean is a bound by itself, whatever the batch size.
        profile: what each step adds to -E[log W], (n,); the first ``steps`` of them make the value.
        samples: how many paths it comes from (after undoing any resampling, effectively).
        nonnegative: whether all coefficients are >= 0, so that -E[log W] >= value >= 0.
        normalised: whether log E[W] was estimated; False where its bound 0 stands for it.
        reverse: E_W[log W] - log E[W], what the weights say of KL(target || law of the blend); 0 if not normalised.
        level: the noise level sigma / alpha that it belongs to; 0 for the samples themselves, None if not known.
        steps: how many steps end at it or above.
        dimension: of a sample; None if not known.
        resampled: whether the run was corrected by resampling; the certificate is of the blend without.
        marks: what it is at other noise levels comes from.
    """

    value: float
    standard_error: float
    ess_fraction: float
    per_sample: Tensor
    profile: Tensor
    samples: float
    nonnegative: bool
    normalised: bool = True
    reverse: float = 0.0
    level: float | None = None
    steps: int = 0
    dimension: int | None = None
    resampled: bool = False
    marks: tuple[Mark, ...] = field(default=(), repr=False)

    @property
    def reliable(self) -> bool:
        """Whether ``value`` can be trusted as a bound.

        It needs enough effective paths, or no negative coefficient; and a resampled run must still hold enough of
        the plain blend's paths.
        """
        return self._forgotten is None and (self.nonnegative or self.effective >= ENOUGH_PATHS)

    @property
    def effective(self) -> float:
        """How many samples of the target the samples are worth once weighted by W, without resampling."""
        return self.ess_fraction * self.samples

    @property
    def tv_bound(self) -> float:
        """Bound on the total variation distance: Pinsker's sqrt(KL/2) or Bretagnolle and Huber's, whichever is less."""
        kl = max(self.value, 0.0)
        return min(math.sqrt(kl / 2), math.sqrt(-math.expm1(-kl)))

    @property
    def needed(self) -> float:
        """About how many samples of the blend hold one of the target: exp(KL(target || blend)), at least 1.

        From the weights; where there are too few of them to tell, exp(certificate) stands for it. The two differ where
        the target is a small part of the blend: 17.6 nats on high_dimension(16) at KL weight .1, yet 21 are needed.
        """
        return math.exp(min(max(self.reverse if self.normalised else self.value, 0.0), 700.0))

    @property
    def per_dimension(self) -> float | None:
        """Nats a dimension of a sample, None if the dimension is not known."""
        return None if self.dimension is None else self.value / self.dimension

    @property
    def last_share(self) -> float:
        """Share of -E[log W] that the last tenth of the steps (at least one) with noise added."""
        profile = self.profile[: self.steps]
        noisy = profile[profile != 0]
        return float(noisy[-math.ceil(len(noisy) / 10) :].sum() / noisy.sum()) if len(noisy) else 0.0

    @property
    def word(self) -> str:
        """What can be concluded.

        "exact", "close", "correct it" (or "corrected"), "too far to correct with n samples", "too few samples to tell"
        (their weights are alike, but do not give log E[W]), or "UNRELIABLE".
        """
        if not self.reliable:
            return "UNRELIABLE"
        if self.value <= EXACT_NATS:
            return "exact"
        if self.value <= WARN_NATS and (self.ess_fraction >= WARN_ESS or not self.normalised):
            return "close"
        if self.samples < ENOUGH_PATHS and self.ess_fraction >= WARN_ESS:
            return "too few samples to tell"
        if self.effective < ENOUGH_PATHS:
            return f"too far to correct with {self.samples:.0f} sample{'s' * (round(self.samples) != 1)}"
        return "corrected" if self.resampled else "correct it"

    @property
    def warning(self) -> str | None:
        """One sentence if the blend should not be trusted as it is, with what to do; else None."""
        if self._forgotten is not None:
            return self._forgotten
        if not self.reliable:
            return (
                f"this certificate needs {ENOUGH_PATHS} effective samples as some coefficients are negative, got "
                f"{self.effective:.1f}; draw more samples of this prompt"
            )
        if self.word in ("exact", "close"):
            return None
        if self.word.startswith("too few"):
            return (
                f"this blend is within {self.value:.3g} nats of its target, which is a loose bound as it comes from "
                f"{self.samples:.0f} samples whose weights are alike; draw at least {ENOUGH_PATHS} to tell"
            )
        head = (
            f"this blend may be {self.value:.3g} nats from its target and keeps {self.ess_fraction:.0%} of its samples "
            f"(trusted up to {WARN_NATS} nats and above {WARN_ESS:.0%})"
        )
        if self.effective < ENOUGH_PATHS:
            more = f"{ENOUGH_PATHS * self.needed:.2g}" if self.needed < 1e6 else "more than a million"
            return f"{head}; it takes about {more} to correct it, or a Correction(down_to=...) a coarser noise level"
        if self.resampled:
            return f"{head}; its samples were corrected by resampling"
        return f"{head}; correct it with correct='resample'"

    @property
    def curve(self) -> Curve:
        """The certificate at the noise levels of the run, from noise to data.

        Raises:
            ValueError: a run that was not told its noise levels.
        """
        found = [self.at(mark.level) for mark in self.marks if mark.level is not None]
        if not found:
            raise ValueError(_NO_LEVELS)
        rows = [(c.level, c.value, c.standard_error, c.ess_fraction, c.needed) for c in found]
        return Curve(*torch.tensor(rows, dtype=torch.float64).unbind(1))

    def at(self, level: float) -> Certificate:
        """Return the certificate at a noise level: of the samples against q there, finished by the blend.

        Args:
            level: sigma / alpha; the steps that end at it or above count. 0 is the samples themselves.

        Raises:
            ValueError: a run that was not told its noise levels, or a level above all of them.
        """
        levels = [mark.level for mark in self.marks if mark.level is not None]
        if not levels:
            raise ValueError(_NO_LEVELS)
        mark = last_mark(self.marks, level)
        if mark is None:
            raise ValueError(f"a certificate at a noise level needs one of at most {levels[0]:.3g}, got {level:.3g}")
        return certify(mark, self.profile, self.nonnegative, self.dimension, self.resampled, self.marks)

    def reward_gap(self, rewards: Tensor) -> RewardGap:
        """Return how far the target's mean reward may lie from the blend's, in standard deviations.

        Args:
            rewards: of the samples that the certificate's paths end in, (B,).

        Raises:
            ValueError: rewards of other samples, not finite or all the same, or a resampled run, whose samples are no
                longer the blend's.
        """
        r = rewards.detach().double().cpu()
        if self.resampled:
            raise ValueError("a reward gap needs the blend's own samples, got a resampled run; use correct='certify'")
        if r.shape != self.per_sample.shape or len(r) < 2 or not bool(r.isfinite().all()):
            raise ValueError(
                f"a reward gap needs one finite reward for each of {len(self.per_sample)} samples (at least 2), got "
                f"shape {tuple(r.shape)}; pass those of this run's samples, in their order"
            )
        log_w, spread = -self.per_sample.cpu(), float(r.std())
        if not spread > 0:
            raise ValueError("a reward gap needs rewards that differ, got one value for all samples")
        z, w, n = (r - r.mean()) / spread, log_w.softmax(0), len(r)
        value = float(w @ z)
        # influence of each sample on E_W[r] - E[r]: both terms move
        error = float((w * (z - value) - z / n).square().sum().sqrt())
        return RewardGap(value, value - 1.96 * error, value + 1.96 * error)

    @property
    def _forgotten(self) -> str | None:
        if self.samples >= ENOUGH_MEMORY * len(self.per_sample):
            return None
        return (
            f"this certificate comes from {self.samples:.0f} paths of the blend that resampling has left, of "
            f"{len(self.per_sample)}; run again with correct='certify' for one to trust"
        )

    def __repr__(self) -> str:
        return f"Certificate({self.value:.3g} nats, {self.ess_fraction:.0%} effective)"

    def __str__(self) -> str:
        value = f"{'' if self.normalised else 'at most '}{self.value:.4g} +- {self.standard_error:.2g} nats"
        where = f" at noise level {self.level:.3g}" if self.level else ""
        late = f", {self.last_share:.0%} of it in the last steps" if self.last_share > 0.5 else ""
        return f"{value}{where} (effective samples {self.ess_fraction:.0%}{late}): {self.word}"


_NO_LEVELS = "a certificate at a noise level needs a run that was told its levels, got none; give Weights its levels"


def last_mark(marks: tuple[Mark, ...] | list[Mark], level: float) -> Mark | None:
    """Return the last mark at this noise level or above, None if there is none; rounding apart."""
    held = [mark for mark in marks if mark.level is not None and mark.level >= level * (1 - 1e-9)]
    return held[-1] if held else None


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
    mark: Mark, profile: Tensor, nonnegative: bool, dimension: int | None = None, resampled: bool = False,
    marks: tuple[Mark, ...] = (),
) -> Certificate:  # fmt: skip
    """Return the certificate of paths.

    Args:
        mark: what the run knew of them.
        profile: what each step added to -E[log W], float64 (n,).
        nonnegative: whether all coefficients are >= 0.
        dimension, resampled, marks: as ``Certificate`` has them.
    """
    # Weighted means over the plain blend's paths: undo is constant unless the run was resampled. Then the sampler's
    # own normaliser and the step-by-step profile forget less than the surviving paths do.
    log, undo = mark.path, mark.residual - mark.steer
    weight = undo.softmax(0)
    log_mean = float((undo + log).logsumexp(0) - undo.logsumexp(0))
    if mark.past is not None:
        log_mean = mark.past + log_mean_exp(mark.residual)[0]
    relative = (log - log_mean).exp()
    influence = relative - 1 - (log - (weight * log).sum())
    ess, samples = min(1 / float((weight * relative.square()).sum()), 1.0), float(effective_sample_size(undo))
    reverse = float((weight * relative * log).sum() / (weight * relative).sum()) - log_mean
    # With c_i >= 0 every W <= 1, so log E[W] <= 0: the sound choice where it cannot be estimated.
    normalised = not nonnegative or ess * samples >= ENOUGH_PATHS
    if not normalised:
        log_mean, reverse, influence = 0.0, 0.0, (weight * log).sum() - log
    return Certificate(
        value=log_mean + float(profile[: mark.steps].sum()),
        standard_error=float((weight * influence).square().sum().sqrt()) if len(log) > 1 else math.inf,
        ess_fraction=ess,
        per_sample=-log,
        profile=profile,
        samples=samples,
        nonnegative=nonnegative,
        normalised=normalised,
        reverse=reverse,
        level=mark.level,
        steps=mark.steps,
        dimension=dimension,
        resampled=resampled,
        marks=marks,
    )
