"""Proposition 1: the aligned law is the tilt, and its backward process differs by a control only."""

from __future__ import annotations

import torch

from proofs_checks.harness.check import Differences, Figure, Outcome, Settings
from proofs_checks.harness.draw import RawProblem, States, draw_problem, draw_states, uniform
from proofs_checks.harness.quadrature import Given, Lattice, gradient
from sdeblend import VPLinear
from toy import control

PLACE = 20
TITLE = "Proposition 1: alignment is a tilt, and adds a control to the score"
WORDS = (
    "Maximising the mean reward minus alpha times the KL divergence from the pre-trained law has one solution: "
    "the pre-trained density times exp(reward / alpha). To sample it, the backward process needs one extra term "
    "in its score, the control: the gradient of the log of the mean exponentiated reward that is still to be "
    "expected from the noisy state. Left: the control in closed form (lines) and by integration and automatic "
    "differentiation (rings)."
)
FORMULA = (
    r"$p^{(r,\alpha)} = \arg\max_p\ \mathrm{E}_p[r] - \alpha\,\mathrm{KL}(p\,\Vert\,p_{\mathrm{pre}})"
    r" = p_{\mathrm{pre}}\,e^{r/\alpha}/Z$" "\n"
    r"$S^{(r,\alpha)}_t = S^{\mathrm{pre}}_t + u_t,\qquad "
    r"u_t(x) = \nabla_x\log \mathrm{E}[\,e^{r(x_0)/\alpha}\mid x_t = x\,]$" "\n"
    r"$\log \mathrm{E}[\,e^{r(x_0)/\alpha}\mid x_t = x\,] = \log Z + \log p^{(r,\alpha)}_t(x) - \log p_t(x)$"
)
FALSIFIED_BY = (
    "a density with a better objective than the tilt, or a relative difference above 1e-10 between the two "
    "scores' difference and the gradient of the log-expectation, in any drawn problem, schedule or time"
)
CONTROLS = {
    "scalar identity": "log Z left out",
    "score of the tilt less score of the base": "sign of the control",
    "control as a covariance": "factor 1/s² in place of a/s²",
    "objective below its optimum by alpha KL": "KL divergence the other way round",
}
TIMES = (0.05, 0.2, 0.5)


def check(settings: Settings) -> Outcome:
    """Compare controls, log-expectations and objectives with integrals over a lattice."""
    generator = settings.generator("proposition_1")
    errors = Differences(CONTROLS)
    for dim, count in ((1, settings.choose(5, 16)), (2, settings.choose(2, 6))):
        for _ in range(count):
            problem = draw_problem(generator, dim=dim)
            lattice = Lattice(problem)
            for states in draw_states(generator, problem, 6):
                _control(problem, lattice, states, errors)
            for _ in range(4):
                _objective(problem, lattice, generator, errors)
    return Outcome(errors.measurements(), {**errors.data, **_illustration(settings)})


def _control(problem: RawProblem, lattice: Lattice, states: States, errors: Differences) -> None:
    """The control and the scalar identity."""
    base, reward, alpha = problem.base, problem.rewards[0].closed, problem.kl_weight
    values, (schedule, t, x) = lattice.rewards[0] / alpha, states
    given = Given(lattice, States(schedule, t, x.requires_grad_()))
    log_expected = given.log_expected(values)
    u, log_expected = gradient(log_expected, x), log_expected.detach()
    x = x.detach()

    base_t, tilted_t = base.noised(schedule, t), base.tilt(reward, kl_weight=alpha).noised(schedule, t)
    log_ratio = tilted_t.log_prob(x) - base_t.log_prob(x)
    errors.compare("scalar identity", log_ratio + base.log_normalizer(reward, kl_weight=alpha), log_ratio, log_expected)

    difference = tilted_t.score(x) - base_t.score(x)
    errors.compare("score of the tilt less score of the base", difference, -difference, u)

    shift = given.control(values).detach()
    closed = control(base, reward, alpha, schedule, x, t)
    errors.compare("control as a covariance", shift, shift / schedule.alpha(t), closed)


def _objective(problem: RawProblem, lattice: Lattice, generator: torch.Generator, errors: Differences) -> None:
    """For any density p the objective is alpha log Z - alpha KL(p || tilt): nothing beats the tilt."""
    reward, alpha = problem.rewards[0].closed, problem.kl_weight
    waves = uniform(generator, -3.0, 3.0, 5, problem.dim), uniform(generator, 0.0, 6.28, 5)
    bumps = (lattice.nodes @ waves[0].T + waves[1]).sin() @ uniform(generator, -1.0, 1.0, 5)
    log_rival = lattice.log_base + bumps
    log_rival = log_rival - lattice.log_integral(log_rival)
    objective = lattice.mean(log_rival, lattice.rewards[0] - alpha * (log_rival - lattice.log_base))
    log_optimum = problem.base.tilt(reward, kl_weight=alpha).log_prob(lattice.nodes)
    best = alpha * torch.tensor(problem.base.log_normalizer(reward, kl_weight=alpha), dtype=torch.float64)
    forth = lattice.mean(log_rival, log_rival - log_optimum)
    back = lattice.mean(log_optimum, log_optimum - log_rival)
    errors.compare("objective below its optimum by alpha KL", objective + alpha * forth, objective + alpha * back, best)


def _illustration(settings: Settings) -> dict[str, object]:
    """The control of one drawn problem on the line, both ways."""
    generator = settings.generator("proposition_1 figure")
    problem, schedule = draw_problem(generator, dim=1, components=3), VPLinear()
    lattice, reward = Lattice(problem), problem.rewards[0].closed
    x = torch.linspace(-3.0, 3.0, 241, dtype=torch.float64)[:, None]
    few = x[::12].clone().requires_grad_()
    curves, dots = [], []
    for t in TIMES:
        curves.append(control(problem.base, reward, problem.kl_weight, schedule, x, t)[:, 0].numpy())
        given = Given(lattice, States(schedule, torch.tensor(t, dtype=torch.float64), few))
        dots.append(gradient(given.log_expected(lattice.rewards[0] / problem.kl_weight), few)[:, 0].numpy())
    return {"x": x[:, 0].numpy(), "dots": few.detach()[:, 0].numpy(), "control": curves, "control_dots": dots,
            "times": TIMES, "kl_weight": problem.kl_weight}  # fmt: skip


def figure(outcome: Outcome) -> Figure:
    """Draw the control at three times both ways, and all differences against the bound."""
    from proofs_checks.harness import figures

    data = outcome.data
    picture, (left, right) = figures.panels(2)
    styles = ((figures.EXACT, "-"), (figures.BLEND, "--"), (figures.OTHER, "-."))
    rows = zip(data["times"], data["control"], data["control_dots"], styles, strict=True)
    for t, curve, dots, (colour, line) in rows:
        left.plot(data["x"], curve, color=colour, ls=line, label=f"exact, t = {t:g}")
        left.plot(data["dots"], dots, "o", ms=3.5, mfc="none", color=colour)
    left.plot([], [], "o", ms=3.5, mfc="none", color=figures.EXACT, label="autograd of the integral")
    title = f"Control of one drawn problem, alpha = {data['kl_weight']:.2f}"
    figures.label(left, title, "noisy state x", "control u", ncols=2, **figures.BELOW)
    figures.differences(right, data["differences"], data["bound"])
    return picture
