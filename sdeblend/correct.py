"""The exact correction of a blend, from the member scores that it has computed anyway.

For coefficients c (sum one, signs allowed) the wanted target p_base exp(lambda r(w)/alpha) is the t = 0 member
of q_t ~ prod_i p_{i,t}^{c_i}. Along paths of the blended backward SDE, with S = sum c_i S_i,

    d log W = -(g^2/2) ( sum_i c_i |S_i|^2 - |S|^2 ) dt,

and the W-weighted paths have law q_t (Feynman-Kac). In discrete time, with member i's transition mean m_i and the
common variance V of the sampler's own step, exactly

    log W += -( sum_i c_i |m_i|^2 - |sum_i c_i m_i|^2 ) / (2 V).

Correction: weigh the samples by W, or resample on the way (sequential Monte Carlo) when the effective sample size
falls below a threshold. It fails quietly where the blend hardly visits a mode of the target, so the effective
sample size without resampling is always reported beside.

A step without noise (V = 0), the last one to t = 0 included, has no weight. Coefficients must not depend on time.

Source: Del Moral 2004 (Feynman-Kac); Skreta et al. 2503.02819 for scores; ``sdeblend.certificate`` for the bound.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sdeblend.blend import Blend, Evaluation, combine, spread
from sdeblend.certificate import Certificate, Mark, certify, effective_sample_size, last_mark, log_mean_exp
from sdeblend.correction import Correction, CorrectionMode, systematic_resample
from sdeblend.noise import Noise, generator_beside
from sdeblend.steps import Move, Step

# Weights of earlier steps that are remembered for the certificate's curve, 32 MiB of them.
KEPT = 1 << 22


class Weights:
    """The running weights of one run, driven by whoever walks: ``sdeblend.solve``, or a pipeline.

    Three logs are kept a sample: ``path`` (the full weight along its ancestry), ``steer`` (the tempered part that
    drives resampling, along its ancestry) and ``residual`` (the part of ``steer`` since the last resampling).
    ``residual - steer`` undoes every resampling, which is how the certificate of the plain blend
    comes out of a corrected run. Tensors are never written to, so that a copy stays what it is (``snapshot``), and what
    was known after a step can be kept for the certificate at that noise level.

    Args:
        correction: how the weights are used.
        batch: number of samples B.
        device: of the samples.
        nonnegative: whether all coefficients of the blend are >= 0.
        multistep: whether its steps remember the members' last posterior means.
        levels: the noise level sigma / alpha at the end of each step; None if not known.
        dimension: of a sample; None if not known.

    Attributes:
        ancestors: which start each sample descends from, long (B,).
        resampled: the steps after which samples were redrawn.
        particles: the samples of each group, one index a group.
        kept: of the samples before the last resampling, the places that are still used, long; None: all of them.

    Raises:
        ValueError: a correction without what it needs: a generator, groups of this batch, noise levels.
    """

    def __init__(
        self, correction: Correction, batch: int, device: torch.device, nonnegative: bool, multistep: bool = False,
        levels: Sequence[float] | None = None, dimension: int | None = None,
    ) -> None:  # fmt: skip
        self.correction, self.nonnegative = correction, nonnegative
        if correction.mode == "resample" and correction.generator is None:
            raise ValueError(
                "resampling needs a generator of its own, got None; pass Correction('resample', generator=...)"
            )
        groups = torch.zeros(batch, dtype=torch.long) if correction.groups is None else correction.groups.long().cpu()
        if groups.shape != (batch,):
            raise ValueError(f"groups must name one problem a sample, shape ({batch},), got {tuple(groups.shape)}")
        if levels is None and (correction.down_to or correction.keep is not None):
            raise ValueError("down_to and keep need a run that knows its noise levels, got none; leave them out")
        if levels is not None and correction.down_to > levels[0]:
            raise ValueError(
                f"down_to must be a noise level that a step ends at or above, got {correction.down_to:g} where the "
                f"first ends at {levels[0]:.3g}; go further down"
            )
        _, self._group = groups.unique(return_inverse=True)
        self.particles = _particles(self._group, device)
        smallest = min(int((self._group == g).sum()) for g in range(len(self.particles)))
        if correction.keep is not None and correction.keep > smallest:
            raise ValueError(
                f"keep takes at most the {smallest} samples that a group begins with, got {correction.keep}"
            )
        self.path = torch.zeros(batch, dtype=torch.float64, device=device)
        self.steer = self.residual = self.path  # and so for good without resampling
        self.ancestors = self._family = torch.arange(batch, device=device)
        self._variance = [0.0] * len(self.particles)  # of log E[W], up to where a group was last narrowed
        self.log_normalizer: list[float] = [0.0] * len(self.particles)
        self.multistep = multistep
        self._old: Tensor | None = None  # the members' posterior means (K, B, *event), one step ago
        self.profile: list[list[float]] = [[] for _ in self.particles]
        self.resampled: list[int] = []
        self.levels, self.dimension = levels, dimension
        self.kept: Tensor | None = None
        self._trace: list[_Then] = []

    def snapshot(self) -> Weights:
        """Return a copy that later steps leave alone."""
        out = copy.copy(self)
        out.profile = [record[:] for record in self.profile]
        out.log_normalizer, out.resampled, out._trace = self.log_normalizer[:], self.resampled[:], self._trace[:]
        out._variance = self._variance[:]
        return out

    def step(self, move: Move, evaluation: Evaluation) -> None:
        """Add one move of a walk with the evaluation of the blend that it was made with.

        The members' means are A x + B S_i + C D_i,old: the members of a multistep method each have their own memory.
        """
        if not move.g:
            self.skip()
        elif not move.c or self._old is None:
            self.add(evaluation.spread() * move.b**2, move.g**2, float(move.t))
        else:
            means, c = evaluation.members * move.b + self._old * move.c, evaluation.coefficients
            self.add(spread(means, c, combine(means, c)), move.g**2, float(move.t))
        if self.multistep:
            self._old = evaluation.members * move.q

    def add(self, spread_of_means: Tensor, variance: float, t: float) -> None:
        """Add one step: ``spread_of_means`` (B,) of the members' transition means, ``variance`` of the step."""
        increment = spread_of_means.detach().to(self.path) * (-0.5 / variance)
        undo = self.undo() if self.resampled else None
        for record, index in zip(self.profile, self.particles, strict=True):
            mean = increment[index].mean() if undo is None else (undo[index] * increment[index]).sum()
            record.append(-float(mean))
        self.path = self.path + increment
        if not self.within:
            pass  # gathered for the rest of the certificate's curve alone
        elif self.correction.mode != "resample":
            self.steer = self.residual = self.path
        elif self.correction.steers_at(t):
            self.steer = self.steer + increment * self.correction.tempering
            self.residual = self.residual + increment * self.correction.tempering
        full = self.correction.exact and self.within
        past = self.log_normalizer[:] if self.resampled and full else None
        self._keep(_Then(self._level, self.path, self.residual, self.steer, past, self.particles, self._steps))

    def skip(self) -> None:
        """Record a step without noise: it adds nothing."""
        for record in self.profile:
            record.append(0.0)
        if self._trace:
            self._keep(replace(self._trace[-1], level=self._level, steps=self._steps))

    @property
    def within(self) -> bool:
        """Whether the last step's weights count, down to the level that is asked for."""
        level = self._level
        return level is None or level >= self.correction.down_to * (1 - 1e-9)

    def undo(self) -> Tensor:
        """Return weights (B,) under which the samples stand for the blend without resampling; sum one a group."""
        log = self.residual - self.steer
        out = torch.empty_like(log)
        for index in self.particles:
            out[index] = log[index].softmax(0)
        return out

    def resample(self, step: int) -> Tensor | None:
        """Resample the groups that need it; return the ancestors if any did.

        With ``keep`` there may be fewer than samples: then ``kept`` are the places, of those before, that go on.
        """
        self.kept = None
        if self.correction.mode != "resample":
            return None
        ancestors, any_group = torch.full((len(self.path),), -1), False
        left, narrowed = self.residual.clone(), list[Tensor]()
        for g, index in enumerate(self.particles):
            residual = self.residual[index]
            place = torch.arange(len(self.path))[index.cpu() if isinstance(index, Tensor) else index]
            wanted = self._wanted(residual, step)
            if wanted is None:
                ancestors[place] = place
                continue
            assert self.correction.generator is not None  # checked at construction
            any_group = True
            if wanted < len(place):  # descendants that are too few to tell by how their start's weight varied
                self._variance[g] = self.normalizers()[g][1] ** 2
                narrowed.append(place)
            self.log_normalizer[g] += log_mean_exp(residual)[0]
            ancestors[place[:wanted]] = place[systematic_resample(residual, self.correction.generator, wanted).cpu()]
            left[index] = 0.0
        if not any_group:
            return None
        still = ancestors >= 0
        if not bool(still.all()):
            self.kept = still.nonzero().flatten().to(self.path.device)
            self._group = self._group[still]
            self.particles = _particles(self._group, self.path.device)
            left = left[self.kept]
        ancestors = ancestors[still].to(self.path.device)
        self.residual, self._old = left, None if self._old is None else self._old[:, ancestors]
        self.path, self.steer, self.ancestors = self.path[ancestors], self.steer[ancestors], self.ancestors[ancestors]
        family = self._family[ancestors]
        for place in narrowed:  # each is a start of its own from here on
            fresh = torch.isin(ancestors.cpu(), place)
            family[fresh] = len(still) + fresh.nonzero().flatten().to(family.device)
        self._family = family
        self.resampled.append(step)
        return ancestors

    def _wanted(self, residual: Tensor, step: int) -> int | None:
        """Return how many samples of a group go on after a step, None where they are left alone."""
        count, keep = len(residual), self.correction.keep
        if keep is not None and count > keep and self.levels and step == self.correction.last_step(self.levels):
            return keep
        effective = float(effective_sample_size(residual))
        if effective >= self.correction.threshold * count:
            return None
        return count if keep is None else max(keep, math.ceil(effective))

    def certificates(self) -> list[Certificate]:
        """Return one certificate a group, of the blend without resampling, at the level that is asked for."""
        out = []
        for g, record in enumerate(self.profile):
            marks = tuple(then.mark(g) for then in self._trace)
            mark = last_mark(marks, self.correction.down_to) if self.correction.down_to else None
            if mark is None:  # to the end, or nothing has been gathered yet
                start = self.path[self.particles[g]]
                mark = marks[-1] if marks else Mark(0, None, start, start, start)
            profile = torch.tensor(record, dtype=torch.float64)
            out.append(certify(mark, profile, self.nonnegative, self.dimension, bool(self.resampled), marks))
        return out

    def normalizers(self) -> list[tuple[float, float]]:
        """Return log E[W] of the steering weights and its standard error, one a group."""
        out = []
        for g, index in enumerate(self.particles):
            value, error = log_mean_exp(self.residual[index])
            if self.resampled:
                error = math.sqrt(_genealogical_variance(self.residual[index], self._family[index]) + self._variance[g])
            out.append((self.log_normalizer[g] + value, error))
        return out

    @property
    def _steps(self) -> int:
        return len(self.profile[0])

    @property
    def _level(self) -> float | None:
        """The noise level at the end of the last step."""
        return None if self.levels is None or not self._steps else self.levels[self._steps - 1]

    def _keep(self, then: _Then) -> None:
        """Remember a step for the certificate's curve; with very many samples, only every second one, and so on."""
        self._trace.append(then)
        if len(self._trace) * then.path.numel() > KEPT:
            last, level = len(self._trace) - 1, self.correction.down_to
            held = [then for then in self._trace if then.level is not None and then.level >= level * (1 - 1e-9)]
            self._trace = [
                then for k, then in enumerate(self._trace) if (last - k) % 2 == 0 or (held and then is held[-1])
            ]


@dataclass(frozen=True, eq=False)
class _Then:
    """What is known after one step, before any resampling there; of all groups."""

    level: float | None
    path: Tensor
    residual: Tensor
    steer: Tensor
    past: list[float] | None
    particles: list[Tensor | slice]
    steps: int

    def mark(self, g: int) -> Mark:
        """Return what is known of one group."""
        index, past = self.particles[g], None if self.past is None else self.past[g]
        return Mark(self.steps, self.level, self.path[index], self.residual[index], self.steer[index], past)


def _particles(group: Tensor, device: torch.device) -> list[Tensor | slice]:
    """Return one index a group, of groups numbered from 0, long (B,)."""
    count = int(group.max()) + 1
    if count == 1:
        return [slice(None)]  # a view where an index would copy, every step
    return [(group == g).nonzero().flatten().to(device) for g in range(count)]


def _genealogical_variance(residual: Tensor, ancestors: Tensor) -> float:
    """Return the variance of log E[W] after resampling, from the weight of each first ancestor.

    Source: Chan and Lai 2013; Lee and Whiteley 2018.
    """
    weight = residual.softmax(0)
    _, family = ancestors.unique(return_inverse=True)
    families = torch.zeros_like(weight).scatter_add_(0, family, weight)
    return max(float(families.square().sum()) - 1 / len(weight), 0.0)


def start_weights(
    correct: CorrectionMode | Correction | None, score: object, step: Step, noise: Noise, x: Tensor, levels: list[float]
) -> Weights | None:
    """Return the weights of a run that starts at x (B, *event), or None without correction.

    Args:
        correct: "certify", "resample" or a ``Correction``.
        score: must be a ``Blend`` with constant coefficients.
        step: must have noise.
        noise: of the run; the seed of its generator, the first if there are several, gives "resample" its own.
        x: the start.
        levels: sigma / alpha at the end of each step.

    Raises:
        TypeError, ValueError: a correction that does not apply.
    """
    if correct is None:
        return None
    if isinstance(correct, str):
        generator = None
        if correct == "resample":
            generator = generator_beside(noise, 1, "Correction('resample', generator=...)")
        correct = Correction(correct, generator=generator)
    if not isinstance(correct, Correction):
        raise TypeError(f"correct must be 'certify', 'resample', a Correction or None, got {correct!r}")
    if not isinstance(score, Blend) or not score.constant:
        what = "time-dependent coefficients" if isinstance(score, Blend) else type(score).__name__
        raise ValueError(
            f"a certificate or correction needs a Blend with constant coefficients, got {what}; pass correct=None"
        )
    if not step.stochastic:
        raise ValueError(
            f"a certificate or correction needs a step with noise, got {type(step).__name__} without; use "
            "EulerMaruyama, Ancestral(eta=1) or ExponentialMultistep(stochastic=True)"
        )
    if score.coefficients.ndim == 2:
        correct = replace(correct, groups=_groups(score.coefficients, correct.groups))
    nonnegative = bool((score.coefficients >= 0).all())
    return Weights(correct, len(x), x.device, nonnegative, step.multistep, levels, x[0].numel())


def _groups(coefficients: Tensor, given: Tensor | None) -> Tensor:
    """Return which samples share a target, long (B,): those of equal coefficients, in order of appearance."""
    _, rows = coefficients.unique(dim=0, return_inverse=True)
    if given is None:
        order = {row: i for i, row in enumerate(dict.fromkeys(rows.tolist()))}
        return torch.tensor([order[row] for row in rows.tolist()])
    if given.shape != rows.shape:
        return given  # Weights names the shape it needs
    mixed = [g for g in given.unique().tolist() if len(rows[given.cpu() == g].unique()) > 1]
    if mixed:
        raise ValueError(
            f"particles of one group must share their coefficients, got several in group {mixed[0]}; give each "
            "preference a group of its own, or leave groups out"
        )
    return given
