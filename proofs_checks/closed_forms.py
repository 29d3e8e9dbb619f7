"""Closed forms on mixtures against sums over a lattice: tilt, normaliser, noised law, moments, posterior."""

from __future__ import annotations

import torch
from torch import Tensor

from proofs_checks.harness.check import Differences, Figure, Outcome, Settings, worst
from proofs_checks.harness.draw import RawProblem, States, draw_problem, draw_states
from proofs_checks.harness.quadrature import Given, Lattice, gradient
from sdeblend import VPLinear
from toy import GaussianMixture, QuadraticReward

PLACE = 10
TITLE = "Closed forms on Gaussian mixtures"
WORDS = (
    "A Gaussian mixture stays one when noise is added, when it is tilted by the exponential of a linear or "
    "quadratic reward, and when it is conditioned on a noisy observation. So every law the other checks stand on "
    "is known exactly. Here each closed form meets a plain numerical integral of its definition that knows none "
    "of them."
)
FORMULA = (
    r"$p^{(r,\alpha)}(x_0) = p_{\mathrm{pre}}(x_0)\,\exp(r(x_0)/\alpha)\,/\,Z,\qquad "
    r"p_t(x) = \int p_0(x_0)\,\mathcal{N}(x;\,a_t x_0,\,s_t^2 I)\,dx_0$"
)
FALSIFIED_BY = (
    "a relative difference above 1e-10 between a closed form and the integral that defines it, in any drawn "
    "mixture, reward, KL weight, schedule or time"
)
CONTROLS = {
    "log normaliser": "quadratic term without its half",
    "density of the tilt": "sign of the quadratic term",
    "moments of the tilt": "base moments",
    "KL divergence to the base": "sign of log Z",
    "noised density": "variance s in place of s²",
    "noised score": "score of the clean law",
    "posterior mean and covariance": "mean not divided by a",
    "tilt in 3 to 6 dimensions": "log Z of twice the KL weight",
}


def check(settings: Settings) -> Outcome:
    """Compare every closed form with its integral, in one and two dimensions, and the tilt in up to six."""
    generator = settings.generator("closed_forms")
    errors = Differences(CONTROLS)
    for dim, count in ((1, settings.choose(4, 12)), (2, settings.choose(2, 5))):
        for _ in range(count):
            problem = draw_problem(generator, dim=dim)
            lattice = Lattice(problem)
            _static(problem, lattice, errors)
            for states in draw_states(generator, problem, 6):
                _noised(problem, lattice, states, errors)
    for dim in (3, 4, 5, 6):
        for _ in range(settings.choose(2, 8)):
            _dimensions(draw_problem(generator, dim=dim), generator, errors)

    return Outcome(errors.measurements(), {**errors.data, **_illustration(settings)})


def _static(problem: RawProblem, lattice: Lattice, errors: Differences) -> None:
    """Tilt, normaliser, moments and KL divergence."""
    numbers, alpha = problem.rewards[0], problem.kl_weight
    base, reward = problem.base, numbers.closed
    tilted = base.tilt(reward, kl_weight=alpha)
    log_tilt = lattice.log_base + lattice.rewards[0] / alpha
    log_z = lattice.log_integral(log_tilt)
    no_half = QuadraticReward(reward.linear, 2 * reward.quadratic, reward.constant)
    flipped = QuadraticReward(reward.linear, -reward.quadratic, reward.constant)

    right, wrong = (torch.full_like(log_z, base.log_normalizer(r, kl_weight=alpha)) for r in (reward, no_half))
    errors.compare("log normaliser", right, wrong, log_z)

    probable = log_tilt - log_z > -25
    nodes, reference = lattice.nodes[probable][::7], (log_tilt - log_z)[probable][::7]
    other = base.tilt(flipped, kl_weight=alpha)
    errors.compare("density of the tilt", tilted.log_prob(nodes), other.log_prob(nodes), reference)

    mean = lattice.mean(log_tilt, lattice.nodes)
    centred = lattice.nodes - mean
    covariance = (log_tilt.softmax(-1)[:, None] * centred).T @ centred
    values = lattice.rewards[0]
    mean_reward = lattice.mean(log_tilt, values)
    variance = lattice.mean(log_tilt, (values - mean_reward).square())
    reference = torch.cat([mean, covariance.flatten(), mean_reward[None], variance[None]])

    def moments(m: GaussianMixture) -> Tensor:
        scalars = torch.tensor([m.mean_reward(reward), m.reward_variance(reward)], dtype=torch.float64)
        return torch.cat([m.mean, m.covariance.flatten(), scalars])

    errors.compare("moments of the tilt", moments(tilted), moments(base), reference)
    kl = lattice.mean(log_tilt, log_tilt - log_z - lattice.log_base)
    closed_kl = torch.tensor(base.tilt_kl(reward, kl_weight=alpha), dtype=torch.float64)
    errors.compare("KL divergence to the base", closed_kl, closed_kl + 2 * log_z, kl)


def _noised(problem: RawProblem, lattice: Lattice, states: States, errors: Differences) -> None:
    """Noised law, its score, and the posterior."""
    schedule, t, x = states
    given = Given(lattice, States(schedule, t, x.requires_grad_()))
    log_density = lattice.log_integral(given.log_joint)
    score = gradient(log_density, x)
    x, log_density = x.detach(), log_density.detach()

    noised, s = problem.base.noised(schedule, t), schedule.sigma(t)
    extra = (s - s * s) * torch.eye(problem.dim, dtype=torch.float64)
    wrong = GaussianMixture(noised.weights, noised.means, noised.covariances + extra)
    errors.compare("noised density", noised.log_prob(x), wrong.log_prob(x), log_density)
    errors.compare("noised score", noised.score(x), problem.base.score(x), score)

    mean, covariance = (given.weights @ lattice.nodes).detach(), given.covariance().detach()
    posterior = problem.base.posterior(x, schedule, t)
    right = max(worst(posterior.mean, mean), worst(posterior.covariance, covariance))
    errors.add("posterior mean and covariance", right, worst(x + s * s * noised.score(x), mean))


def _dimensions(problem: RawProblem, generator: torch.Generator, errors: Differences) -> None:
    """The tilt where no lattice reaches: base density, reward, tilt and log Z must fit at every point."""
    base, alpha = problem.base, problem.kl_weight
    reward = problem.rewards[0].closed
    tilted = base.tilt(reward, kl_weight=alpha)
    x = tilted.sample(40, generator=generator)
    # The tilt is normalised by its form, so this can be constant in x and equal to log Z only if both are right.
    reference = problem.log_density(x) + problem.rewards[0](x) / alpha - tilted.log_prob(x)
    right, wrong = (torch.full_like(reference, base.log_normalizer(reward, kl_weight=k)) for k in (alpha, 2 * alpha))
    errors.compare("tilt in 3 to 6 dimensions", right, wrong, reference)


def _illustration(settings: Settings) -> dict[str, object]:
    """One drawn problem in one dimension, both sides on the same axis."""
    generator = settings.generator("closed_forms figure")
    problem = draw_problem(generator, dim=1, components=3)
    lattice = Lattice(problem)
    schedule = VPLinear()
    log_tilt = lattice.log_base + lattice.rewards[0] / problem.kl_weight
    near = (log_tilt - lattice.log_integral(log_tilt) > -12) | (lattice.log_base > -12)
    x, times = lattice.nodes[near], (0.1, 0.4)
    tilted = problem.base.tilt(problem.rewards[0].closed, kl_weight=problem.kl_weight)
    noised = [
        lattice.log_integral(log_tilt + lattice.log_kernel(x[::12], schedule.alpha(t), schedule.sigma(t)))
        - lattice.log_integral(log_tilt)
        for t in times
    ]
    return {
        "x": x[:, 0].numpy(),
        "base": problem.base.log_prob(x).exp().numpy(),
        "tilt": tilted.log_prob(x).exp().numpy(),
        "noised": [tilted.noised(schedule, t).log_prob(x).exp().numpy() for t in times],
        "dots": x[::12, 0].numpy(),
        "tilt_dots": (log_tilt - lattice.log_integral(log_tilt)).exp()[near][::12].numpy(),
        "noised_dots": [values.exp().numpy() for values in noised],
        "times": times,
    }


def figure(outcome: Outcome) -> Figure:
    """Draw one drawn problem with both sides on it, and the differences of all of them against the bound."""
    from proofs_checks.harness import figures

    data = outcome.data
    picture, (left, right) = figures.panels(2)
    left.plot(data["x"], data["base"], color=figures.BASE, ls=":", label="base")
    curves = [("exact target", data["tilt"], data["tilt_dots"], figures.EXACT, "-")]
    styles = ((figures.BLEND, "--"), (figures.OTHER, "-."))
    for t, curve, dots, (colour, line) in zip(data["times"], data["noised"], data["noised_dots"], styles, strict=True):
        curves.append((f"target at t = {t:g}", curve, dots, colour, line))
    for name, curve, dots, colour, line in curves:
        left.plot(data["x"], curve, color=colour, ls=line, label=name)
        left.plot(data["dots"], dots, "o", ms=3.5, mfc="none", color=colour)
    left.plot([], [], "o", ms=3.5, mfc="none", color=figures.EXACT, label="integral on the lattice")
    title = "One drawn problem: closed forms and integrals"
    figures.label(left, title, "x (units of the data)", "density", ncols=3, **figures.BELOW)
    figures.differences(right, data["differences"], data["bound"])
    return picture
