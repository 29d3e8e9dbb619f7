"""The OR of preferences: the mixture of the members, with the density ratios followed along the path.

p_base sum_i w_i exp(r_i / alpha) / Z is the mixture sum_i v_i p_i with v_i ~ w_i Z_i, and its score at time t is

    S(x, t) = sum_i kappa_i S_i,       kappa_i = v_i p_{i,t}(x) / sum_j v_j p_{j,t}(x),

what no set of coefficients gives. The ratios follow from the steps themselves, at no further evaluation: with
R_i(x' | x) member i's own Gaussian transition from t to s,

    log kappa_i  +=  log R_i(x' | x)  + const.

For members that reverse one forward process this is Bayes, p_{i,s}(x') q(x | x') = p_{i,t}(x) R_i(x' | x). For any
solver with noise kappa_i is the probability, given the path so far, that member i makes it; moved by the mean of the
members' transitions under kappa, paths have the mixture of the members' laws of paths, up to the step size, and so
has their end. A transition may remember the last step (multistep methods): each member's then remembers its own.

Source: Skreta et al. 2412.17762 (superposition, OR); Liptser and Shiryaev 1977, chapter 7 (innovations).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sdeblend.baselines.drawn import Drawn
from sdeblend.grid import check_grid
from sdeblend.noise import NoiseSource
from sdeblend.schedule import NoiseSchedule
from sdeblend.score import ScoreStack
from sdeblend.steps import Ancestral, Step


def _no_second_point(x: Tensor, t: Tensor) -> Tensor:
    raise RuntimeError("a solver of one evaluation a step looks at no second point")


def sample_union(
    stack: ScoreStack,
    schedule: NoiseSchedule,
    x: Tensor,
    grid: Tensor,
    weights: Sequence[float] | Tensor,
    *,
    noise: NoiseSource,
    step: Step | None = None,
) -> Drawn:
    """Sample the mixture sum_i v_i p_i of a stack's members.

    Args:
        stack: K members; one of weight zero is not evaluated.
        schedule: their forward process.
        x: starts at grid[0], (B, *event); there the members agree, so that kappa starts at v.
        grid: decreasing times.
        weights: v_i, (K,), not negative; normalised to sum one.
        noise: source of the steps' noise.
        step: solver step with noise and one evaluation, ancestral by default.

    Returns:
        samples, cost, and "entropy": the mean entropy of the final kappa in nats (0: every path knows its member).

    Raises:
        ValueError: weights that are negative, all zero or not one a member; a step without noise.
    """
    v = torch.as_tensor(weights, dtype=torch.float64)
    if v.shape != (len(stack),) or bool((v < 0).any()) or float(v.sum()) <= 0:
        raise ValueError(f"a union needs {len(stack)} weights >= 0, not all zero, got {v.tolist()}; one a member")
    step = step or Ancestral()
    if not step.stochastic or step.evaluations != 1:
        raise ValueError(
            f"a union needs a step with noise and one evaluation, got {type(step).__name__}; use Ancestral()"
        )
    active = v.nonzero().flatten().tolist()
    grid = check_grid(grid, schedule)
    log_kappa = v[active].log().unsqueeze(1).expand(-1, len(x)).to(x.device)
    old: Tensor | None = None  # the members' posterior means one step ago
    for n, move in enumerate(step.plan(schedule, grid)):
        members = stack(x, move.t, active)
        kappa = log_kappa.softmax(0).to(x).reshape(len(active), len(x), *[1] * (x.ndim - 1))
        score, before = (kappa * members).sum(0), None if old is None else (kappa * old).sum(0)
        z = noise(n, move.t, move.s, x) if move.g else None
        following = step.advance(move, x, score, before, z, _no_second_point)
        if move.g:
            means = x * move.a + members * move.b + (0.0 if old is None else old * move.c)
            distance = (following - means).flatten(2).double().square().sum(2)
            log_kappa = log_kappa - distance / (2 * move.g**2)
            log_kappa = log_kappa - log_kappa.logsumexp(0)
        if step.multistep:
            old = x * move.p + members * move.q
        x = following
    final = log_kappa.softmax(0)
    entropy = float(-(final * final.clamp_min(1e-300).log()).sum(0).mean())
    return Drawn(x, (len(grid) - 1) * len(active), facts={"entropy": entropy})
