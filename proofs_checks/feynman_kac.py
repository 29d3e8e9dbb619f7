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
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from proofs_checks.harness.check import Measurement, Outcome, Settings
from proofs_checks.harness.draw import Drawn, draw_line, draw_space, uniform
from sdeblend import (
    Ancestral,
    BackwardSDE,
    Correction,
    EulerMaruyama,
    ExponentialMultistep,
    Preference,
    ScoreFunction,
    Solution,
    Step,
    VPLinear,
    solve,
    time_grid,
    trajectory,
)
from toy import GaussianMixture
from toy.problems import ring8
from toy.scores.stack import mixture_score

if TYPE_CHECKING:
    from proofs_checks.harness.figures import Figure

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
RUNS = 64
KL_WEIGHTS = (0.25, 0.1)


@dataclass(frozen=True)
class _Ring:
    """Mode weights on the ring: distances to the target (runs,) each, and mean mode weights."""

    target: Tensor
    plain: Tensor
    corrected: Tensor
    exact_score: Tensor
    floor: Tensor
    mean_plain: Tensor
    mean_corrected: Tensor
    normalizer: tuple[float, float, float]
    ess: float
    particles: int


def check(settings: Settings) -> Outcome:
    """Check the equation of the weights, their discrete form, their mean, and what they make of the ring."""
    residual, residual_control = _equation(settings)
    discrete, discrete_control = _discrete(settings)
    lines = [_line_normalizer(settings, i) for i in range(settings.choose(3, 8))]
    rings = {alpha: _ring(settings, alpha) for alpha in KL_WEIGHTS}
    normalizers = lines + [ring.normalizer for ring in rings.values()]
    miss = max(abs(value - exact) for value, exact, _ in normalizers)
    wrong = min(abs(flipped - exact) for _, exact, flipped in normalizers)
    measurements = [
        Measurement(
            "equation of q_t: residual (relative), strengths .7 and 1.4",
            residual,
            "<=",
            1e-10,
            "sign of the spread",
            residual_control,
        ),
        Measurement(
            "log W less log of the density ratio (relative), 3 solvers",
            discrete,
            "<=",
            1e-9,
            "1/V for 1/(2V)",
            discrete_control,
        ),
        Measurement(
            f"log E[W] less its closed form (nats), {len(normalizers)} problems",
            miss,
            "<=",
            0.05,
            "sign of the weight",
            wrong,
        ),
    ]
    findings = []
    for alpha, ring in rings.items():
        floor = float(ring.floor.mean())
        measurements.append(
            Measurement(
                f"ring8, alpha {alpha:g}: mode-weight TV, corrected over exact samples",
                float(ring.corrected.mean()) / floor,
                "<=",
                1.5,
                "no weights",
                float(ring.plain.mean()) / floor,
            )
        )
        findings.append(
            f"ring8, alpha {alpha:g}, {ring.particles} samples, {RING_STEPS} steps, mean of {RUNS} runs: "
            f"mode-weight TV {float(ring.plain.mean()):.4f} plain, {float(ring.corrected.mean()):.4f} corrected, "
            f"{floor:.4f} exact samples, {float(ring.exact_score.mean()):.4f} exact score on the same grid and noise; "
            f"log E[W] {ring.normalizer[0]:.3f} ({ring.normalizer[1]:.3f} exact); effective samples {ring.ess:.0%}"
        )
    data = {
        "modes": {
            alpha: {
                "target": ring.target.numpy(),
                "plain": ring.mean_plain.numpy(),
                "corrected": ring.mean_corrected.numpy(),
            }
            for alpha, ring in rings.items()
        },
        "distances": {
            alpha: {
                "plain": ring.plain.numpy(),
                "corrected": ring.corrected.numpy(),
                "exact score": ring.exact_score.numpy(),
                "exact samples": ring.floor.numpy(),
            }
            for alpha, ring in rings.items()
        },
        "normalizers": normalizers,
    }
    return Outcome(measurements, data, findings)


def figure(outcome: Outcome) -> Figure:
    """Mode weights on the ring, their distances to the target run by run, and log E[W] against its closed form."""
    from proofs_checks.harness import figures

    fig, (modes, distances, normalizers) = figures.panels(3)
    alpha = max(outcome.data["modes"])
    law = outcome.data["modes"][alpha]
    places = torch.arange(len(law["target"])).double().numpy()
    modes.bar(places - 0.2, law["plain"], 0.4, color=figures.BLEND, label="blend, plain")
    modes.bar(places + 0.2, law["corrected"], 0.4, color=figures.GOOD, label="blend, corrected")
    modes.scatter(
        places, law["target"], marker="_", s=400, linewidths=2, color=figures.EXACT, label="exact target", zorder=3
    )
    figures.label(modes, f"ring8, alpha {alpha:g}", "mode", "probability")
    colours = {
        "plain": figures.BLEND,
        "corrected": figures.GOOD,
        "exact score": figures.OTHER,
        "exact samples": figures.EXACT,
    }
    for row, table in enumerate(outcome.data["distances"].values()):
        for column, (name, values) in enumerate(table.items()):
            distances.plot(
                [row * 5 + column] * len(values),
                values,
                ".",
                color=colours[name],
                alpha=0.6,
                label=name if row == 0 else None,
            )
            distances.plot(
                [row * 5 + column - 0.3, row * 5 + column + 0.3], [values.mean()] * 2, color=colours[name], linewidth=2
            )
        bound = 1.5 * table["exact samples"].mean()
        distances.plot(
            [row * 5 - 0.5, row * 5 + 3.5],
            [bound] * 2,
            "--",
            color=figures.BROKEN,
            label=None if row else "bound: 1.5 exact samples",
        )
    distances.set_yscale("log")
    distances.set_ylim(top=2.5)
    distances.set_xticks([1.5, 6.5], [f"alpha {value:g}" for value in outcome.data["distances"]])
    figures.label(
        distances, "One point a run, bars the means", "", "mode-weight TV to the target", ncols=2, loc="upper center"
    )
    values, exact, wrong = zip(*outcome.data["normalizers"], strict=True)
    span = [min(*exact, *values) - 0.3, max(*exact, *values) + 0.3]
    normalizers.plot(span, span, color=figures.EXACT, linewidth=1, label="exact")
    normalizers.plot(exact, values, "o", color=figures.GOOD, label="log E[W]")
    normalizers.plot(exact, wrong, "x", color=figures.BROKEN, label="control: wrong sign")
    figures.label(normalizers, "The normaliser, problems drawn and ring8", "closed form (nats)", "estimate (nats)")
    return fig


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
    return [
        -float(rate),
        -f * len(x),
        -f * float(x @ score),
        g2 / 2 * laplacian,
        g2 / 2 * float(score.square().sum()),
    ]


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
    start = schedule.prior((20_000, drawn.problem.base.dim), generator=generator)
    sde = BackwardSDE(schedule, drawn.blend(schedule))
    log_w = solve(sde, start, time_grid(schedule, STEPS), noise=generator, correct="certify").log_weights
    assert log_w is not None  # the run was certified
    count = math.log(len(log_w))
    return float(log_w.logsumexp(0)) - count, drawn.log_normalizer, float((-log_w).logsumexp(0)) - count


def _ring(settings: Settings, alpha: float) -> _Ring:
    """Sample the ring plain, corrected and with the exact score, in independent runs of PARTICLES samples."""
    generator, schedule = settings.generator(f"feynman_kac.ring.{alpha}"), VPLinear()
    particles, step = settings.choose(1024, 4096), ExponentialMultistep()
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
    mean_plain, plain_tv = _modes(drawn.target, plain.samples, particles)
    mean_corrected, corrected_tv = _modes(drawn.target, corrected.samples, particles, corrected.log_weights)
    return _Ring(
        target=drawn.target.weights,
        plain=plain_tv,
        corrected=corrected_tv,
        mean_plain=mean_plain,
        mean_corrected=mean_corrected,
        exact_score=_modes(drawn.target, exact_score.samples, particles)[1],
        floor=_modes(drawn.target, exact, particles)[1],
        normalizer=_normalizer(drawn, generator),
        ess=plain.certificate.ess_fraction,
        particles=particles,
    )


def _modes(
    target: GaussianMixture, x: Tensor, particles: int, log_weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return mean mode weights (K,), and each run's total variation distance to the target's (runs,)."""
    # Responsibilities, not nearest modes: their mean under the target is its weights exactly, and .2 % of a mode lies
    # nearer to its neighbours.
    share = target.responsibilities(x).reshape(-1, particles, target.components)
    weight = (
        torch.ones(share.shape[:2], dtype=torch.float64)
        if log_weights is None
        else log_weights.reshape(-1, particles).exp()
    )
    mean = torch.einsum("rpk,rp->rk", share, weight / weight.sum(1, keepdim=True))
    return mean.mean(0), (mean - target.weights).abs().sum(1) / 2
