"""Solving a backward SDE: the loop, and nothing else.

``trajectory`` is a generator of states; saving, plotting and stopping are the caller's. ``solve`` runs it to the end
and returns a ``Solution``. The grid runs down from noise; the noise is explicit; the state keeps its
dtype. A non-finite state stops the run and names step, time and sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sdeblend.blend import Blend, Evaluation, combine, spread
from sdeblend.correct import Certificate, Correction, CorrectionMode, Weights
from sdeblend.grid import check_grid
from sdeblend.noise import NoiseSource, noise_source
from sdeblend.score import prepare_times
from sdeblend.sde import BackwardSDE, check_state
from sdeblend.steps import EulerMaruyama, Move, Step

Noise = torch.Generator | Sequence[torch.Generator] | NoiseSource


@dataclass(frozen=True)
class State:
    """A state on the way.

    Attributes:
        step: how many steps are done.
        t: the time, float.
        x: (B, *event).
        log_weights: since the last resampling, float64 (B,), or None without correction.
        evaluation: the evaluation of the blend that led here, or None (start, or a score that is no ``Blend``).
        evaluations: member evaluations a sample so far.
        weights: the run's weights, or None without correction.
    """

    step: int
    t: float
    x: Tensor
    log_weights: Tensor | None = None
    evaluation: Evaluation | None = None
    evaluations: float = 0
    weights: Weights | None = None


@dataclass(frozen=True)
class Solution:
    """The end of a run.

    Attributes:
        samples: (B, *event).
        log_weights: log W of each sample, since the last resampling if any, float64 (B,); None without correction.
            Samples weighted by W follow the target; with mode "certify" they may be ignored.
        certificates: one a group of particles, in order of appearance or of the given labels; empty without correction.
        log_normalizers: (log E[W], standard error), one a group; of the tempered weights if tempered.
        evaluations: member evaluations a sample.
        resampled: the steps after which samples were redrawn.
        notes: what a reader must know (tempering, active interval), sentences.
    """

    samples: Tensor
    log_weights: Tensor | None = None
    certificates: list[Certificate] = field(default_factory=list)
    log_normalizers: list[tuple[float, float]] = field(default_factory=list)
    evaluations: float = 0
    resampled: list[int] = field(default_factory=list)
    notes: tuple[str, ...] = ()

    @property
    def certificate(self) -> Certificate | None:
        """The certificate of a run with one group, else None."""
        return self.certificates[0] if len(self.certificates) == 1 else None

    @property
    def ess_fraction(self) -> float | None:
        """Effective share of the samples without resampling (one group), else None."""
        return None if self.certificate is None else self.certificate.ess_fraction

    @property
    def log_normalizer(self) -> float | None:
        """log E[W] of a run with one group, else None."""
        return self.log_normalizers[0][0] if len(self.log_normalizers) == 1 else None


def trajectory(
    sde: BackwardSDE,
    x: Tensor,
    grid: Tensor,
    *,
    noise: Noise,
    step: Step | None = None,
    correct: CorrectionMode | Correction | None = None,
) -> Iterator[State]:
    """Yield the start and the state after each step.

    Args:
        sde: schedule and score.
        x: state at grid[0], (B, *event), float32 or float64; not modified.
        grid: decreasing times (n + 1,); ``time_grid`` makes one.
        noise: a generator, one a sample, or a noise source. Needed even if the step takes none: say which.
        step: the solver step; Euler-Maruyama by default.
        correct: "certify", "resample" or a ``Correction``; needs a ``Blend`` with constant coefficients and a
            step with noise. With one row of coefficients a sample, samples of equal rows are the particles of
            one problem. "resample" alone derives the ancestors' generator from the noise generator's seed.

    Raises:
        TypeError: a state or score of the wrong kind.
        ValueError: a grid that does not decrease, a correction that does not apply.
        FloatingPointError: a state that is no longer finite; names step, time and sample.
    """
    grid, x, step = check_grid(grid, sde.schedule), check_state(x), step or EulerMaruyama()
    source, correction = noise_source(noise), _correction(correct, noise, sde.score, step)
    moves = step.plan(sde.schedule, grid)
    prepare_times(sde.score, grid)
    score, batch = sde.score, len(x)
    weights = None
    if correction is not None:
        assert isinstance(score, Blend)  # _correction has checked
        if score.coefficients.ndim == 2:
            correction = replace(correction, groups=_groups(score.coefficients, correction.groups))
        weights = Weights(correction, batch, x.device, bool((score.coefficients >= 0).all()))
    old: Tensor | None = None
    old_members: Tensor | None = None
    per_step = float(step.evaluations)
    used = 0.0
    yield State(0, float(grid[0]), x, None if weights is None else weights.residual.clone(), None, 0.0, weights)
    for n, move in enumerate(moves):
        evaluation = score.evaluate(x, move.t) if isinstance(score, Blend) else None
        value = score(x, move.t) if evaluation is None else evaluation.score
        z = source(n, move.t, move.s, x) if move.g else None
        moved = step.advance(move, x, value, old, z, score)
        calls = 1.0 if move.s == 0 else per_step
        used += calls * (1 if evaluation is None else len(evaluation.active))
        if weights is not None and evaluation is not None:
            if move.g:
                weights.add(_spread_of_means(move, evaluation, old_members), move.g**2, float(move.t))
            else:
                weights.skip()
            if step.multistep:
                old_members = evaluation.members * move.q
        if step.multistep:
            old = (x * move.p).add_(value, alpha=move.q)
        x = moved
        _check_finite(x, n, move)
        last = n == len(moves) - 1
        # Never on the last step: weights that are returned cost nothing, resampling adds noise.
        ancestors = None if weights is None or last else weights.resample(n + 1)
        if ancestors is not None:
            x = x[ancestors]
            old = None if old is None else old[ancestors]
            old_members = None if old_members is None else old_members[:, ancestors]
        log_weights = None if weights is None else weights.residual.clone()
        yield State(n + 1, float(move.s), x, log_weights, evaluation, used, weights)


def solve(
    sde: BackwardSDE,
    x: Tensor,
    grid: Tensor,
    *,
    noise: Noise,
    step: Step | None = None,
    correct: CorrectionMode | Correction | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Solution:
    """Run ``trajectory`` to its end.

    Args:
        sde, x, grid, noise, step, correct: as there.
        progress: called with (steps done, steps in all) after each step.

    Returns:
        samples with weights, certificate and counts.
    """
    state = None
    for state in trajectory(sde, x, grid, noise=noise, step=step, correct=correct):
        if progress is not None and state.step:
            progress(state.step, len(grid) - 1)
        state = replace(state, evaluation=None)  # members of one step, not of the run
    assert state is not None
    weights = state.weights
    if weights is None:
        return Solution(state.x, evaluations=state.evaluations)
    return Solution(
        samples=state.x,
        log_weights=state.log_weights,
        certificates=weights.certificates(),
        log_normalizers=weights.normalizers(),
        evaluations=state.evaluations,
        resampled=weights.resampled,
        notes=weights.correction.notes,
    )


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


def _spread_of_means(move: Move, evaluation: Evaluation, old_members: Tensor | None) -> Tensor:
    """Return the spread of the members' transition means B S_i + C D_i,old, float64 (B,)."""
    if not move.c or old_members is None:
        return evaluation.spread() * move.b**2
    means = evaluation.members * move.b + old_members * move.c
    return spread(means, evaluation.coefficients, combine(means, evaluation.coefficients))


def _correction(
    correct: CorrectionMode | Correction | None, noise: Noise, score: object, step: Step
) -> Correction | None:
    if correct is None:
        return None
    if isinstance(correct, str):
        generator = None
        if correct == "resample":
            first = noise[0] if isinstance(noise, (list, tuple)) else noise
            if not isinstance(first, torch.Generator):
                raise ValueError(
                    "correct='resample' needs a generator, got a noise source; "
                    "pass Correction('resample', generator=...)"
                )
            generator = torch.Generator().manual_seed((first.initial_seed() + 1) % 2**63)
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
    return correct


def _check_finite(x: Tensor, n: int, move: Move) -> None:
    if math.isfinite(float(x.sum())):  # one pass; an overflowing sum is settled below
        return
    bad = (~x.isfinite()).flatten(1).any(1).nonzero()
    if len(bad):
        raise FloatingPointError(
            f"the state must stay finite, got a non-finite value in sample {int(bad[0])} at step {n + 1} "
            f"(t = {float(move.t):g} -> {float(move.s):g}); check the score there, or take more steps"
        )
