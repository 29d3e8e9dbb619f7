"""Solving a backward SDE: the loop, and nothing else.

``trajectory`` is a generator of states; saving, plotting and stopping are the caller's. ``solve`` runs it to the end
and returns a ``Solution``. The grid runs down from noise; the noise is explicit; the state keeps its
dtype. A non-finite state stops the run and names step, time and sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sdeblend.blend import Blend, Evaluation
from sdeblend.certificate import Certificate
from sdeblend.correct import Correction, CorrectionMode, Weights, start_weights
from sdeblend.corrector import Corrector, Moves
from sdeblend.grid import check_grid
from sdeblend.noise import Noise, RowsOfNoise, noise_source
from sdeblend.score import prepare_times, restrict_rows
from sdeblend.sde import BackwardSDE, check_state
from sdeblend.steps import EulerMaruyama, Move, Step, Walk


@dataclass(frozen=True)
class State:
    """A state on the way, as it was: later steps do not change it.

    Attributes:
        step: how many steps are done.
        t: the time, float.
        x: (B, *event).
        weights: what the run knows of its weights so far, or None without correction.
        evaluation: the evaluation of the blend that led here, or None (start, or a score that is no ``Blend``).
        evaluations: member evaluations so far, a sample that there is.
    """

    step: int
    t: float
    x: Tensor
    weights: Weights | None = None
    evaluation: Evaluation | None = None
    evaluations: float = 0

    @property
    def log_weights(self) -> Tensor | None:
        """log W of each sample since the last resampling, float64 (B,), or None without correction."""
        return None if self.weights is None else self.weights.residual

    @property
    def certificates(self) -> list[Certificate]:
        """What would be certified if the run ended here, one a group of particles; empty without correction."""
        return [] if self.weights is None else self.weights.certificates()


@dataclass(frozen=True)
class Solution:
    """The end of a run.

    Attributes:
        samples: (B, *event).
        log_weights: log W of each sample, since the last resampling if any, float64 (B,); None without correction.
            Samples weighted by W follow the target; with mode "certify" they may be ignored. With ``down_to``, those
            gathered down to that level.
        ancestors: which start each sample descends from, long (B,); None where sample i comes from start i.
        certificates: one a group of particles, in order of appearance or of the given labels; empty without correction.
        log_normalizers: (log E[W], standard error), one a group; of the tempered weights if tempered.
        evaluations: member evaluations a sample that is returned.
        resampled: the steps after which samples were redrawn.
        notes: what a reader must know (tempering, active interval), sentences.
    """

    samples: Tensor
    log_weights: Tensor | None = None
    ancestors: Tensor | None = None
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
    corrector: Corrector | None = None,
    gradients: bool | None = None,
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
        corrector: Langevin moves after each step, and after its resampling.
        gradients: whether autograd records the run; by default only if the start or the coefficients of the blend
            require a gradient. A network's own parameters ask for nothing: without this they would keep every step.

    Raises:
        TypeError: a state or score of the wrong kind.
        ValueError: a grid that does not decrease, a correction that does not apply.
        FloatingPointError: a state that is no longer finite; names step, time and sample.
    """
    grid, x, step = check_grid(grid, sde.schedule), check_state(x), step or EulerMaruyama()
    levels = (-sde.schedule.log_snr(grid[1:]) / 2).exp().tolist()
    source, weights = noise_source(noise), start_weights(correct, sde.score, step, noise, x, levels)
    function, walk, used = sde.score, Walk(step, sde.schedule, grid), 0.0
    if gradients is None:
        wanted = isinstance(function, Blend) and function.requires_grad
        gradients = torch.is_grad_enabled() and (x.requires_grad or wanted)
    moves = None
    if corrector is not None:
        moves = Moves(corrector, sde.score, sde.schedule, grid, noise, source, len(x))
    prepare_times(sde.score, grid)
    yield State(0, float(grid[0]), x, weights and weights.snapshot())
    for n, move in enumerate(walk.moves, 1):
        with torch.set_grad_enabled(gradients):  # left before the caller goes on
            evaluation = function.evaluate(x, move.t) if isinstance(function, Blend) else None
            score = function(x, move.t) if evaluation is None else evaluation.score
            z = source(n - 1, move.t, move.s, x) if move.g else None
            x = walk.advance(move, x, score, z, function)
            _check_finite(x, n, move)
            members = 1 if evaluation is None else len(evaluation.active)
            used += (1 if move.s == 0 else step.evaluations) * members * len(x)
            if weights is not None and evaluation is not None:
                weights.step(move, evaluation)
                # Never after the last step: weights that are returned cost nothing, resampling adds noise.
                ancestors = weights.resample(n) if n < len(walk.moves) else None
                if ancestors is not None:
                    batch, x = len(x), x[ancestors]
                    walk.select(ancestors)
                    if weights.kept is not None:
                        function, source = (
                            restrict_rows(function, weights.kept),
                            RowsOfNoise(source, weights.kept, batch),
                        )
                        if moves is not None:
                            moves.select(weights.kept, source)
            if moves is not None and moves.counts[n - 1]:
                x = moves.after(n - 1, x, move.s)
                _check_finite(x, n, move)
                used += moves.counts[n - 1] * moves.cost * len(x)
        yield State(n, float(move.s), x, weights and weights.snapshot(), evaluation, used / len(x))


def solve(
    sde: BackwardSDE,
    x: Tensor,
    grid: Tensor,
    *,
    noise: Noise,
    step: Step | None = None,
    correct: CorrectionMode | Correction | None = None,
    corrector: Corrector | None = None,
    gradients: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Solution:
    """Run ``trajectory`` to its end.

    Args:
        sde, x, grid, noise, step, correct, corrector, gradients: as there.
        progress: called with (steps done, steps in all) after each step.

    Returns:
        samples with weights, certificate and counts.
    """
    run = trajectory(sde, x, grid, noise=noise, step=step, correct=correct, corrector=corrector, gradients=gradients)
    for state in run:
        if progress is not None and state.step:
            progress(state.step, len(grid) - 1)
    weights = state.weights
    if weights is None:
        return Solution(state.x, evaluations=state.evaluations)
    notes = weights.correction.notes
    if len(state.x) < len(x):
        notes = (*notes, f"of {len(x)} samples {len(state.x)} were kept, at {state.evaluations:.4g} evaluations each")
    return Solution(
        samples=state.x,
        log_weights=weights.residual,
        ancestors=weights.ancestors if weights.resampled else None,
        certificates=weights.certificates(),
        log_normalizers=weights.normalizers(),
        evaluations=state.evaluations,
        resampled=weights.resampled,
        notes=notes,
    )


def _check_finite(x: Tensor, n: int, move: Move) -> None:
    x = x.detach()
    if math.isfinite(float(x.sum())):  # one pass; an overflowing sum is settled below
        return
    bad = (~x.isfinite()).flatten(1).any(1).nonzero()
    if len(bad):
        raise FloatingPointError(
            f"the state must stay finite, got a non-finite value in sample {int(bad[0])} at step {n} "
            f"(t = {float(move.t):g} -> {float(move.s):g}); check the score there, or take more steps"
        )
