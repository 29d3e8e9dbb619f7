"""Tuned members: a network tuned for a reward at a KL weight is the tilt at that KL weight."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from proofs_checks.harness.check import Figure, Measurement, Outcome, Settings
from proofs_checks.harness.draw import draw_line
from sdeblend import BackwardSDE, VPLinear, solve, time_grid
from sdeblend.finetune.trainers.regression import RegressionSettings, RewardRegression
from sdeblend.reward import WeightedReward
from sdeblend.steps import ExponentialMultistep
from toy import GaussianMixture, Problem
from toy.metrics import mode_weight_tv
from toy.networks.network import Network, for_mixture, pretrain
from toy.networks.tunable import ExactEps, MixtureTunable, TunedScore, reward_of
from toy.statements.recovery import recovered

PLACE = 120
TITLE = "Members: a tuned network is the tilt at the KL weight that was asked for"
WORDS = (
    "Weights and strength mean something exact only if each member is the pre-trained law times exp(reward / alpha) "
    "at the stated alpha. Here a small network is fitted to the score of a drawn mixture, then tuned, by a low-rank "
    "difference, from nothing but its own samples and their rewards. What it has learned is laid against the exact "
    "control of the tilt: the slope is the strength it has reached, one if alpha is the alpha that was asked for. "
    "Left: what it samples. Right: what it has learned at one noise level, and what it learns at twice the KL weight, "
    "which is about half of it."
)
FORMULA = (
    r"$S_\theta - S_{\mathrm{pre}} \approx \kappa\, u_t,\qquad \kappa = "
    r"\langle S_\theta - S_{\mathrm{pre}},\, u\rangle\,/\,\langle u,\, u\rangle = 1$"
)
FALSIFIED_BY = (
    "a slope further than 0.2 from 1, a learned control whose square error is above 0.2 of the exact control's square, "
    "or mode weights off by more than 0.08 in total variation"
)
# Twice what benchmarks.members asks of every trainer: tunings of seconds, on problems that nobody has looked at.
SLOPE_BOUND, RESIDUAL_BOUND, TV_BOUND = 0.2, 0.2, 0.08
ITERATIONS, STEPS, SAMPLES = 35, 30, 4000
# Of the figure.
LOG_SNR = 0.0
# Of every trainer; it comes with the repository, not with the package.
RECORD = Path(__file__).parents[1] / "benchmarks" / "results" / "members.md"


def check(settings: Settings) -> Outcome:
    """Tune members of drawn problems at the stated KL weight, and at twice that, which must not pass."""
    generator = settings.generator("members")
    rows: list[tuple[float, ...]] = []
    data: dict[str, object] = {}
    for i in range(settings.choose(1, 3)):
        problem = draw_line(generator, (0.75, 1.5), 1.0).problem
        name, schedule = problem.names[i % 2], VPLinear()
        network = for_mixture(problem.base, schedule, seed=0, width=64)
        exact = ExactEps(problem.base, schedule)
        pretrain(network, problem.base, steps=800, batch=256, learning_rate=5e-3, teacher=exact)
        member, wrong = (_tuned(network, problem, name, factor * problem.kl_weight) for factor in (1, 2))
        target = problem.member(name)
        found, false = (recovered(model, target, count=SAMPLES) for model in (member, wrong))
        other = recovered(member, problem.member(problem.names[(i + 1) % 2]), count=SAMPLES)
        samples = [_sample(member, base=base) for base in (False, True)]
        tvs = [float(mode_weight_tv(drawn, target).value) for drawn in samples]
        off = abs(found.slope - 1), abs(false.slope - 1)
        rows.append((*off, found.residual, other.residual, *tvs, found.slope, false.slope, found.base_residual))
        if not data:
            x = torch.linspace(-4.0, 4.0, 321, dtype=torch.float64)[:, None]
            data = {
                "x": x[:, 0].numpy(), "samples": samples[0][:, 0].numpy(),
                "exact": target.log_prob(x).exp().numpy(), "base": problem.base.log_prob(x).exp().numpy(),
                "kl_weight": problem.kl_weight, "controls": _controls(member, wrong, target, x),
            }  # fmt: skip
    off_right, off_wrong, residual, of_other, tv, base_tv, slopes, wrong_slopes, own = zip(*rows, strict=True)
    measurements = [
        Measurement("strength reached (slope of the learned control), distance from 1", max(off_right), "<=",
                    SLOPE_BOUND, "tuned at twice the KL weight", min(off_wrong)),
        Measurement("square error of the learned control, share of the exact one's square", max(residual), "<=",
                    RESIDUAL_BOUND, "held against the other reward's member", min(of_other)),
        Measurement("mode weights of its samples, total variation", max(tv), "<=", TV_BOUND,
                    "samples of the base", min(base_tv)),
    ]  # fmt: skip
    listed = ", ".join(f"{a:.2f} (twice the KL weight: {b:.2f})" for a, b in zip(slopes, wrong_slopes, strict=True))
    findings = [
        f"strengths reached: {listed}",
        f"square error of the network before tuning, in the same units: {max(own):.4f}; of the tuning: "
        f"{max(residual):.3f}",
    ]
    return Outcome(measurements, data, findings)


def recorded() -> tuple[str, list[str], list[list[str]]] | None:
    """Return words, headings and rows of the benchmark's table of all trainers, None where it is not at hand."""
    if not RECORD.exists():
        return None
    lines = RECORD.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line[1:-1].split("|")])
    words = "Not of this run: every trainer on nine pairs of reward and KL weight, each entry the range over the nine."
    return f"{words} {next(line for line in lines if line.startswith('Measured'))}", rows[0], rows[2:]


def _tuned(network: Network, problem: Problem, name: str, kl_weight: float) -> MixtureTunable:
    """Return a member tuned from a network, with the average of its parameters over the last steps."""
    model = MixtureTunable(problem.base, network.schedule, deepcopy(network))
    settings = RegressionSettings(
        kl_weight=kl_weight, group_size=192, steps=STEPS, learning_rate=5e-3, epochs=4, ema_decay=0.96
    )
    trainer = RewardRegression(model, WeightedReward({name: reward_of(problem.rewards[name])}), settings)
    for _ in range(ITERATIONS):
        trainer.iterate()
    trainer.set_parameters(trainer.average or trainer.parameters)
    return model


def _controls(member: MixtureTunable, wrong: MixtureTunable, target: GaussianMixture, x: Tensor) -> list[np.ndarray]:
    """Return the exact control at the figure's noise level, and the two learned ones, at x (n, 1)."""
    schedule = member.schedule
    t = schedule.time_of_log_snr(LOG_SNR)
    exact = target.noised(schedule, t).score(x) - member.mixture.noised(schedule, t).score(x)
    learned = [TunedScore(model)(x, t) - TunedScore(model, base=True)(x, t) for model in (member, wrong)]
    return [control[:, 0].numpy() for control in (exact, *learned)]


def _sample(model: MixtureTunable, *, base: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    start = model.schedule.prior((SAMPLES, 1), generator=generator)
    run = solve(
        BackwardSDE(model.schedule, TunedScore(model, base=base)), start, time_grid(model.schedule, 40, "log-snr"),
        noise=generator, step=ExponentialMultistep(),
    )  # fmt: skip
    return run.samples.double()


def figure(outcome: Outcome) -> Figure:
    """Draw what one member samples beside base and tilt, and its control beside the exact one."""
    from proofs_checks.harness import figures

    data = outcome.data
    picture, (left, right) = figures.panels(2)
    left.hist(data["samples"], bins=80, density=True, color=figures.LIGHT, label="tuned, samples")
    left.plot(data["x"], data["base"], color=figures.BASE, ls="--", label="base")
    left.plot(data["x"], data["exact"], color=figures.EXACT, label="tilt, exact")
    styles = ((figures.EXACT, "-", "exact"), (figures.BLEND, "--", "learned"),
              (figures.BROKEN, ":", "learned at twice the KL weight"))  # fmt: skip
    for control, (colour, line, words) in zip(data["controls"], styles, strict=True):
        right.plot(data["x"], control, color=colour, ls=line, label=words)
    figures.label(left, f"One member, alpha = {data['kl_weight']:.2f}", "x", "density", ncols=3, **figures.BELOW)
    figures.label(right, "What it learned, at log-SNR 0", "noisy state x", "control u", ncols=3, **figures.BELOW)
    return picture
