"""A certificate of one member a step, from some of its steps.

A run that draws one member I a step never computes the others, so it has no weights. Given the members that it drew,
its path has the transitions R_I, and against the geometric mean of the members' chains (``sdeblend.certificate``)

    KL(law of the run || geometric mean) <= E[ sum_n sum_i c_i |m_{I_n} - m_i|^2 / (2 V_n) ] + log E[W],

by the convexity of the divergence in the members drawn, and log E[W] <= 0 as the c_i are probabilities. The sum is
estimated without bias from steps at which all members are evaluated: a share of them, other ones for each sample. With
independent draws its expectation is twice what a blend on the same states would add to -E[log W].

Source: convexity of the divergence; Diffusion Blend 2505.18547, algorithm 3, for the run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sdeblend.corrector import Corrector
from sdeblend.noise import Noise
from sdeblend.score import restrict_rows
from sdeblend.sde import BackwardSDE
from sdeblend.select import OneMemberPerStep
from sdeblend.solve import Solution, State, trajectory
from sdeblend.steps import EulerMaruyama, Step


@dataclass(frozen=True)
class SpotCheck:
    """An upper bound in nats on KL(law of one member a step || geometric mean of the members' chains).

    Attributes:
        value: its estimate, without bias.
        standard_error: of it, over the samples; infinite for a single one.
        profile: what each step adds, (n,).
        evaluations: of members, a sample, that it took beside the run's own.
    """

    value: float
    standard_error: float
    profile: Tensor
    evaluations: float

    def __str__(self) -> str:
        return f"at most {self.value:.4g} +- {self.standard_error:.2g} nats (one member a step)"


def certify_one_member(
    sde: BackwardSDE,
    x: Tensor,
    grid: Tensor,
    *,
    noise: Noise,
    share: float,
    generator: torch.Generator,
    step: Step | None = None,
    corrector: Corrector | None = None,
) -> tuple[Solution, SpotCheck]:
    """Solve with one member a step, and bound how far it is from the product of the members.

    Args:
        sde: its score is a ``OneMemberPerStep``.
        x, grid, noise, step, corrector: as ``solve`` has them; the step takes noise and remembers nothing.
        share: of the steps at which all members are evaluated as well, within (0, 1]; it costs share times their number
            a step.
        generator: draws which steps, and nothing else.

    Returns:
        the run, as without; its ``evaluations`` are its own. And the bound.

    Raises:
        TypeError: another score.
        ValueError: a step without noise or with memory, or a share outside its range.
    """
    score, step = sde.score, step or EulerMaruyama()
    if not isinstance(score, OneMemberPerStep):
        raise TypeError(f"spot checks are of a OneMemberPerStep, got {type(score).__name__}; a Blend has correct=")
    if not step.stochastic or step.multistep:
        raise ValueError(
            f"spot checks need a step with noise that remembers no other, got {type(step).__name__}; use "
            "EulerMaruyama or Ancestral(eta=1)"
        )
    if not 0 < share <= 1:
        raise ValueError(f"the share of steps that are checked must lie within (0, 1], got {share}; .1 is cheap")
    moves, offset = step.plan(sde.schedule, grid), torch.rand(len(x), generator=generator, dtype=torch.float64)
    c = score.probabilities
    active = (c if c.ndim == 1 else c.amax(0)).nonzero().flatten().tolist()
    nats, profile, used = torch.zeros(len(x), dtype=torch.float64), [], 0
    state: State
    for state in trajectory(sde, x, grid, noise=noise, step=step, corrector=corrector):
        if state.step == len(moves):
            break
        move, n = moves[state.step], state.step
        rows = (((n + 1) * share + offset).floor() > (n * share + offset).floor()).nonzero().flatten()
        added = torch.zeros_like(nats)
        if move.g and len(rows):
            members = restrict_rows(score.stack, rows)(state.x[rows.to(x.device)], move.t, active).flatten(2).double()
            own = torch.tensor([active.index(int(k)) for k in score.members_at(move.t)[rows]], device=members.device)
            away = (members - members[own, torch.arange(len(rows), device=members.device)]).square().sum(2).cpu()
            each = c[active][:, None] if c.ndim == 1 else c[rows][:, active].T
            added[rows] = (each * away).sum(0) * (move.b**2 / (2 * move.g**2) / share)
            used += len(active) * len(rows)
        nats = nats + added
        profile.append(float(added.mean()))
    error = float(nats.std()) / math.sqrt(len(x)) if len(x) > 1 else math.inf
    found = SpotCheck(float(nats.mean()), error, torch.tensor(profile, dtype=torch.float64), used / len(x))
    return Solution(state.x, evaluations=state.evaluations), found
