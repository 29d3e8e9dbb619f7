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
from typing import Final

import torch
from torch import Tensor

from sdeblend.methods.case import Case, Drawn, NotApplicable
from sdeblend.methods.draws import Draws
from sdeblend.methods.method import Method
from sdeblend.preference import Preference
from sdeblend.shell.settings import Settings


def _no_second_point(x: Tensor, t: Tensor) -> Tensor:
    raise RuntimeError("a solver of one evaluation a step looks at no second point")


def sample_union(case: Case, shares: Sequence[float], draws: Draws) -> Drawn:
    """Sample the mixture sum_i v_i p_i of a stack's members.

    Args:
        case: what is sampled; at its first time the members agree, so that kappa starts at v.
        shares: v_i of base and members, (K,), not negative; normalised to sum one. One of zero is not evaluated.
        draws: the seeds.

    Returns:
        samples, cost, and "entropy": the mean entropy of the final kappa in nats (0: every path knows its member).

    Raises:
        NotApplicable: shares that are negative or all zero; a solver without noise, or that looks inside a step.
    """
    v = torch.as_tensor(shares, dtype=torch.float64)
    if bool((v < 0).any()) or not bool(v.any()):
        raise NotApplicable("it needs weights that are not negative, one of them above 0")
    if not case.step.stochastic or case.step.evaluations != 1:
        raise NotApplicable("it follows the members by their noise, and needs a solver that has some, one call a step")
    active, stack = v.nonzero().flatten().tolist(), case.stack(len(draws))
    x, noise = case.start(draws), draws.noise()
    log_kappa = v[active].log().unsqueeze(1).expand(-1, len(x)).to(x.device)
    old: Tensor | None = None  # the members' posterior means one step ago
    for n, move in enumerate(case.step.plan(case.schedule, case.grid)):
        members = stack(x, move.t, active)
        kappa = log_kappa.softmax(0).to(x).reshape(len(active), len(x), *[1] * (x.ndim - 1))
        score, before = (kappa * members).sum(0), None if old is None else (kappa * old).sum(0)
        z = noise(n, move.t, move.s, x) if move.g else None
        following = case.step.advance(move, x, score, before, z, _no_second_point)
        if move.g:
            means = x * move.a + members * move.b + (0.0 if old is None else old * move.c)
            distance = (following - means).flatten(2).double().square().sum(2)
            log_kappa = log_kappa - distance / (2 * move.g**2)
            log_kappa = log_kappa - log_kappa.logsumexp(0)
        if case.step.multistep:
            old = x * move.p + members * move.q
        x = following
    final = log_kappa.softmax(0)
    entropy = float(-(final * final.clamp_min(1e-300).log()).sum(0).mean())
    return Drawn(x, (len(case.grid) - 1) * len(active), facts={"entropy": entropy})


def _union(case: Case, preference: Preference, draws: Draws, options: Settings) -> Drawn:
    if preference.strength != 1:
        raise NotApplicable("members are mixed at the strength they were tuned at")
    return sample_union(case, [0.0, *case.union_weights(preference)], draws)


METHODS: Final = (
    Method(
        "union", "OR of members", _union, "Skreta et al. 2412.17762; its law is the mixture of members",
        "K model calls a step", aims=False,
    ),
)  # fmt: skip
