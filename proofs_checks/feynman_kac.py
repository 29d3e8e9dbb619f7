"""Feynman-Kac: the weights make the blend exact, at no further model call.

Five sides. (1) The unnormalised q_t = prod_i p_{i,t}^{c_i} solves, in backward time and for any signs of c, the
Fokker-Planck equation of the blend with the rate -(g^2/2) spread: divided by q and sorted,

    -d log q/dt = f d + f x.S - (g^2/2) ( lap log q + |S|^2 + spread ),

whose left side and derivatives come from autograd of densities written out here, the spread from the library. (2) In
discrete time W is the ratio of prod_i R_i^{c_i} to the blend's own transition density, for each solver step.
(3) E[W] is the ratio of normalisers. (4) Weighted and resampled samples have the target's mode weights.

Source: Del Moral 2004; theory of the weights in ``sdeblend.correct``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from proofs_checks.harness.check import Figure, Measurement, Outcome, Settings
from proofs_checks.harness.draw import Drawn, draw_line, draw_space, uniform
from sdeblend import (
    BackwardSDE,
    Correction,
    Preference,
    ScoreFunction,
    Solution,
    VPLinear,
    solve,
    time_grid,
    trajectory,
)
from sdeblend.steps import Ancestral, EulerMaruyama, ExponentialMultistep, Step
from toy import GaussianMixture
from toy.problems import ring8
from toy.scores.stack import mixture_score

PLACE = 80
TITLE = "Feynman-Kac: weights that make the blend exact"
WORDS = (
    "The blend computes every member's score anyway. How far these scores disagree along a path gives that path a "
    "weight, and with these weights the samples follow the wanted target exactly. The mean weight is the ratio of the "
    "normalising constants, which mixtures have in closed form; and resampling by the weights brings the modes of the "
    "target to their exact shares, as close as exact samples of the same number are."
)
FORMULA = (
    r"$d \log W = -\frac{g^2}{2}\left(\sum_i c_i |S_i|^2 - |\bar S|^2\right) dt, \qquad "
    r"E[W] = Z_{\lambda r(w)} \,/\, \prod_i Z_i^{c_i}$"
)
FALSIFIED_BY = (
    "a residual of the equation that W stands for; a weight that is not the ratio of transition densities; a mean "
    "weight that misses the normaliser by more than .05 nats; corrected mode weights further from the target than 1.5 "
    "times what exact samples of the same number are"
)

STEPS = 200
RING_STEPS = 100
# The mean distance of fewer runs is itself uncertain by more than a tenth.
RUNS = 100
KL_WEIGHTS = (0.25, 0.1)
# Where few paths carry the mean weight more of them are drawn, until its standard error is a fifth of the bound.
NATS, BATCH, BATCHES = 0.05, 20_000, 25


@dataclass(frozen=True)
class _Ring:
    """Mode weights on the ring: the target's, mean ones, and distances to the target (runs,), by how they were made."""

    target: Tensor
    means: dict[str, Tensor]
    distances: dict[str, Tensor]
    normalizer: tuple[float, float, float]
    ess: float
    particles: int

    def over_exact(self, name: str) -> float:
        """Return the mean distance over that of exact samples of the same number."""
        return float(self.distances[name].mean() / self.distances["exact samples"].mean())


def check(settings: Settings) -> Outcome:
    """Check the equation of the weights, their discrete form, their mean, and what they make of the ring."""
    residual, residual_control = _equation(settings)
    discrete, discrete_control = _discrete(settings)
    lines = [_line_normalizer(settings, i) for i in range(settings.choose(3, 8))]
    rings = {alpha: _ring(settings, alpha) for alpha in KL_WEIGHTS}
    normalizers = lines + [ring.normalizer for ring in rings.values()]
    measurements = [
        Measurement("equation of q_t: residual (relative), strengths .7 and 1.4", residual, "<=", 1e-10,
                    "sign of the spread", residual_control),
        Measurement("log W less log of the density ratio (relative), 3 solvers", discrete, "<=", 1e-9,
                    "1/V for 1/(2V)", discrete_control),
        Measurement(f"log E[W] less its closed form (nats), {len(normalizers)} problems",
                    max(abs(value - exact) for value, exact, _ in normalizers), "<=", NATS,
                    "sign of the weight", min(abs(flipped - exact) for _, exact, flipped in normalizers)),
        *(Measurement(f"ring8, alpha {alpha:g}: mode-weight TV, corrected over exact samples",
                      ring.over_exact("corrected"), "<=", 1.5, "no weights", ring.over_exact("plain"))
          for alpha, ring in rings.items()),
    ]  # fmt: skip
    findings = []
    for alpha, ring in rings.items():
        plain, corrected, exact_score, floor = (float(row.mean()) for row in ring.distances.values())
        findings.append(
            f"ring8, alpha {alpha:g}, {ring.particles} samples, {RING_STEPS} steps, mean of {RUNS} runs: "
            f"mode-weight TV {plain:.4f} plain, {corrected:.4f} corrected, "
            f"{floor:.4f} exact samples, {exact_score:.4f} exact score on the same grid and noise; "
            f"log E[W] {ring.normalizer[0]:.3f} ({ring.normalizer[1]:.3f} exact); effective samples {ring.ess:.0%}"
        )
    return Outcome(measurements, {"rings": rings, "normalizers": normalizers}, findings)


def figure(outcome: Outcome) -> Figure:
    """Mode weights on the ring, their distances to the target run by run, and log E[W] against its closed form."""
    from proofs_checks.harness import figures

    rings: dict[float, _Ring] = outcome.data["rings"]
    picture, (modes, distances, normalizers) = figures.panels(3)
    alpha = max(rings)
    ring = rings[alpha]
    places = torch.arange(len(ring.target)).double()
    modes.bar(places - 0.2, ring.means["plain"], 0.4, color=figures.BLEND, label="blend, plain")
    modes.bar(places + 0.2, ring.means["corrected"], 0.4, color=figures.GOOD, label="blend, corrected")
    modes.scatter(
        places, ring.target, marker="_", s=400, linewidths=2, color=figures.EXACT, label="exact target", zorder=3
    )
    figures.label(modes, f"ring8, alpha {alpha:g}", "mode", "probability")
    colours = (figures.BLEND, figures.GOOD, figures.OTHER, figures.EXACT)
    for row, ring in enumerate(rings.values()):
        for column, ((name, values), colour) in enumerate(zip(ring.distances.items(), colours, strict=True)):
            place = row * 5 + column
            distances.plot([place] * len(values), values, ".", color=colour, alpha=0.6, label=None if row else name)
            distances.plot([place - 0.3, place + 0.3], [values.mean()] * 2, color=colour, linewidth=2)
        bound = [1.5 * ring.distances["exact samples"].mean()] * 2
        words = None if row else "bound: 1.5 exact samples"
        distances.plot([row * 5 - 0.5, row * 5 + 3.5], bound, "--", color=figures.BROKEN, label=words)
    distances.set_yscale("log")
    distances.set_ylim(top=2.5)
    distances.set_xticks([1.5, 6.5], [f"alpha {value:g}" for value in rings])
    figures.label(distances, "One point a run, bars the means", "", "mode-weight TV to the target", ncols=2,
                  loc="upper center")  # fmt: skip
    estimates, exact, wrong = zip(*outcome.data["normalizers"], strict=True)
    span = [min(*exact, *estimates) - 0.3, max(*exact, *estimates) + 0.3]
    normalizers.plot(span, span, color=figures.EXACT, linewidth=1, label="exact")
    normalizers.plot(exact, estimates, "o", color=figures.GOOD, label="log E[W]")
    normalizers.plot(exact, wrong, "x", color=figures.BROKEN, label="control: wrong sign")
    figures.label(normalizers, "The normaliser, problems drawn and ring8", "closed form (nats)", "estimate (nats)")
    return picture


def _log_density(mixture: GaussianMixture, schedule: VPLinear, x: Tensor, t: Tensor) -> Tensor:
    """Return log p_t(x), written out so that it can be differentiated in t as well."""
    a, variance = schedule.alpha(t), schedule.sigma(t).square()
    covariance = a**2 * mixture.covariances + variance * torch.eye(mixture.dim, dtype=torch.float64)
    centred = x - a * mixture.means
    root = torch.linalg.cholesky(covariance)
    white = torch.linalg.solve_triangular(root, centred[..., None], upper=False)[..., 0]
    log_det = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    constant = mixture.dim / 2 * math.log(2 * math.pi)
    return (mixture.weights.log() - white.square().sum(-1) / 2 - log_det - constant).logsumexp(-1)


def _equation(settings: Settings) -> tuple[float, float]:
    """Return the worst relative residual of the equation of q_t, and with the sign of the spread flipped the least."""
    generator, schedule = settings.generator("feynman_kac.equation"), VPLinear()
    worst, least = 0.0, math.inf
    for strength in (0.7, 1.4):
        drawn = draw_space(generator, 3, strength)
        blend = drawn.blend(schedule)
        flipped = []
        for _ in range(settings.choose(6, 20)):
            t = uniform(generator, 0.05, 0.9)
            x = drawn.target.noised(schedule, t).sample(1, generator=generator)[0]
            spread = float(blend.evaluate(x[None], t).spread())
            terms = _terms(drawn, schedule, x, t)
            g2 = float(schedule.diffusion_sq(t))
            scale = sum(abs(term) for term in terms) + g2 / 2 * abs(spread)
            worst = max(worst, abs(sum(terms) + g2 / 2 * spread) / scale)
            flipped.append(abs(sum(terms) - g2 / 2 * spread) / scale)
        least = min(least, max(flipped))
    return worst, least


def _terms(drawn: Drawn, schedule: VPLinear, x: Tensor, t: Tensor) -> list[float]:
    """Return the terms of the equation without the spread, signed so that all of them add up to zero."""

    def log_q(point: Tensor, time: Tensor) -> Tensor:
        logs = [_log_density(member, schedule, point, time) for member in drawn.laws]
        return (drawn.coefficients * torch.stack(logs)).sum()

    point, time = x.clone().requires_grad_(), t.clone().requires_grad_()
    score, rate = torch.autograd.grad(log_q(point, time), (point, time))
    laplacian = float(torch.autograd.functional.hessian(lambda y: log_q(y, t), x).trace())
    f, g2 = float(schedule.drift_coef(t)), float(schedule.diffusion_sq(t))
    half = g2 / 2
    return [-float(rate), -f * len(x), -f * float(x @ score), half * laplacian, half * float(score.square().sum())]


def _discrete(settings: Settings) -> tuple[float, float]:
    """Return how far log W is from the log ratio of transition densities, relative to its size, and with 1/V."""
    generator, schedule = settings.generator("feynman_kac.discrete"), VPLinear()
    steps: list[Step] = [EulerMaruyama(), Ancestral(eta=0.8), ExponentialMultistep()]
    worst, least = 0.0, math.inf
    for step in steps:
        drawn = draw_space(generator, 3, float(uniform(generator, 0.5, 1.5)))
        grid = time_grid(schedule, 12, "log-snr")
        blend = drawn.blend(schedule)
        start = schedule.prior((16, 3), generator=generator, dtype=torch.float64)
        states = list(
            trajectory(BackwardSDE(schedule, blend), start, grid, noise=generator, step=step, correct="certify")
        )
        log_w = torch.zeros(16, dtype=torch.float64)
        old = None
        for move, before, after in zip(step.plan(schedule, grid), states, states[1:], strict=False):
            scores = torch.stack([member.noised(schedule, move.t).score(before.x) for member in drawn.laws])
            means = move.a * before.x + move.b * scores
            if old is not None:
                means = means + move.c * old
            old = move.p * before.x + move.q * scores
            if move.g:
                c = drawn.coefficients
                logs = -(after.x - means).square().sum(-1) / (2 * move.g**2)
                blended = -(after.x - torch.einsum("k,kbd->bd", c, means)).square().sum(-1) / (2 * move.g**2)
                log_w = log_w + c @ logs - blended
        final = states[-1].log_weights
        assert final is not None  # correct="certify"
        worst = max(worst, float((final - log_w).abs().max() / log_w.abs().max()))
        least = min(least, float((2 * final - log_w).abs().max() / log_w.abs().max()))
    return worst, least


def _line_normalizer(settings: Settings, i: int) -> tuple[float, float, float]:
    generator = settings.generator(f"feynman_kac.line.{i}")
    return _normalizer(draw_line(generator, (0.25, 0.6), float(uniform(generator, 0.8, 1.0))), generator)


def _normalizer(drawn: Drawn, generator: torch.Generator) -> tuple[float, float, float]:
    """Return log E[W], its closed form, and log E[1/W], the estimate with the wrong sign, by Euler-Maruyama."""
    schedule = VPLinear()
    sde, grid = BackwardSDE(schedule, drawn.blend(schedule)), time_grid(schedule, STEPS)
    log_w = torch.empty(0, dtype=torch.float64)
    for _ in range(BATCHES):
        start = schedule.prior((BATCH, drawn.problem.base.dim), generator=generator)
        more = solve(sde, start, grid, noise=generator, correct="certify").log_weights
        assert more is not None  # the run was certified
        log_w = torch.cat([log_w, more])
        weights = log_w.softmax(0)
        if float(weights.square().sum() - 1 / len(log_w)) < (NATS / 5) ** 2:
            break
    count = math.log(len(log_w))
    return float(log_w.logsumexp(0)) - count, drawn.log_normalizer, float((-log_w).logsumexp(0)) - count


def _ring(settings: Settings, alpha: float) -> _Ring:
    """Sample the ring plain, corrected and with the exact score, in independent runs of many samples each."""
    generator, schedule = settings.generator(f"feynman_kac.ring.{alpha}"), VPLinear()
    particles, step = settings.choose(400, 1600), ExponentialMultistep()
    drawn = Drawn(ring8().with_kl_weight(alpha), Preference({"right": 0.5, "up": 0.5}))
    # A second-order step on its own grid: what is left is the sampling, not the discretisation.
    grid, start = time_grid(schedule, RING_STEPS, "log-snr"), schedule.prior((RUNS * particles, 2), generator=generator)
    seed = int(torch.randint(2**31, (), generator=generator))
    groups = torch.arange(RUNS).repeat_interleave(particles)

    def run(score: ScoreFunction, x: Tensor, correct: Correction | None) -> Solution:
        noise = torch.Generator().manual_seed(seed)
        return solve(BackwardSDE(schedule, score), x, grid, noise=noise, step=step, correct=correct)

    # The bound is on the corrected runs: a quarter as many of the others will do.
    part, blend = start[: len(start) // 4], drawn.blend(schedule)
    plain = run(blend, part, Correction("certify"))
    corrected = run(blend, start, Correction("resample", generator=generator, groups=groups))
    exact_score = run(mixture_score(drawn.target, schedule), part, None)
    exact = drawn.target.sample(4 * RUNS * particles, generator=generator)
    assert plain.certificate is not None  # the run was certified
    found = {
        "plain": _modes(drawn.target, plain.samples, particles),
        "corrected": _modes(drawn.target, corrected.samples, particles, corrected.log_weights),
        "exact score": _modes(drawn.target, exact_score.samples, particles),
        "exact samples": _modes(drawn.target, exact, particles),
    }
    means, distances = ({name: pair[k] for name, pair in found.items()} for k in (0, 1))
    normalizer, ess = _normalizer(drawn, generator), plain.certificate.ess_fraction
    return _Ring(drawn.target.weights, means, distances, normalizer, ess, particles)


def _modes(
    target: GaussianMixture, x: Tensor, particles: int, log_weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return mean mode weights (K,), and each run's total variation distance to the target's (runs,)."""
    # Responsibilities, not nearest modes: their mean under the target is its weights exactly, and .2 % of a mode lies
    # nearer to its neighbours.
    share = target.responsibilities(x).reshape(-1, particles, target.components)
    weight = torch.ones(share.shape[:2], dtype=torch.float64)
    if log_weights is not None:
        weight = log_weights.reshape(-1, particles).exp()
    mean = torch.einsum("rpk,rp->rk", share, weight / weight.sum(1, keepdim=True))
    return mean.mean(0), (mean - target.weights).abs().sum(1) / 2
