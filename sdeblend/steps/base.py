"""What all steps share: four numbers a step, computed for a whole run in one float64 pass.

Every common one-evaluation step from t to s is

    x_s = A x_t + B S_t(x_t) + C D_old + G z,      z ~ N(0, I),

with S the score, D_old the previous step's posterior mean (multistep methods only) and G = 0 without noise.
(Heun evaluates twice; its C multiplies the second score.)
A step to s = 0 is the posterior mean, in every family: A = 1/alpha, B = sigma^2/alpha, no noise.

Two members that share a step share A, C's place and G; their transition means differ in B S_i only, which is
why the correction of a blend costs no evaluation (``sdeblend.correct``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from sdeblend.schedule import NoiseSchedule
from sdeblend.score import ScoreFunction
from sdeblend.sde import BackwardSDE


@dataclass(frozen=True)
class StepCoefficients:
    """A, B, C, G of every step of a grid, float64 (n,) each."""

    a: Tensor
    b: Tensor
    c: Tensor
    g: Tensor


@dataclass(frozen=True)
class Move:
    """One step of a planned run.

    Attributes:
        t, s: its times, 0-dim float64, s < t.
        a, b, c, g: its coefficients (module docstring).
        p, q: posterior mean at t = p x + q S.
    """

    t: Tensor
    s: Tensor
    a: float
    b: float
    c: float
    g: float
    p: float
    q: float


class Step(ABC):
    """A step of a solver; pure, with the noise injected.

    Attributes:
        order: weak order of convergence in the step size (for a step without noise, its order).
        strong_order: strong order on one Brownian path, None without noise.
        evaluations: score evaluations a step.
        stochastic: whether it takes noise.
        multistep: whether it uses the previous step's posterior mean.
    """

    order: int
    strong_order: float | None = None
    evaluations: int = 1
    stochastic: bool = True
    multistep: bool = False

    @abstractmethod
    def coefficients(self, schedule: NoiseSchedule, grid: Tensor) -> StepCoefficients:
        """Return the coefficients of every step of ``grid`` (n + 1,), float64 (n,) each."""

    def plan(self, schedule: NoiseSchedule, grid: Tensor) -> list[Move]:
        """Return the steps of a run on ``grid`` (n + 1,)."""
        t = grid[:-1]
        k = self.coefficients(schedule, grid)
        alpha = schedule.alpha(t)
        p, q = 1 / alpha, schedule.sigma(t).square() / alpha
        # A step to t = 0 is the posterior mean in every family.
        last = grid[1:] == 0
        zero = torch.zeros_like(p)
        a, b, c, g = (
            torch.where(last, end, value) for end, value in ((p, k.a), (q, k.b), (zero, k.c), (zero, k.g))
        )
        columns = [column.tolist() for column in (a, b, c, g, p, q)]
        return [Move(grid[n], grid[n + 1], *row) for n, row in enumerate(zip(*columns, strict=True))]

    def advance(
        self, move: Move, x: Tensor, score: Tensor, old: Tensor | None, noise: Tensor | None, again: ScoreFunction
    ) -> Tensor:
        """Take one planned step.

        Args:
            move: the step.
            x: state at t (B, *event).
            score: S_t(x), (B, *event).
            old: the previous step's posterior mean, for multistep methods.
            noise: z, unit variance, (B, *event); None without noise.
            again: the score function, for steps that evaluate it at a second point.

        Returns:
            state at s (B, *event).
        """
        out = x * move.a
        out.add_(score, alpha=move.b)
        if move.c and old is not None:
            out.add_(old, alpha=move.c)
        if move.g and noise is not None:
            out.add_(noise, alpha=move.g)
        return out

    def __call__(self, sde: BackwardSDE, x: Tensor, t: float, s: float, noise: Tensor | None = None) -> Tensor:
        """Take a single step from t to s < t: (B, *event) -> (B, *event); multistep methods start with it."""
        grid = torch.tensor([float(t), float(s)], dtype=torch.float64)
        move = self.plan(sde.schedule, grid)[0]
        if move.g and noise is None:
            raise ValueError("a step with noise needs z of unit variance, got None; pass a tensor shaped as x")
        return self.advance(move, x, sde.score(x, move.t), None, noise, sde.score)


class Walk:
    """The moves of one run, and what a multistep method remembers between them: one for every chain of the library.

    Args:
        step: the step.
        schedule: the forward process.
        grid: decreasing times (n + 1,).

    Attributes:
        step: the step.
        moves: its n moves.
        old: the last move's posterior mean (B, *event); None at the start, and for methods that remember nothing.
    """

    def __init__(self, step: Step, schedule: NoiseSchedule, grid: Tensor) -> None:
        self.step, self.moves = step, step.plan(schedule, grid)
        self.old: Tensor | None = None

    def advance(self, move: Move, x: Tensor, score: Tensor, noise: Tensor | None, again: ScoreFunction) -> Tensor:
        """Take one move and remember it; arguments and returns as ``Step.advance``."""
        moved = self.step.advance(move, x, score, self.old, noise, again)
        if self.step.multistep:
            self.old = (x * move.p).add_(score, alpha=move.q)
        return moved

    def select(self, index: Tensor) -> None:
        """Go on with the samples ``index`` (long): their memory goes with them."""
        if self.old is not None:
            self.old = self.old[index]


def log_snr_gap(schedule: NoiseSchedule, grid: Tensor) -> Tensor:
    """Return l(s) - l(t) for each step, float64 (n,), infinite for a step to 0."""
    return schedule.log_snr(grid).diff()
