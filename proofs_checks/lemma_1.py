"""Lemma 1: the Jensen gap in closed form, three bounds on it, and how it vanishes towards the data."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from proofs_checks.harness.check import Measurement, Outcome, Settings
from proofs_checks.harness.draw import uniform
from proofs_checks.harness.quadrature import (
    Differences,
    Lattice,
    RawProblem,
    draw_points,
    draw_problem,
    draw_time,
    schedules,
    worst,
)
from sdeblend import NoiseSchedule, VPLinear
from toy import control, jensen_gap
from toy.statements.bounds import jensen_bounds

if TYPE_CHECKING:
    from proofs_checks.harness.figures import Figure

PLACE = 30
TITLE = "Lemma 1: the Jensen gap, and three bounds that hold it"
WORDS = (
    "Blending keeps the gradient of the mean reward where the exact control has the gradient of a "
    "log-mean-exponential. The difference, the Jensen gap, is a covariance under the law of the clean sample "
    "given the noisy one. Three bounds on it can be computed: by Cauchy-Schwarz (B1), the paper's (B2), and by "
    "integrating third cumulants along the tilt (B3). None may ever be smaller than the gap; B3 is nearly the gap "
    "itself, so its margin is 1 up to rounding. Towards the data the gap vanishes like the noise variance."
)
FORMULA = (
    r"$\Delta_t(x) = \nabla_x\log\mathrm{E}[e^{r/\alpha}\mid x] - \nabla_x\mathrm{E}[r/\alpha\mid x]"
    r" = \dfrac{a}{s^2}\,\mathrm{Cov}(v - r/\alpha,\ x_0\mid x)"
    r",\qquad v = e^{r/\alpha}\,/\,\mathrm{E}[e^{r/\alpha}\mid x]$" "\n"
    r"$\mathrm{B1} = \dfrac{a}{s^2}\,\mathrm{sd}(v - r/\alpha)\,\sqrt{\lambda_{\max}(C)},\qquad "
    r"\mathrm{B2} = \dfrac{|J|}{\alpha}\sqrt{\mathrm{tr\,Cov}(\nabla r)}\,\mathrm{sd}(v)"
    r" + \mathrm{sd}(v - r/\alpha)\,|J(I_F - C^{-1})J|^{1/2}$" "\n"
    r"$\mathrm{B3} = \dfrac{a}{s^2}\int_0^1(1-\theta)\,|\kappa_{3,\theta}(r/\alpha,\ r/\alpha,\ x_0)|\,d\theta$"
)
FALSIFIED_BY = (
    "a gap that differs by more than 1e-10 from its integral, a single state at which a gap exceeds one of its "
    "bounds, or a gap that near the data does not shrink in proportion to the noise variance (slope off 1 by more "
    "than 0.15)"
)
CONTROLS = {
    "gap as a covariance": "mean of r/alpha not subtracted (u itself)",
    "gap as a gradient": "sign of the second term",
}
BOUNDS = {
    "B1": "variance of v - r/alpha in place of its standard deviation",
    "B2": "second term left out",
    "B3": "cumulant before the tilt only",
}
ROUNDING = 1e-9
SLOPE_BOUND = 0.15
NEAR_DATA = torch.logspace(-3, -2, 6, dtype=torch.float64)


def check(settings: Settings) -> Outcome:
    """Compare gaps with integrals, hold every gap against every bound, and follow it towards the data."""
    generator = settings.generator("lemma_1")
    errors = Differences(CONTROLS)
    ratios: dict[str, list[Tensor]] = {name: [] for name in BOUNDS}
    broken: dict[str, list[Tensor]] = {name: [] for name in BOUNDS}
    for dim, count in ((1, settings.choose(3, 9)), (2, settings.choose(2, 5))):
        for i in range(count):
            problem = draw_problem(generator, dim=dim)
            if i % 2:  # nearly linear: B2 then rests on its second term
                numbers = problem.rewards[0]
                problem = replace(problem, rewards=(replace(numbers, quadratic=0.1 * numbers.quadratic),))
            lattice = Lattice(problem)
            for schedule in schedules().values():
                # The bounds must hold for weak tilts as well, where they are small.
                alpha = problem.kl_weight * float(uniform(generator, 0.0, 2.5).exp())
                state = _State(problem, alpha, lattice, schedule, generator)
                state.compare(errors)
                state.hold(ratios, broken)

    slopes, others, shrink = [], [], []
    for i in range(settings.choose(6, 20)):
        slope, other, ratio = _towards_data(draw_problem(generator, dim=1 + i % 3), generator)
        slopes.append(slope)
        others.append(other)
        shrink.append(ratio)

    measurements = errors.measurements()
    loose = {}
    for name, wrong in BOUNDS.items():
        share = torch.cat(ratios[name])
        loose[name] = (1 / share).numpy()
        measurements.append(
            Measurement(
                f"largest gap over {name}, {len(share)} states", float(share.max()), "<=", 1 + ROUNDING, wrong,
                float(torch.cat(broken[name]).max()),
            )
        )  # fmt: skip
    measurements.append(
        Measurement(
            "t to 0: slope of log gap over log s², distance from 1",
            max(abs(s - 1) for s in slopes), "<=", SLOPE_BOUND,
            "the control u in place of the gap", max(abs(s - 1) for s in others),
        )
    )  # fmt: skip
    over_time = _illustration(settings)
    findings = [
        "how loose the bounds are (bound over gap, middle and 95th percentile): "
        + ", ".join(f"{n} {np.median(v):.2f} and {np.quantile(v, 0.95):.2f}" for n, v in loose.items()),
        f"gap at t = 0.001 over gap at t = 0.01: {min(shrink):.3f} to {max(shrink):.3f} (the noise variances: "
        f"{float(VPLinear().sigma(1e-3).square() / VPLinear().sigma(1e-2).square()):.3f})",
        f"in the figure's problem the gap is largest at t = {over_time['t'][np.argmax(over_time['gap'])]:.2f}",
    ]
    return Outcome(measurements, {**over_time, "loose": loose}, findings)


class _State:
    """Drawn states at one drawn time of one schedule: the gap three ways, and the bounds on it."""

    def __init__(
        self,
        problem: RawProblem,
        alpha: float,
        lattice: Lattice,
        schedule: NoiseSchedule,
        generator: torch.Generator,
    ) -> None:
        self.problem, self.alpha, self.lattice, self.schedule = problem, alpha, lattice, schedule
        self.reward, self.values = problem.rewards[0].closed, lattice.rewards[0] / alpha
        self.t = draw_time(generator, schedule)
        self.a, self.s = schedule.alpha(self.t), schedule.sigma(self.t)
        self.gain = self.a / self.s.square()
        self.x = draw_points(generator, problem, schedule, self.t, 8)
        log_joint = lattice.log_base + lattice.log_kernel(self.x, self.a, self.s)
        self.before, self.after = log_joint.softmax(-1), (log_joint + self.values).softmax(-1)
        self.centred = self.values - (self.before @ self.values)[:, None]
        self.closed = jensen_gap(problem.base, self.reward, alpha, schedule, self.x, self.t)
        self.gap = self.gain * ((self.after - self.before - self.before * self.centred) @ lattice.nodes)

    def compare(self, errors: Differences) -> None:
        """Compare the closed form with the covariance by integration, and with two gradients."""
        closed = self.closed
        without = self.gain * ((self.after - self.before) @ self.lattice.nodes)
        errors.add("gap as a covariance", worst(closed, self.gap), worst(closed, without))

        x = self.x.clone().requires_grad_()
        log_joint = self.lattice.log_base + self.lattice.log_kernel(x, self.a, self.s)
        log_mean = (log_joint + self.values).logsumexp(-1) - log_joint.logsumexp(-1)
        u, ubar = _gradient(log_mean, x), _gradient(log_joint.softmax(-1) @ self.values, x)
        errors.add("gap as a gradient", worst(closed, u - ubar), worst(closed, u + ubar))

    def hold(self, ratios: dict[str, list[Tensor]], broken: dict[str, list[Tensor]]) -> None:
        """Hold the gap against the bounds, and against bounds with something dropped."""
        # B3 can be as tight as rounding, which the integral has more of than the closed form that it confirms.
        size = self.closed.norm(dim=-1)
        bounds = jensen_bounds(self.problem.base, self.reward, self.alpha, self.schedule, self.x, self.t)
        for name, bound in zip(BOUNDS, (bounds.cauchy_schwarz, bounds.shift, bounds.thermodynamic), strict=True):
            ratios[name].append(size / bound)

        before, nodes, numbers = self.before, self.lattice.nodes, self.problem.rewards[0]
        mean = before @ nodes
        second = torch.einsum("bn,ni,nj->bij", before, nodes, nodes)
        largest = torch.linalg.eigvalsh(second - mean[:, :, None] * mean[:, None, :])[:, -1]
        v = self.after / before.clamp_min(1e-300)
        variance_h = (before * (v - 1 - self.centred).square()).sum(-1)
        variance_v = (before * (v - 1).square()).sum(-1)
        slopes = numbers.linear - nodes @ numbers.quadratic
        trace = before @ slopes.square().sum(-1) - (before @ slopes).square().sum(-1)
        squares = before * self.centred.square()
        third = squares @ nodes - squares.sum(-1, keepdim=True) * mean
        dropped = (
            self.gain * variance_h * largest.sqrt(),
            self.gain * largest * (trace * variance_v).sqrt() / self.alpha,
            self.gain * third.norm(dim=-1) / 2,
        )
        for name, bound in zip(BOUNDS, dropped, strict=True):
            broken[name].append(size / bound)


def _gradient(values: Tensor, x: Tensor) -> Tensor:
    (slope,) = torch.autograd.grad(values.sum(), x, retain_graph=True)
    return slope


def _towards_data(problem: RawProblem, generator: torch.Generator) -> tuple[float, float, float]:
    """Return the slopes of log gap and log control over log s² near the data, and the gap's ratio end to end."""
    schedule, reward = VPLinear(), problem.rewards[0].closed
    clean = problem.base.sample(64, generator=generator)
    gaps: list[float] = []
    controls: list[float] = []
    for t in NEAR_DATA:
        x = schedule.alpha(t) * clean
        for function, sizes in ((jensen_gap, gaps), (control, controls)):
            vectors = function(problem.base, reward, problem.kl_weight, schedule, x, t)
            # Between modes the limit sets in later; the middle one of the states does not see that.
            sizes.append(float(vectors.norm(dim=-1).median()))
    variance = (2 * schedule.sigma(NEAR_DATA).log()).numpy()
    slopes = [float(np.polyfit(variance, np.log(sizes), 1)[0]) for sizes in (gaps, controls)]
    return slopes[0], slopes[1], gaps[0] / gaps[-1]


def _illustration(settings: Settings) -> dict[str, Any]:
    """Gap and bounds of one drawn problem over time."""
    generator = settings.generator("lemma_1 figure")
    problem, schedule = draw_problem(generator, dim=2, components=3), VPLinear()
    reward, times = problem.rewards[0].closed, torch.logspace(-3, 0, 25, dtype=torch.float64)
    gaps, bounds = [], []
    for i, t in enumerate(times):
        x = draw_points(generator, problem, schedule, t, 48)
        gaps.append(_rms(jensen_gap(problem.base, reward, problem.kl_weight, schedule, x, t).norm(dim=-1)))
        if t > 0.015 and i % 2 == 0:
            found = jensen_bounds(problem.base, reward, problem.kl_weight, schedule, x, t)
            bounds.append([float(t), *(_rms(b) for b in (found.cauchy_schwarz, found.shift, found.thermodynamic))])
    columns = np.array(bounds).T
    return {
        "t": times.numpy(), "gap": np.array(gaps), "bounds_t": columns[0],
        "bounds": dict(zip(BOUNDS, columns[1:], strict=True)),
        "variance": schedule.sigma(times).square().numpy(), "kl_weight": problem.kl_weight,
    }  # fmt: skip


def _rms(sizes: Tensor) -> float:
    return float(sizes.square().mean().sqrt())


def figure(outcome: Outcome) -> Figure:
    """Draw gap and bounds over time, and the share of states up to each looseness."""
    from proofs_checks.harness import figures
    from proofs_checks.harness.figures_page import BELOW

    data = outcome.data
    styles = {"B1": (figures.BLEND, "--"), "B2": (figures.OTHER, "-."), "B3": (figures.GOOD, ":")}
    picture, (left, right) = figures.panels(2)
    left.loglog(data["t"], data["gap"], color=figures.EXACT, lw=2, label="gap, exact")
    for name, bound in data["bounds"].items():
        left.loglog(data["bounds_t"], bound, "o", ms=2.5, color=styles[name][0], ls=styles[name][1], label=name)
    guide = 2 * data["gap"][0] / data["variance"][0] * data["variance"][:14]
    left.loglog(data["t"][:14], guide, color=figures.BASE, lw=1, label="proportional to s²")
    figures.label(left, f"One drawn problem, alpha = {data['kl_weight']:.2f}", "time t (0 data, 1 noise)",
                  "root mean square over states", ncols=3, **BELOW)  # fmt: skip
    for name, loose in data["loose"].items():
        ordered = np.sort(np.asarray(loose))
        colour, line = styles[name]
        share = np.arange(1, len(ordered) + 1) / len(ordered)
        right.semilogx(ordered, share, color=colour, ls=line, lw=2, zorder=3, label=name)
    right.axvline(1.0, color=figures.EXACT, lw=1.5, label="gap, exact: left of it is a violation")
    right.set_xlim(0.8, None)
    right.set_ylim(0, 1.02)
    figures.label(right, "How loose", "bound / gap", "share of states", ncols=3, **BELOW)
    return picture

