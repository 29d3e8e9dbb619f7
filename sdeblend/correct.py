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
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from sdeblend.blend import Blend, Evaluation, combine, spread
from sdeblend.certificate import Certificate, certify, effective_sample_size, log_mean_exp
from sdeblend.noise import Noise, generator_beside
from sdeblend.steps import Move, Step

CorrectionMode = Literal["certify", "resample"]


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


class Weights:
    """The running weights of one run, driven by whoever walks: ``sdeblend.solve``, or a pipeline.

    Three logs are kept a sample: ``path`` (the full weight along its ancestry), ``steer`` (the tempered part that
    drives resampling, along its ancestry) and ``residual`` (the part of ``steer`` since the last resampling).
    ``residual - steer`` undoes every resampling, which is how the certificate of the plain blend
    comes out of a corrected run. Tensors are never written to, so that a copy stays what it is (``snapshot``).

    Args:
        correction: how the weights are used.
        batch: number of samples B.
        device: of the samples.
        nonnegative: whether all coefficients of the blend are >= 0.
        multistep: whether its steps remember the members' last posterior means.

    Attributes:
        ancestors: which start each sample descends from, long (B,).
        resampled: the steps after which samples were redrawn.
        particles: the samples of each group, one index a group.
    """

    def __init__(
        self, correction: Correction, batch: int, device: torch.device, nonnegative: bool, multistep: bool = False
    ) -> None:
        self.correction, self.nonnegative = correction, nonnegative
        if correction.mode == "resample" and correction.generator is None:
            raise ValueError(
                "resampling needs a generator of its own, got None; pass Correction('resample', generator=...)"
            )
        groups = torch.zeros(batch, dtype=torch.long) if correction.groups is None else correction.groups.long().cpu()
        if groups.shape != (batch,):
            raise ValueError(f"groups must name one problem a sample, shape ({batch},), got {tuple(groups.shape)}")
        names = groups.unique().tolist()
        self.particles: list[Tensor | slice] = [(groups == g).nonzero().flatten().to(device) for g in names]
        if len(names) == 1:
            self.particles = [slice(None)]  # a view where an index would copy, every step
        self.path = torch.zeros(batch, dtype=torch.float64, device=device)
        self.steer = self.residual = self.path  # and so for good without resampling
        self.ancestors = torch.arange(batch, device=device)
        self.log_normalizer: list[float] = [0.0] * len(self.particles)
        self.multistep = multistep
        self._old: Tensor | None = None  # the members' posterior means (K, B, *event), one step ago
        self.profile: list[list[float]] = [[] for _ in self.particles]
        self.resampled: list[int] = []

    def snapshot(self) -> Weights:
        """Return a copy that later steps leave alone."""
        out = copy.copy(self)
        out.profile = [record[:] for record in self.profile]
        out.log_normalizer, out.resampled = self.log_normalizer[:], self.resampled[:]
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
        if self.correction.mode != "resample":
            self.steer = self.residual = self.path
        elif self.correction.steers_at(t):
            self.steer = self.steer + increment * self.correction.tempering
            self.residual = self.residual + increment * self.correction.tempering

    def skip(self) -> None:
        """Record a step without noise: it adds nothing."""
        for record in self.profile:
            record.append(0.0)

    def undo(self) -> Tensor:
        """Return weights (B,) under which the samples stand for the blend without resampling; sum one a group."""
        log = self.residual - self.steer
        out = torch.empty_like(log)
        for index in self.particles:
            out[index] = log[index].softmax(0)
        return out

    def resample(self, step: int) -> Tensor | None:
        """Resample the groups that need it; return the ancestors (B,) if any did."""
        if self.correction.mode != "resample":
            return None
        ancestors, any_group = torch.arange(len(self.path), device=self.path.device), False
        left = self.residual.clone()
        for g, index in enumerate(self.particles):
            residual = self.residual[index]
            if float(effective_sample_size(residual)) >= self.correction.threshold * len(residual):
                continue
            assert self.correction.generator is not None  # checked at construction
            any_group = True
            self.log_normalizer[g] += log_mean_exp(residual)[0]
            ancestors[index] = ancestors[index][systematic_resample(residual, self.correction.generator)]
            left[index] = 0.0
        if not any_group:
            return None
        self.residual, self._old = left, None if self._old is None else self._old[:, ancestors]
        self.path, self.steer, self.ancestors = self.path[ancestors], self.steer[ancestors], self.ancestors[ancestors]
        self.resampled.append(step)
        return ancestors

    def certificates(self) -> list[Certificate]:
        """Return one certificate a group, of the blend without resampling."""
        return [
            certify(
                self.path[i],
                (self.residual - self.steer)[i],
                self.profile[g],
                self.nonnegative,
                self.normalizers()[g][0] if self.resampled and self.correction.exact else None,
            )
            for g, i in enumerate(self.particles)
        ]

    def normalizers(self) -> list[tuple[float, float]]:
        """Return log E[W] of the steering weights and its standard error, one a group."""
        out = []
        for g, index in enumerate(self.particles):
            value, error = log_mean_exp(self.residual[index])
            if self.resampled:
                error = _genealogical_error(self.residual[index], self.ancestors[index], len(self.resampled))
            out.append((self.log_normalizer[g] + value, error))
        return out


def _genealogical_error(residual: Tensor, ancestors: Tensor, resamplings: int) -> float:
    """Return the standard error of log E[W] after resampling, from the weight of each first ancestor.

    Source: Chan and Lai 2013; Lee and Whiteley 2018.
    """
    weight = residual.softmax(0)
    place = (ancestors - ancestors.min()).clamp(max=len(weight) - 1)
    families = torch.zeros_like(weight).scatter_add_(0, place, weight)
    count = len(weight)
    return math.sqrt(max(float(families.square().sum()) - 1 / count, 0.0))


def start_weights(
    correct: CorrectionMode | Correction | None, score: object, step: Step, noise: Noise, x: Tensor
) -> Weights | None:
    """Return the weights of a run that starts at x (B, *event), or None without correction.

    Args:
        correct: "certify", "resample" or a ``Correction``.
        score: must be a ``Blend`` with constant coefficients.
        step: must have noise.
        noise: of the run; the seed of its generator, the first if there are several, gives "resample" its own.
        x: the start.

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
    return Weights(correct, len(x), x.device, bool((score.coefficients >= 0).all()), step.multistep)


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
