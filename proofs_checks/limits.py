"""Limits in which blending is exact: Gaussians with linear rewards, and strength 0 and 1."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from proofs_checks.harness.check import Differences, Figure, Measurement, Outcome, Settings, worst
from proofs_checks.harness.draw import draw_points, draw_problem, draw_states, uniform
from sdeblend import BackwardSDE, Blend, ExponentialMultistep, Preference, VPLinear, solve, time_grid
from toy import GaussianMixture, QuadraticReward, blend_gap, combine, control, jensen_gap
from toy.scores.stack import MixtureStack

PLACE = 110
TITLE = "Limits: where blending is exact"
WORDS = (
    "One Gaussian with linear rewards leaves no Jensen gap: a tilt only moves it, so any preference and any "
    "strength blend exactly, negative base coefficients included. On any law, strength 0 is the base and strength "
    "1 is the member. Both are checked on the scores, and end to end: samples of the solver against the mean, "
    "covariance and mode weights in closed form."
)
FORMULA = (
    r"$p_{\mathrm{pre}} = \mathcal{N}(\mu, C),\ r_i(x) = b_i\cdot x:\qquad \Delta_t \equiv 0,\qquad "
    r"p^{(\lambda r(w),\alpha)} = \mathcal{N}(\mu + \dfrac{\lambda}{\alpha}\,C\sum_i w_i b_i,\ C)$" "\n"
    r"$S^{(0\cdot r)}_t = S^{\mathrm{pre}}_t,\qquad S^{(1\cdot r)}_t = S^{(r)}_t$"
)
FALSIFIED_BY = (
    "a relative difference above 1e-10 between the blended score and the exact one in these limits, or a moment "
    "of the samples more than 5 standard errors from its closed form"
)
CONTROLS = {
    "Gaussian, linear rewards: blended score": "quadratic rewards",
    "Gaussian, linear reward: gap": "quadratic reward",
    "strength 0 is the base": "strength 0.1",
    "strength 1 is the member": "strength 0.9",
}
Z_BOUND = 5.0
STEPS = 100
STRENGTHS = torch.linspace(-0.25, 2.0, 46, dtype=torch.float64)


def check(settings: Settings) -> Outcome:
    """Compare scores in the limits, and samples with the laws that they must have."""
    generator = settings.generator("limits")
    errors = Differences(CONTROLS)
    for dim in range(1, 7):
        for _ in range(settings.choose(2, 8)):
            _gaussian(dim, generator, errors)
            _ends(dim, generator, errors)
    runs, ends = [], []
    for i in range(settings.choose(2, 4)):
        runs.append(_run_gaussian(1 + i % 2, generator, settings.choose(6000, 20000)))
        ends.append(_run_ends(1 + i % 2, generator, settings.choose(6000, 20000)))
    statistical = [
        Measurement("samples of a Gaussian's blend: moments, largest |z|",
                    max(run["z"] for run in runs), "<=", Z_BOUND,
                    "target without its strength", max(run["z_wrong"] for run in runs)),
        Measurement("samples at strength 0 and 1: means, mode weights, largest |z|",
                    max(z for z, _ in ends), "<=", Z_BOUND,
                    "base and member swapped", max(wrong for _, wrong in ends)),
    ]  # fmt: skip
    data = {**errors.data, **_over_strength(settings), "run": runs[0]}
    return Outcome([*errors.measurements(), *statistical], data, _findings(data))


def _findings(data: dict[str, Any]) -> list[str]:
    inside = (data["strength"] > 0) & (data["strength"] < 1)
    largest = [float(error[inside].max()) for error in data["error"]]
    return [
        "between the limits the blend is not exact: the largest error for strengths within (0, 1) is "
        f"{min(largest):.2g} to {max(largest):.2g} by drawn mixture (root mean square, over the score's own)"
    ]


def _gaussian(dim: int, generator: torch.Generator, errors: Differences) -> None:
    """Blended score and gap of one Gaussian: linear rewards, and quadratic ones as the control."""
    problem = draw_problem(generator, dim=dim, components=1, rewards=2)
    base, alpha = problem.base, problem.kl_weight
    bent = [reward.closed for reward in problem.rewards]
    straight = [QuadraticReward(reward.linear, constant=reward.constant) for reward in problem.rewards]
    share = uniform(generator, 0.1, 0.9, 2)
    weights, strength = (share / share.sum()).tolist(), float(share.sum() * uniform(generator, 0.2, 1.5))
    for schedule, t, x in draw_states(generator, problem, 8):
        scores, gaps = [], []
        for rewards in (straight, bent):
            stack = MixtureStack([base, *(base.tilt(r, kl_weight=alpha) for r in rewards)], schedule)
            target = base.tilt(combine(rewards, weights) * strength, kl_weight=alpha)
            exact = target.noised(schedule, t).score(x)
            scores.append(worst(Blend(stack, Preference(weights, strength=strength))(x, t), exact))
            u = control(base, rewards[0], alpha, schedule, x, t)
            gaps.append(worst(u + jensen_gap(base, rewards[0], alpha, schedule, x, t), u))
        errors.add("Gaussian, linear rewards: blended score", *scores)
        errors.add("Gaussian, linear reward: gap", *gaps)


def _ends(dim: int, generator: torch.Generator, errors: Differences) -> None:
    """Strength 0 and 1 on a mixture, and strengths a little off as the control."""
    problem = draw_problem(generator, dim=dim)
    member = problem.base.tilt(problem.rewards[0].closed, kl_weight=problem.kl_weight)
    for schedule, t, x in draw_states(generator, problem, 8):
        stack = MixtureStack([problem.base, member], schedule)
        for strength, off, law, name in (
            (0.0, 0.1, problem.base, "strength 0 is the base"),
            (1.0, 0.9, member, "strength 1 is the member"),
        ):
            exact = law.noised(schedule, t).score(x)
            right, wrong = (Blend(stack, Preference([1.0], strength=value))(x, t) for value in (strength, off))
            errors.compare(name, right, wrong, exact)


def _sample(laws: list[GaussianMixture], preference: Preference, count: int, generator: torch.Generator) -> Tensor:
    """Run the solver on the blend of ``laws``, the base first, in float64."""
    schedule = VPLinear()
    blend = Blend(MixtureStack(laws, schedule), preference)
    start = schedule.prior((count, laws[0].dim), generator=generator, dtype=torch.float64)
    grid = time_grid(schedule, STEPS, "log-snr")
    return solve(BackwardSDE(schedule, blend), start, grid, step=ExponentialMultistep(), noise=generator).samples


def _largest_z(values: Tensor, expected: Tensor) -> float:
    """Return the largest |mean - expected| over standard error of the columns of ``values`` (n, k)."""
    error = values.std(0) / math.sqrt(len(values))
    return float(((values.mean(0) - expected).abs() / error).max())


def _run_gaussian(dim: int, generator: torch.Generator, count: int) -> dict[str, Any]:
    """Sample a Gaussian's blend; |z| of mean and covariance against the target, and against one without strength."""
    base = draw_problem(generator, dim=dim, components=1).base
    directions = torch.randn(2, dim, generator=generator, dtype=torch.float64)
    # Pulls of the same sign on the line: opposite ones might cancel, and with them the control's power.
    directions = directions.abs() if dim == 1 else directions
    sizes = (1.0, float(uniform(generator, 0.3, 0.6)))
    rewards = [size * QuadraticReward(b).normalized(base) for size, b in zip(sizes, directions, strict=True)]
    weights, strength, alpha = uniform(generator, 0.3, 0.7, 2).tolist(), float(uniform(generator, 1.3, 1.8)), 0.5
    members = [base.tilt(reward, kl_weight=alpha) for reward in rewards]
    samples = _sample([base, *members], Preference(weights, strength=strength), count, generator)

    def z(target: GaussianMixture) -> float:
        white = (samples - target.mean) @ torch.linalg.inv(torch.linalg.cholesky(target.covariance)).T
        pairs = torch.combinations(torch.arange(dim), with_replacement=True)
        products = white[:, pairs[:, 0]] * white[:, pairs[:, 1]]
        expected = torch.cat([torch.zeros(dim, dtype=torch.float64), (pairs[:, 0] == pairs[:, 1]).double()])
        return _largest_z(torch.cat([white, products], 1), expected)

    target, wrong = (base.tilt(combine(rewards, weights) * factor, kl_weight=alpha) for factor in (strength, 1.0))
    laws = {"base": base, "member 1": members[0], "member 2": members[1], "exact target": target}
    x = torch.linspace(-4, 4, 801, dtype=torch.float64)[:, None] * 1.5
    curves = {name: law.log_prob(x).exp().numpy() for name, law in laws.items()} if dim == 1 else {}
    return {"z": z(target), "z_wrong": z(wrong), "samples": samples[:, 0].numpy(), "x": x[:, 0].numpy(), "laws": curves,
            "strength": strength}  # fmt: skip


def _run_ends(dim: int, generator: torch.Generator, count: int) -> tuple[float, float]:
    """Sample at strength 0 and 1; largest |z| of means and mode weights, against the right law and the other one."""
    problem = draw_problem(generator, dim=dim, components=3)
    reward = QuadraticReward(problem.rewards[0].linear).normalized(problem.base)
    laws = [problem.base, problem.base.tilt(reward, kl_weight=0.5)]
    right: list[float] = []
    swapped: list[float] = []
    for strength in (0, 1):
        samples = _sample(laws, Preference([1.0], strength=strength), count, generator)
        for expected, found in ((laws[strength], right), (laws[1 - strength], swapped)):
            # The mean responsibility of a component is its weight, for samples of that mixture.
            values = torch.cat([samples, expected.responsibilities(samples)], 1)
            found.append(_largest_z(values, torch.cat([expected.mean, expected.weights])))
    return max(right), max(swapped)


def _over_strength(settings: Settings) -> dict[str, Any]:
    """Error of the blend over strength, relative to the target's score: mixtures, and one Gaussian."""
    generator, schedule = settings.generator("limits figure"), VPLinear()
    t = torch.tensor(0.25, dtype=torch.float64)
    curves = []
    for components in (1, 2, 3, 3, 4):
        problem = draw_problem(generator, dim=1, components=components)
        reward = QuadraticReward(problem.rewards[0].linear).normalized(problem.base)
        x = draw_points(generator, problem, schedule, t, 256)
        row = []
        for strength in STRENGTHS.tolist():
            target = problem.base.tilt(reward * strength, kl_weight=0.5)
            error = blend_gap(problem.base, [reward], [strength], 0.5, schedule, x, t)
            size = target.noised(schedule, t).score(x).square().mean().sqrt()
            row.append(float(error.square().mean().sqrt() / size))
        curves.append(torch.tensor(row).numpy())
    return {"strength": STRENGTHS.numpy(), "gaussian": curves[0], "error": curves[1:]}


def figure(outcome: Outcome) -> Figure:
    """Draw the error of the blend over strength, and one Gaussian's blend end to end."""
    from proofs_checks.harness import figures

    data, run = outcome.data, outcome.data["run"]
    picture, (left, right) = figures.panels(2)
    for i, error in enumerate(data["error"]):
        name = None if i else "drawn mixtures, linear reward"
        left.plot(data["strength"], error, color=figures.BLEND, lw=1.1, label=name)
    left.plot(data["strength"], data["gaussian"], color=figures.EXACT, lw=2, label="one Gaussian: exact")
    for place in (0.0, 1.0):
        left.axvline(place, color=figures.BASE, ls=":", lw=1)
    left.set_ylim(-0.02, None)
    title = "Error of the blended score, t = 0.25"
    figures.label(left, title, "strength", "error / size of the score", ncols=2, **figures.BELOW)
    right.hist(run["samples"], bins=60, density=True, color=figures.LIGHT, alpha=0.7, label="samples of the blend")
    styles = {"base": (figures.BASE, ":"), "member 1": (figures.OTHER, "--"), "member 2": (figures.PINK, "-."),
              "exact target": (figures.EXACT, "-")}  # fmt: skip
    for name, curve in run["laws"].items():
        colour, line = styles[name]
        right.plot(run["x"], curve, color=colour, ls=line, label=name)
    shown = run["x"][sum(run["laws"].values()) > 1e-3]
    right.set_xlim(shown.min(), shown.max())
    title = f"One Gaussian end to end, strength {run['strength']:.2f}"
    figures.label(right, title, "x (units of the data)", "density", ncols=3, **figures.BELOW)
    return picture
