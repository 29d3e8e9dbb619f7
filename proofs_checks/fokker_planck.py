"""DB-MPA and DB-KLA end to end on the line, against a Fokker-Planck solution of the same blended SDE.

The law of a backward SDE obeys, in backward time tau,

    d rho/dtau = -d/dx[(g^2 S - f x) rho] + (g^2/2) d^2 rho/dx^2.

It is solved by finite volumes (``toy.statements.fokker_planck``), which know the score and nothing of samplers; samples
come from ``solve``, which knows nothing of densities. Distance: Kolmogorov's, D = sup |F_samples - F|; for the right
F, sqrt(n) D exceeds 2.5 once in 10^5 draws.

With the exact score in place of the blend's, on the same grid, step and noise, the samples must have the exact
target's law: what differs for the blend is the blend's own error.

Source: Diffusion Blend 2505.18547, Algorithms 1 (DB-MPA) and 2 (DB-KLA).
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from proofs_checks.harness.check import Figure, Measurement, Outcome, Settings
from proofs_checks.harness.draw import Drawn, draw_line
from sdeblend import BackwardSDE, Blend, ExponentialMultistep, Preference, ScoreFunction, VPLinear, solve, time_grid
from toy import GaussianMixture
from toy.problems import Problem, line2
from toy.scores.stack import mixture_score
from toy.statements.fokker_planck import Density, backward_density

PLACE = 60
TITLE = "DB-MPA and DB-KLA end to end, against the Fokker-Planck equation"
WORDS = (
    "Blending the scores gives a definite law, though not the wanted one. On the line that law is the solution of a "
    "partial differential equation, and the samples must follow it; with the exact score in place of the blend, on "
    "the same grid and noise, they must follow the exact target. How far the blend's law is from the target is then "
    "known without sampling. With one member (DB-KLA) the blend is exact at strengths 0 and 1 and not between them or "
    "beyond."
)
FORMULA = (
    r"$\partial_\tau \rho = -\partial_x[(g^2 \bar S - f x)\, \rho] + \frac{g^2}{2} \partial_x^2 \rho, \qquad "
    r"\bar S = (1 - \lambda \sum_i w_i) S^{\mathrm{pre}} + \lambda \sum_i w_i S_i$"
)
FALSIFIED_BY = (
    "samples whose distribution function leaves the Fokker-Planck solution by more than 2.5 / sqrt(n); a divergence "
    "of line2 that is not the reference; DB-KLA with an error at strength 0 or 1"
)

SCHEDULE = VPLinear()
STEPS = 100
KOLMOGOROV = 2.5
WEIGHTS_OFF = 0.15
# line2: KL weight -> KL(target || blend), weights (1/2, 1/2); and P(x < 0) of blend and target at .25.
REFERENCE = {2.0: 7.4e-4, 1.0: 8.4e-3, 0.5: 0.063, 0.25: 0.27, 0.1: 0.82}
BELOW_ZERO = (0.301, 0.514)
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


class _Samples(NamedTuple):
    """One drawn problem: sqrt(n) D of each comparison, and what the figure needs."""

    blend: float
    weights_off: float
    exact: float
    exact_off: float
    biased: float
    x: Tensor
    law: Tensor
    target: Tensor
    base: Tensor
    histogram: Tensor
    edges: Tensor


def check(settings: Settings) -> Outcome:
    """Compare samples with the equation, the equation with the references, and follow DB-KLA over the strength."""
    runs = [_samples(settings, i) for i in range(settings.choose(2, 6))]
    table = {alpha: _line2(alpha, 0.5) for alpha in REFERENCE}
    off, below_off = _line2(0.25, 0.45)
    below = max(abs(a - b) for a, b in zip(table[0.25][1], BELOW_ZERO, strict=True))
    below_control = max(abs(a - b) for a, b in zip(below_off, BELOW_ZERO, strict=True))
    strengths = [_strengths(settings, i) for i in range(settings.choose(1, 4))]
    measurements = [
        Measurement(f"samples of the blend against its equation, sqrt(n) D, worst of {len(runs)}",
                    max(run.blend for run in runs), "<=", KOLMOGOROV,
                    f"weights {WEIGHTS_OFF} off", max(run.weights_off for run in runs)),
        Measurement("exact score, same grid, step and noise, against the target, sqrt(n) D",
                    max(run.exact for run in runs), "<=", KOLMOGOROV,
                    f"target of weights {WEIGHTS_OFF} off", max(run.exact_off for run in runs)),
        Measurement("line2: KL(target || blend) less the references, relative, worst of 5",
                    max(abs(table[alpha][0] / value - 1) for alpha, value in REFERENCE.items()), "<=", 0.02,
                    "weights .45, .55", abs(off / 0.27 - 1)),
        Measurement("line2: P(x < 0) of blend and target less .301 and .514", below, "<=", 0.001,
                    "weights .45, .55", below_control),
        Measurement("DB-KLA at strengths 0 and 1: KL(target || blend) (nats)",
                    max(row[strength][0] for row in strengths for strength in (0.0, 1.0)), "<=", 1e-5,
                    "strength 1/2", max(row[0.5][0] for row in strengths)),
    ]  # fmt: skip
    inside = [error for row in strengths for s, (_, error) in row.items() if 0 < s < 1]
    beyond = [error for row in strengths for s, (_, error) in row.items() if s > 1]
    findings = [
        "the blend's samples against the exact target, sqrt(n) D: "
        + ", ".join(f"{run.biased:.1f}" for run in runs)
        + " by problem; what is above the exact score's is the blend's own error",
        "line2, KL(target || blend) at alpha "
        + ", ".join(f"{alpha:g}: {value:.3g}" for alpha, (value, _) in table.items()),
        f"DB-KLA: the mean reward undershoots the target's in {sum(e < 0 for e in inside)} of {len(inside)} cases at "
        f"strengths within (0, 1), by up to {max(0.0, -min(inside)):.3f} of the reward's standard deviation, and "
        f"overshoots in {sum(e > 0 for e in beyond)} of {len(beyond)} above 1, by up to {max(0.0, *beyond):.3f}",
    ]
    divergences = {alpha: value for alpha, (value, _) in table.items()}
    return Outcome(measurements, {"run": runs[0], "table": divergences, "strengths": strengths}, findings)


def figure(outcome: Outcome) -> Figure:
    """Samples on their law, the divergences of line2 over the KL weight, and DB-KLA over the strength."""
    from proofs_checks.harness import figures

    run, table = outcome.data["run"], outcome.data["table"]
    picture, (left, middle, right) = figures.panels(3)
    left.stairs(run.histogram, run.edges, fill=True, color=figures.LIGHT, alpha=0.6, label="samples of the blend")
    left.plot(run.x, run.base, ":", color=figures.BASE, label="base")
    left.plot(run.x, run.law, color=figures.BLEND, label="blend, Fokker-Planck")
    left.plot(run.x, run.target, "--", color=figures.EXACT, label="exact target")
    left.set_xlim(-4, 4)
    left.set_ylim(top=1.5 * float(max(run.histogram.max(), run.target.max())))
    figures.label(left, "DB-MPA, a drawn problem", "x (units of the data)", "density", ncols=2, loc="upper center")
    alphas = list(table)
    middle.loglog(alphas, [REFERENCE[alpha] for alpha in alphas], "-", color=figures.EXACT, label="reference")
    middle.loglog(alphas, list(table.values()), "o", color=figures.BLEND, label="Fokker-Planck")
    figures.ticks(middle, alphas)
    figures.label(middle, "line2, DB-MPA", "KL weight alpha", "KL(target || blend) (nats)")
    for k, row in enumerate(outcome.data["strengths"]):
        errors, words = [error for _, error in row.values()], None if k else "blend, drawn problems"
        right.plot(list(row), errors, "o-", color=figures.BLEND, alpha=0.7, label=words)
    right.axhline(0, color=figures.EXACT, label="exact target")
    for s in (0, 1):
        right.axvline(s, color=figures.GOOD, linestyle=":", label=None if s else "exact at 0 and 1")
    figures.label(right, "DB-KLA over the strength", "strength", "mean reward less the target's (sd)")
    return picture


def _equation(score: ScoreFunction) -> Density:
    return backward_density(BackwardSDE(SCHEDULE, score))


def _at(mixture: GaussianMixture, x: Tensor) -> Tensor:
    return mixture.log_prob(x[:, None]).exp()


def _distance(samples: Tensor, x: Tensor, density: Tensor) -> float:
    """Return sqrt(n) sup |F_samples - F|, Kolmogorov's statistic, for a density at the centres of equal cells."""
    width = float(x[1] - x[0])
    cumulative = torch.cat([density.new_zeros(1), density.cumsum(0)]) * width
    points = samples.flatten().double().sort().values
    place = ((points - x[0]) / width + 0.5).clamp(0, len(x) - 1e-6)
    low = place.long()
    f = torch.lerp(cumulative[low], cumulative[low + 1], place - low)
    rank = torch.arange(len(points) + 1, dtype=torch.float64) / len(points)
    return math.sqrt(len(points)) * float(torch.maximum((rank[1:] - f).abs(), (f - rank[:-1]).abs()).max())


def _samples(settings: Settings, i: int) -> _Samples:
    """Sample a drawn problem with the blend and with the exact score on one noise, and compare both with their laws."""
    generator, batch = settings.generator(f"fokker_planck.samples.{i}"), settings.choose(20_000, 50_000)
    drawn = draw_line(generator, (0.2, 0.5))
    start, seed = SCHEDULE.prior((batch, 1), generator=generator), int(torch.randint(2**31, (), generator=generator))
    grid = time_grid(SCHEDULE, STEPS, "log-snr")

    def run(score: ScoreFunction) -> Tensor:
        noise = torch.Generator().manual_seed(seed)
        return solve(BackwardSDE(SCHEDULE, score), start, grid, noise=noise, step=ExponentialMultistep()).samples

    blended, exact = run(drawn.blend(SCHEDULE)), run(mixture_score(drawn.target, SCHEDULE))
    law = _equation(drawn.blend(SCHEDULE))
    share = float(drawn.coefficients[1]) - WEIGHTS_OFF
    wrong = Drawn(drawn.problem, Preference({"right": share, "left": 1 - share}))
    off = _equation(wrong.blend(SCHEDULE))
    target = _at(drawn.target, law.x)
    counts, edges = torch.histogram(blended.flatten().double(), bins=80, range=(-4.0, 4.0), density=True)
    return _Samples(
        blend=_distance(blended, law.x, law.p), weights_off=_distance(blended, off.x, off.p),
        exact=_distance(exact, law.x, target), exact_off=_distance(exact, law.x, _at(wrong.target, law.x)),
        biased=_distance(blended, law.x, target), x=law.x, law=law.p, target=target,
        base=_at(drawn.problem.base, law.x), histogram=counts, edges=edges,
    )  # fmt: skip


@cache
def _line2(alpha: float, share: float) -> tuple[float, tuple[float, float]]:
    """Return KL(target || blend) of line2, and P(x < 0) of the blend (weights share, 1 - share) and of the target."""
    problem = line2().with_kl_weight(alpha)
    law = _equation(Blend(problem.stack(SCHEDULE), Preference({"right": share, "left": 1 - share})))
    target = problem.target([0.5, 0.5])
    scores = target.means[:, 0] / target.covariances[:, 0, 0].sqrt()
    exact = float(target.weights @ torch.special.ndtr(-scores))
    return law.kl_from(target), (law.mass(high=0.0), exact)


def _strengths(settings: Settings, i: int) -> dict[float, tuple[float, float]]:
    """Return, by strength, DB-KLA's KL(target || blend) and its mean reward less the target's, for one member."""
    source = draw_line(settings.generator(f"fokker_planck.strength.{i}"), (0.2, 0.4)).problem
    reward = source.rewards["right"]
    problem = Problem("one member", source.base, {"right": reward}, source.kl_weight)
    out = {}
    for strength in STRENGTHS:
        drawn = Drawn(problem, Preference({"right": 1.0}, strength))
        law = _equation(drawn.blend(SCHEDULE))
        out[strength] = (law.kl_from(drawn.target), law.expect(reward) - drawn.target.mean_reward(reward))
    return out
