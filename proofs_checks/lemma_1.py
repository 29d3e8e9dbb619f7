"""Lemma 1: the Jensen gap in closed form, three bounds on it, and how it vanishes towards the data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from proofs_checks.harness.check import Differences, Figure, Measurement, Outcome, Settings, slope
from proofs_checks.harness.draw import RawProblem, States, draw_points, draw_problem, draw_states, uniform
from proofs_checks.harness.quadrature import Given, Lattice, gradient
from sdeblend import VPLinear
from sdeblend.schedule import SCHEDULES
from toy import control, jensen_gap
from toy.statements.bounds import jensen_bounds

PLACE = 30
TITLE = "Lemma 1: the Jensen gap, and three bounds that hold it"
WORDS = (
    "Blending keeps the gradient of the mean reward where the exact control has the gradient of a "
    "log-mean-exponential. The difference, the Jensen gap, is a covariance under the law of the clean sample "
    "given the noisy one. Three bounds on it can be computed: by Cauchy-Schwarz (B1), the paper's (B2), and by "
    "integrating third cumulants along the tilt (B3). None may ever be smaller than the gap; B3 is nearly the gap "
    "itself, so its margin is 1 up to rounding. Towards the data the gap vanishes like the noise variance times what "
    "the reward's slope and curvature make there; where these make next to nothing (a reward that is nearly a straight "
    "line) what comes after it is all there is, so this is followed on problems where it is there."
)
FORMULA = (
    r"$\Delta_t(x) = \nabla_x\log\mathrm{E}[e^{r/\alpha}\mid x] - \nabla_x\mathrm{E}[r/\alpha\mid x]"
    r" = \dfrac{a}{s^2}\,\mathrm{Cov}(v - r/\alpha,\ x_0\mid x)"
    r",\qquad v = e^{r/\alpha}\,/\,\mathrm{E}[e^{r/\alpha}\mid x]$" "\n"
    r"$\mathrm{B1} = \dfrac{a}{s^2}\,\mathrm{sd}(v - r/\alpha)\,\sqrt{\lambda_{\max}(C)},\qquad "
    r"\mathrm{B2} = \dfrac{|J|}{\alpha}\sqrt{\mathrm{tr\,Cov}(\nabla r)}\,\mathrm{sd}(v)"
    r" + \mathrm{sd}(v - r/\alpha)\,|J(I_F - C^{-1})J|^{1/2}$" "\n"
    r"$\mathrm{B3} = \dfrac{a}{s^2}\int_0^1(1-\theta)\,|\kappa_{3,\theta}(r/\alpha,\ r/\alpha,\ x_0)|\,d\theta,\qquad "
    r"\Delta_t(a x_0) = \dfrac{s^2}{a^3}\,\nabla^2\dfrac{r}{\alpha}\,\nabla\dfrac{r}{\alpha}(x_0) + O(s^4)$"
)
FALSIFIED_BY = (
    "a gap that differs by more than 1e-10 from its integral, a single state at which a gap exceeds one of its "
    "bounds, a bound that is not the integral it stands for, or a gap that near the data does not shrink in proportion "
    "to the noise variance (slope off 1 by more than 0.15, or 0.02 away from its leading term at t = 0.0001)"
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
# What is added to B3 for the kinks of a norm may be .001 of it.
DEFINITION_BOUND = 5e-3
LEAST_VARIANCE = 1e-9
SLOPE_BOUND, LEADING_BOUND = 0.15, 0.02
NEAR_DATA, NEAREST = torch.logspace(-3, -2, 6, dtype=torch.float64), torch.tensor(1e-4, dtype=torch.float64)
# Of |Hessian gradient| of the reward, the middle one of the states: what is nearer to zero than this has no slope of
# its own; the reward has unit size.
LEAST_LEADING = 0.1


def check(settings: Settings) -> Outcome:
    """Compare gaps with integrals, hold every gap against every bound, and follow it towards the data."""
    generator = settings.generator("lemma_1")
    errors, bounds = Differences(CONTROLS), _Bounds()
    dims = [1] * settings.choose(3, 9) + [2] * settings.choose(2, 5)
    for i, dim in enumerate(dims):
        problem = draw_problem(generator, dim=dim)
        if i % 2:  # nearly linear: B2 then rests on its second term
            problem = problem.with_curvature(0.1 * problem.rewards[0].quadratic)
        lattice = Lattice(problem)
        for k, states in enumerate(draw_states(generator, problem, 40)):
            # The bounds must hold for weak tilts as well, where they are small.
            alpha = problem.kl_weight * float(uniform(generator, 0.0, 2.5).exp())
            _compare(problem, alpha, lattice, states, errors)
            # Bounds cost as much for one state as for forty: one schedule a problem, another one for the next.
            if k == i % len(SCHEDULES):
                bounds.hold(problem, alpha, lattice, states)

    near = [_near_data(1 + i % 3, generator) for i in range(settings.choose(6, 20))]
    slopes, others, leading, halves = zip(*near, strict=True)
    measurements = [
        *errors.measurements(),
        *bounds.measurements(),
        Measurement("t to 0: slope of log gap over log s², distance from 1", max(abs(p - 1) for p in slopes), "<=",
                    SLOPE_BOUND, "the control u in place of the gap", max(abs(p - 1) for p in others)),
        Measurement("gap at t = 0.0001 less its leading term, relative", max(leading), "<=", LEADING_BOUND,
                    "half the leading term", min(halves)),
    ]  # fmt: skip
    over_time, loose = _illustration(settings), bounds.loose()
    findings = [
        "how loose the bounds are (bound over gap, middle and 95th percentile): "
        + ", ".join(f"{n} {np.median(v):.2f} and {np.quantile(v, 0.95):.2f}" for n, v in loose.items()),
        f"slope of the gap over the noise variance near the data: {min(slopes):.3f} to {max(slopes):.3f}",
        f"in the figure's problem the gap is largest at t = {over_time['t'][np.argmax(over_time['gap'])]:.2f}",
    ]
    return Outcome(measurements, {**over_time, "loose": loose}, findings)


def _compare(problem: RawProblem, alpha: float, lattice: Lattice, states: States, errors: Differences) -> None:
    """Compare the closed form with the covariance by integration, and with two gradients."""
    values, (schedule, t, x) = lattice.rewards[0] / alpha, states
    x = x[:8].clone().requires_grad_()
    given = Given(lattice, States(schedule, t, x))
    u, ubar = gradient(given.log_expected(values), x), gradient(given.weights @ values, x)
    closed = jensen_gap(problem.base, problem.rewards[0].closed, alpha, schedule, x.detach(), t)
    errors.compare("gap as a covariance", given.gap(values).detach(), given.control(values).detach(), closed)
    errors.compare("gap as a gradient", u - ubar, u + ubar, closed)


class _Bounds:
    """Gaps over their bounds, over bounds with something dropped, and the bounds against their own integrals."""

    def __init__(self) -> None:
        self.ratios: dict[str, list[Tensor]] = {name: [] for name in BOUNDS}
        self.broken: dict[str, list[Tensor]] = {name: [] for name in BOUNDS}
        self.off = dict.fromkeys(BOUNDS, (0.0, 0.0))

    def hold(self, problem: RawProblem, alpha: float, lattice: Lattice, states: States) -> None:
        """Hold the gaps of some states against the bounds; on the line, the bounds against their integrals too."""
        reward, values, given = problem.rewards[0].closed, lattice.rewards[0] / alpha, Given(lattice, states)
        schedule, t, x = states
        # B3 can be as tight as rounding, which the integral has more of than the closed form that it confirms.
        size = jensen_gap(problem.base, reward, alpha, schedule, x, t).norm(dim=-1)
        found = jensen_bounds(problem.base, reward, alpha, schedule, x, t)
        bounds = (found.cauchy_schwarz, found.shift, found.thermodynamic)
        v, centred = given.tilted(values).weights / given.weights.clamp_min(1e-300) - 1, given.centred(values)
        variance_h, variance_v = ((given.weights * y.square()).sum(-1) for y in (v - centred, v))
        largest = torch.linalg.eigvalsh(given.covariance())[:, -1]
        slopes = problem.rewards[0].linear - given.nodes @ problem.rewards[0].quadratic
        trace = given.weights @ slopes.square().sum(-1) - (given.weights @ slopes).square().sum(-1)
        first = given.gain * largest * (trace * variance_v).clamp_min(0).sqrt() / alpha
        dropped = (
            given.gain * variance_h * largest.sqrt(), first, given.gain * given.third(values).norm(dim=-1) / 2,
        )  # fmt: skip
        for name, bound, less in zip(BOUNDS, bounds, dropped, strict=True):
            self.ratios[name].append(size / bound)
            self.broken[name].append(size / less)
        if problem.dim > 1:
            return
        # The score of the posterior in x_0; its mean square is the Fisher information.
        nodes = lattice.nodes.clone().requires_grad_()
        a, s = schedule.alpha(t), schedule.sigma(t)
        psi = gradient(problem.log_density(nodes), nodes)[:, 0] + a * (x - a * lattice.nodes.T) / s.square()
        deficit = largest.square() * (given.weights * psi.square()).sum(-1) - largest
        integrals = (
            given.gain * (variance_h * largest).sqrt(),
            first + given.gain * (variance_h * deficit.clamp_min(0)).sqrt(),
            _third_along_the_tilt(given, values),
        )
        # Bounds are rounded up: where Var(v - r/alpha) is itself near rounding, its root is what that adds.
        clear = variance_h > LEAST_VARIANCE
        for name, bound, whole, less in zip(BOUNDS, bounds, integrals, dropped, strict=True):
            held = bound.isfinite() & clear
            if not bool(held.any()):
                continue
            right, wrong = (float((bound / other - 1).abs()[held].max()) for other in (whole, less))
            self.off[name] = max(self.off[name][0], right), max(self.off[name][1], wrong)

    def measurements(self) -> list[Measurement]:
        """Return a line for each bound, and one for what they are."""
        right, wrong = zip(*self.off.values(), strict=True)
        return [
            *(Measurement(f"largest gap over {name}, {sum(map(len, self.ratios[name]))} states",
                          float(torch.cat(self.ratios[name]).max()), "<=", 1 + ROUNDING, words,
                          float(torch.cat(self.broken[name]).max())) for name, words in BOUNDS.items()),
            Measurement("bounds less the integrals they stand for, d = 1, relative", max(right), "<=",
                        DEFINITION_BOUND, "what is broken above, the one that shows least", min(wrong)),
        ]  # fmt: skip

    def loose(self) -> dict[str, np.ndarray]:
        """Return bound over gap of all states, by bound."""
        return {name: (1 / torch.cat(parts)).numpy() for name, parts in self.ratios.items()}


def _third_along_the_tilt(given: Given, values: Tensor, panels: int = 24) -> Tensor:
    """Return B3 on the line, (B,), by Gauss-Legendre panels."""
    total = torch.zeros(len(given.weights), dtype=torch.float64)
    for node, weight in zip(*np.polynomial.legendre.leggauss(4), strict=True):
        for panel in range(panels):
            theta = (panel + (node + 1) / 2) / panels
            total += weight / 2 / panels * (1 - theta) * given.tilted(theta * values).third(values).norm(dim=-1)
    return given.gain * total


def _near_data(dim: int, generator: torch.Generator) -> tuple[float, float, float, float]:
    """Return slopes of log gap and log control over log s², and the gap's distance from its leading term and half."""
    schedule = VPLinear(t_min=float(NEAREST))
    while True:
        problem = draw_problem(generator, dim=dim)
        clean, numbers, alpha = problem.base.sample(64, generator=generator), problem.rewards[0], problem.kl_weight
        product = -(numbers.linear - clean @ numbers.quadratic) @ numbers.quadratic
        if float(product.norm(dim=-1).median()) >= LEAST_LEADING:
            break
    # Between modes the limit sets in later; the middle one of the states does not see that.
    def at(function: Callable[..., Tensor], t: Tensor) -> Tensor:
        return function(problem.base, numbers.closed, alpha, schedule, schedule.alpha(t) * clean, t)

    def middle(vectors: Tensor) -> float:
        return float(vectors.norm(dim=-1).median())

    variance = schedule.sigma(NEAR_DATA).square()
    powers = [slope(variance, [middle(at(function, t)) for t in NEAR_DATA]) for function in (jensen_gap, control)]
    gap, size = at(jensen_gap, NEAREST), schedule.sigma(NEAREST) ** 2 / schedule.alpha(NEAREST) ** 3 / alpha**2
    near, half = (middle((gap / (k * size) - product) / product.norm(dim=-1, keepdim=True)) for k in (1, 0.5))
    return powers[0], powers[1], near, half


def _illustration(settings: Settings) -> dict[str, Any]:
    """Gap and bounds of one drawn problem over time."""
    generator = settings.generator("lemma_1 figure")
    problem, schedule = draw_problem(generator, dim=2, components=3), VPLinear()
    reward, times = problem.rewards[0].closed, torch.logspace(-3, 0, 25, dtype=torch.float64)
    gaps, bounds = [], []
    for i, t in enumerate(times):
        state = problem.base, reward, problem.kl_weight, schedule, draw_points(generator, problem, schedule, t, 48), t
        gaps.append(_rms(jensen_gap(*state).norm(dim=-1)))
        if t > 0.015 and i % 4 == 0:
            found = jensen_bounds(*state)
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

    data = outcome.data
    styles = {"B1": (figures.BLEND, "--"), "B2": (figures.OTHER, "-."), "B3": (figures.GOOD, ":")}
    picture, (left, right) = figures.panels(2)
    left.loglog(data["t"], data["gap"], color=figures.EXACT, lw=2, label="gap, exact")
    for name, bound in data["bounds"].items():
        left.loglog(data["bounds_t"], bound, "o", ms=2.5, color=styles[name][0], ls=styles[name][1], label=name)
    guide = 2 * data["gap"][0] / data["variance"][0] * data["variance"][:14]
    left.loglog(data["t"][:14], guide, color=figures.BASE, lw=1, label="proportional to s²")
    figures.label(left, f"One drawn problem, alpha = {data['kl_weight']:.2f}", "time t (0 data, 1 noise)",
                  "root mean square over states", ncols=3, **figures.BELOW)  # fmt: skip
    for name, loose in data["loose"].items():
        ordered = np.sort(np.asarray(loose))
        colour, line = styles[name]
        share = np.arange(1, len(ordered) + 1) / len(ordered)
        right.semilogx(ordered, share, color=colour, ls=line, lw=2, zorder=3, label=name)
    right.axvline(1.0, color=figures.EXACT, lw=1.5, label="gap, exact: left of it is a violation")
    right.set_xlim(0.8, None)
    right.set_ylim(0, 1.02)
    figures.label(right, "How loose", "bound / gap", "share of states", ncols=3, **figures.BELOW)
    return picture

