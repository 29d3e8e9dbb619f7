"""Lemma 2: what the blended score misses is the gap of the mean reward less the mean of the members' gaps."""

from __future__ import annotations

import torch
from torch import Tensor

from proofs_checks.harness.check import Differences, Figure, Measurement, Outcome, Settings
from proofs_checks.harness.draw import RawProblem, States, draw_points, draw_problem, draw_states, draw_time, uniform
from proofs_checks.harness.quadrature import Given, Lattice
from sdeblend import Blend, Preference, VPLinear
from toy import GaussianMixture, QuadraticReward, blend_gap, combine, jensen_gap
from toy.scores.stack import MixtureStack

PLACE = 50
TITLE = "Lemma 2: the error of a blend, and what does not bound it"
WORDS = (
    "The blend replaces the score of the wanted target by a weighted sum of the scores it has. What it misses is "
    "exactly the Jensen gap of the weighted reward less the weighted gaps of the members; with a strength other "
    "than one, the base takes the coefficient that is left. The trap: a small gap of the weighted reward does not "
    "make the blend good. Rewards that pull apart leave a mean reward that hardly tilts, while the members' own "
    "gaps stay large and do not cancel."
)
FORMULA = (
    r"$S^{(\lambda r(w))}_t = (1 - \lambda\sum_i w_i)\,S^{\mathrm{pre}}_t + \lambda\sum_i w_i\,S^{(r_i)}_t "
    r"+ \Delta^{(\lambda r(w))}_t - \lambda\sum_i w_i\,\Delta^{(r_i)}_t$"
)
FALSIFIED_BY = (
    "a relative difference above 1e-10 between the two sides in any drawn problem, preference, strength, schedule "
    "or time; for the trap, conflicting rewards whose blend errs less than the gap of their mean reward"
)
CONTROLS = {
    "preference (strength 1)": "weights swapped",
    "preference and strength": "base without its coefficient",
    "same in 3 to 6 dimensions": "members' gaps left out",
}
TIMES = torch.linspace(0.05, 0.9, 11, dtype=torch.float64)
TRAP_BOUND = 1.0


def check(settings: Settings) -> Outcome:
    """Compare the error of ``Blend`` with gaps by integration, and with closed forms where no lattice reaches."""
    generator = settings.generator("lemma_2")
    errors = Differences(CONTROLS)
    for dim, count in ((1, settings.choose(4, 12)), (2, settings.choose(2, 5))):
        for _ in range(count):
            problem = draw_problem(generator, dim=dim, rewards=int(torch.randint(2, 4, (), generator=generator)))
            lattice = Lattice(problem)
            for states in draw_states(generator, problem, 6):
                _identity(problem, lattice, states, generator, errors)
    for dim in (3, 4, 5, 6):
        for _ in range(settings.choose(1, 4)):
            _dimensions(draw_problem(generator, dim=dim, rewards=3), generator, errors)

    ratios: dict[str, list[float]] = {"conflict": [], "agreement": []}
    curves = []
    for i in range(settings.choose(6, 16)):
        base = draw_problem(generator, dim=1 + i % 2).base
        for sign, name in ((-1, "conflict"), (1, "agreement")):
            blend, mean = _trap(base, sign, generator)
            ratios[name].append(float((blend.square().sum() / mean.square().sum()).sqrt()))
            if sign < 0:
                curves.append((blend.numpy(), mean.numpy()))
    middle = sorted(ratios["conflict"])[len(ratios["conflict"]) // 2]
    trap = Measurement(
        "conflicting rewards: blend error over gap of the mean reward", min(ratios["conflict"]), ">=", TRAP_BOUND,
        "rewards that agree", max(ratios["agreement"]),
    )  # fmt: skip
    findings = [
        "the gap of the weighted reward alone does not bound the blend: with rewards that pull apart the blend errs "
        f"{min(ratios['conflict']):.3g} to {max(ratios['conflict']):.3g} times as much (middle {middle:.3g}), over "
        f"{len(ratios['conflict'])} drawn problems at KL weight 0.5, along the whole path",
    ]
    return Outcome([*errors.measurements(), trap], {**errors.data, "t": TIMES.numpy(), "conflict": curves}, findings)


def _identity(
    problem: RawProblem, lattice: Lattice, states: States, generator: torch.Generator, errors: Differences
) -> None:
    """Both sides for a drawn preference, at strength 1 and at a drawn one."""
    base, alpha, rewards = problem.base, problem.kl_weight, [reward.closed for reward in problem.rewards]
    share = uniform(generator, 0.2, 1.0, len(rewards))
    weights, strength = (share / share.sum()).tolist(), float(uniform(generator, 0.3, 1.6))
    schedule, t, x = states
    stack = MixtureStack([base, *(base.tilt(r, kl_weight=alpha) for r in rewards)], schedule)
    given = Given(lattice, states)
    whole = torch.tensor(weights, dtype=torch.float64) @ lattice.rewards / alpha
    mean_gap = sum(w * given.gap(values / alpha) for w, values in zip(weights, lattice.rewards, strict=True))
    for factor, name in ((1.0, "preference (strength 1)"), (strength, "preference and strength")):
        score = Blend(stack, Preference(weights, strength=factor))(x, t)
        if factor == 1:
            broken = Blend(stack, Preference(weights[1:] + weights[:1]))(x, t)
        else:
            broken = score - (1 - factor) * stack(x, t, [0])[0]
        exact = base.tilt(combine(rewards, weights) * factor, kl_weight=alpha).noised(schedule, t).score(x)
        errors.compare(name, exact - score, exact - broken, given.gap(factor * whole) - factor * mean_gap)


def _dimensions(problem: RawProblem, generator: torch.Generator, errors: Differences) -> None:
    """The identity between closed forms: scores of mixtures on one side, gaps on the other."""
    schedule, alpha = VPLinear(), problem.kl_weight
    weights = uniform(generator, 0.1, 0.5, 3).tolist()
    rewards = [reward.closed for reward in problem.rewards]
    t = draw_time(generator, schedule)
    x = draw_points(generator, problem, schedule, t, 16)
    stack = MixtureStack([problem.base, *(problem.base.tilt(r, kl_weight=alpha) for r in rewards)], schedule)
    target = problem.base.tilt(combine(rewards, weights), kl_weight=alpha)
    blend = Blend(stack, Preference([w / sum(weights) for w in weights], strength=sum(weights)))
    error = target.noised(schedule, t).score(x) - blend(x, t)
    reference = blend_gap(problem.base, rewards, weights, alpha, schedule, x, t)
    alone = jensen_gap(problem.base, combine(rewards, weights), alpha, schedule, x, t)
    errors.compare("same in 3 to 6 dimensions", reference, alone, error)


def _trap(base: GaussianMixture, sign: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return root mean squares over time, weighted with g, of the blend's error and of the mean reward's gap, (T,).

    The rewards point the same way (sign 1) or opposite ways (sign -1), and the second is bent a little.
    """
    schedule, dim, alpha = VPLinear(), base.dim, 0.5
    first = QuadraticReward(torch.randn(dim, generator=generator, dtype=torch.float64)).normalized(base)
    bend = float(uniform(generator, 0.0, 0.3)) * torch.eye(dim, dtype=torch.float64)
    rewards = [first, QuadraticReward(sign * first.linear, bend)]
    share = float(uniform(generator, 0.4, 0.6))
    weights = [share, 1 - share]
    rows = []
    for t in TIMES:
        x = base.noised(schedule, t).sample(128, generator=generator)
        vectors = (
            blend_gap(base, rewards, weights, alpha, schedule, x, t),
            jensen_gap(base, combine(rewards, weights), alpha, schedule, x, t),
        )
        size = schedule.diffusion_sq(t).sqrt()
        rows.append(torch.stack([size * v.square().sum(-1).mean().sqrt() for v in vectors]))
    blend, mean = torch.stack(rows, 1)
    return blend, mean


def figure(outcome: Outcome) -> Figure:
    """Draw blend error and mean reward's gap over time, and all differences against the bound."""
    from proofs_checks.harness import figures

    data = outcome.data
    picture, (left, right) = figures.panels(2)
    for i, (blend, mean) in enumerate(data["conflict"][:8]):
        first = i == 0
        left.semilogy(data["t"], blend, color=figures.BLEND, lw=1.1, label="exact score less blend" if first else None)
        left.semilogy(data["t"], mean, color=figures.BROKEN, lw=1.1, ls="--",
                      label="gap of the mean reward alone" if first else None)  # fmt: skip
    figures.label(left, "Two rewards that pull apart, drawn mixtures", "time t (0 data, 1 noise)",
                  "g times root mean square", ncols=2, **figures.BELOW)  # fmt: skip
    figures.differences(right, data["differences"], data["bound"])
    return picture
