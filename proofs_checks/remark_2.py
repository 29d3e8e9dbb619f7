"""Remark 2: the Jensen gap over the KL weight, second order for weak tilts and first order for strong ones.

Expanding log E[exp(r / alpha) | x] in cumulants, the first is what the blend keeps and the second is the leading gap:

    Delta = (a / (2 s^2)) kappa_3(r, r, x_0 | x) alpha^-2 + O(alpha^-3).

As alpha falls the tilt settles on one component; then u grows like 1/alpha at most, and ubar is 1/alpha always.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from proofs_checks.harness.check import Figure, Measurement, Outcome, Settings, slope
from proofs_checks.harness.draw import Numbers, RawProblem, States, draw_points, draw_problem, uniform
from proofs_checks.harness.quadrature import Given, Lattice
from sdeblend import NoiseSchedule, VPLinear
from toy import GaussianMixture, QuadraticReward, control, jensen_gap

PLACE = 40
TITLE = "Remark 2: how the Jensen gap grows as the KL weight falls"
WORDS = (
    "The gap between the exact control and the one that blending keeps is of second order in 1/alpha while the "
    "tilt is weak: half the KL weight, four times the gap. Once the tilt is strong it has settled on its "
    "favourite modes and the gap grows only in proportion to 1/alpha. The control itself is of first order when "
    "weak, so weakly tuned members blend almost exactly. Each curve is one drawn mixture with its rewards scaled "
    "to unit variance."
)
FORMULA = (
    r"$\Delta_t = u_t - \bar u_t = \dfrac{a_t}{2 s_t^2}\,\kappa_3(r, r, x_0 \mid x_t)\,\alpha^{-2} + O(\alpha^{-3})"
    r"\quad(\alpha\to\infty)$" "\n"
    r"$|\Delta_t| \propto \alpha^{-1}\quad(\alpha\to 0)$"
)
FALSIFIED_BY = (
    "a slope of log |gap| over log alpha further than 0.05 from -2 for weak tilts (alpha 30 to 1000) or than 0.1 "
    "from -1 for strong ones (alpha 1e-5 to 1e-4), or a remainder after the leading term that does not fall like "
    "alpha^-3"
)
WEAK, STRONG, SWEEP = (30.0, 1000.0), (1e-5, 1e-4), (1e-5, 1e3)
WEAK_BOUND, STRONG_BOUND, REMAINDER_BOUND = 0.05, 0.1, 0.1
TIMES = (0.1, 0.25, 0.5)


def check(settings: Settings) -> Outcome:
    """Measure the slopes of the gap over alpha, and of what is left after its leading term."""
    generator = settings.generator("remark_2")
    schedule = VPLinear()
    rows: dict[str, list[float]] = {name: [] for name in ("weak", "u", "strong", "lead", "rest", "no half")}
    weak, strong, sweep = (_alphas(*ends, n) for ends, n in ((WEAK, 8), (STRONG, 8), (SWEEP, 25)))
    curves, controls = [], []
    for i in range(settings.choose(6, 18)):
        problem = _draw(generator, 1 + i % 2, bent=i % 4 < 2)
        t = torch.tensor(TIMES[i % len(TIMES)], dtype=torch.float64)
        x = draw_points(generator, problem, schedule, t, 48)
        lattice = Lattice(problem)
        given = Given(lattice, States(schedule, t, x))
        leading = given.gain / 2 * given.third(lattice.rewards[0])
        state = problem.base, problem.rewards[0].closed, schedule, x, t
        gap, at_weak = _over(jensen_gap, weak, *state), leading * weak[:, None, None] ** -2
        rows["weak"].append(slope(weak, _rms(gap)))
        rows["u"].append(slope(weak, _rms(_over(control, weak, *state))))
        rows["strong"].append(slope(strong, _rms(_over(jensen_gap, strong, *state))))
        rows["lead"].append(slope(strong, _rms(leading * strong[:, None, None] ** -2)))
        rows["rest"].append(slope(weak, _rms(gap - at_weak)))
        rows["no half"].append(slope(weak, _rms(gap - 2 * at_weak)))
        curves.append(_rms(_over(jensen_gap, sweep, *state)).numpy())
        controls.append(_rms(_over(control, sweep, *state)).numpy())

    def off(name: str, order: float) -> float:
        return max(abs(found - order) for found in rows[name])

    measurements = [
        Measurement("weak tilts: slope of the gap, distance from -2", off("weak", -2), "<=", WEAK_BOUND,
                    "the control u in place of the gap", off("u", -2)),
        Measurement("strong tilts: slope of the gap, distance from -1", off("strong", -1), "<=", STRONG_BOUND,
                    "the weak-tilt expansion used there", off("lead", -1)),
        Measurement("remainder after the leading term: slope, distance from -3", off("rest", -3), "<=", REMAINDER_BOUND,
                    "leading term without its half", off("no half", -3)),
    ]  # fmt: skip
    usual = (sweep >= 0.1) & (sweep <= 1)
    between = [slope(sweep[usual], torch.as_tensor(curve)[usual]) for curve in curves]
    findings = [
        f"measured slopes: weak {min(rows['weak']):.3f} to {max(rows['weak']):.3f}, "
        f"strong {min(rows['strong']):.3f} to {max(rows['strong']):.3f}, over {len(curves)} drawn problems",
        f"KL weights in use (0.1 to 1) lie between the regimes, with slopes {min(between):.2f} to {max(between):.2f}",
    ]
    return Outcome(measurements, {"alpha": sweep.numpy(), "gap": curves, "control": controls}, findings)


def _draw(generator: torch.Generator, dim: int, bent: bool) -> RawProblem:
    """Draw a problem whose tilt exists at every KL weight (no negative curvature), reward scaled to unit variance."""
    problem = draw_problem(generator, dim=dim)
    linear, curvature = problem.rewards[0].linear, float(uniform(generator, 0.2, 0.5)) * bent
    raw = Numbers(linear, curvature * torch.eye(dim, dtype=torch.float64), 0.0)
    scale = problem.base.reward_variance(raw.closed) ** -0.5
    reward = Numbers(scale * raw.linear, scale * raw.quadratic, 0.0)
    return RawProblem(problem.weights, problem.means, problem.covariances, (reward,), 1.0)


def _alphas(low: float, high: float, count: int) -> Tensor:
    return torch.logspace(math.log10(low), math.log10(high), count, dtype=torch.float64)


def _over(
    function: Callable[..., Tensor],
    alphas: Tensor,
    base: GaussianMixture,
    reward: QuadraticReward,
    schedule: NoiseSchedule,
    x: Tensor,
    t: Tensor,
) -> Tensor:
    """Return the control or the gap at each KL weight, (A, B, d)."""
    return torch.stack([function(base, reward, float(alpha), schedule, x, t) for alpha in alphas])


def _rms(values: Tensor) -> Tensor:
    """Return the root mean square over states of vectors (A, B, d), (A,)."""
    return values.square().sum(-1).mean(-1).sqrt()


def figure(outcome: Outcome) -> Figure:
    """Draw gap and control over the KL weight, and the local slope of the gap."""
    import numpy as np

    from proofs_checks.harness import figures

    data = outcome.data
    alpha = data["alpha"]
    picture, (left, right) = figures.panels(2)
    for i, (gap, u) in enumerate(zip(data["gap"], data["control"], strict=True)):
        left.loglog(alpha, gap, color=figures.EXACT, lw=0.9, label="gap, exact" if i == 0 else None)
        left.loglog(alpha, u, color=figures.BASE, lw=0.9, ls="--", label="control u, exact" if i == 0 else None)
        local = np.diff(np.log(gap)) / np.diff(np.log(alpha))
        middle = np.sqrt(alpha[1:] * alpha[:-1])
        right.semilogx(middle, local, color=figures.EXACT, lw=0.9, label="one drawn problem" if i == 0 else None)
    typical = np.exp(np.mean(np.log(data["gap"]), axis=0))
    guides = ((alpha[12:], -1, -2, figures.BLEND, "-."), (alpha[:16], 0, -1, figures.OTHER, ":"))
    for part, end, order, colour, line in guides:
        guide = 3 * typical[end] * (part / alpha[end]) ** order
        left.loglog(part, guide, color=colour, ls=line, lw=2, label=f"slope {order}")
    bands = ((WEAK, -2, WEAK_BOUND, figures.BLEND, "weak"), (STRONG, -1, STRONG_BOUND, figures.OTHER, "strong"))
    for ends, order, bound, colour, name in bands:
        right.fill_between(ends, order - bound, order + bound, color=colour, alpha=0.45, label=f"bound, {name} tilts")
    figures.label(left, "Size of the gap", "KL weight alpha", "root mean square over states", ncols=2, **figures.BELOW)
    figures.label(right, "Its local slope", "KL weight alpha", "d log gap / d log alpha", ncols=3, **figures.BELOW)
    return picture
