"""Correctors: Langevin moves at one noise level leave the members' product as it is, and the certificate stands.

Everything but sampled certificates is integrated on nodes. A move is a Gaussian transition, so that the law after it,
and that of a whole chain of steps and moves, are products of matrices with a density.

(1) From q_t ~ prod_i p_{i,t}^{c_i}, moves of one total size lead away by O(d). (2) Noise added to q_s does not give q_t
for a blend, so re-noising is no move. (3) prod_i R_i^{c_i} followed by moves ends in q; the blend followed by moves
does not. (4) The certificate of a run with moves is log E[W] - E[log W] of that chain, and its divergence is below it.

Source: theory of correctors in ``sdeblend.corrector``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from proofs_checks.harness.chains import (
    REACH,
    Reached,
    divergence,
    line_chain,
    product_density,
    total_variation,
    transition,
)
from proofs_checks.harness.check import Figure, Measurement, Outcome, Settings, slope
from proofs_checks.harness.draw import Drawn, draw_line, uniform
from sdeblend import BackwardSDE, Corrector, EulerMaruyama, Preference, VPLinear, solve, time_grid
from toy.problems import line2

PLACE = 92
TITLE = "Correctors: moves that leave the members' product as it is"
WORDS = (
    "The blend's score is, exactly, the score of the members' product at each noise level. So a run may stop at one "
    "and move along that score with fresh noise: a law that is right stays right, up to the size of the move, and one "
    "that is not comes nearer. Moves alone do not carry mass between modes that have parted; together with the weights "
    "they reach the target, and the certificate of a run with moves bounds what is left. Adding noise and removing it "
    "again is not the same: noise added to a product of densities is not the product of noisy ones."
)
FORMULA = (
    r"$x' = x + d\,\bar S_t(x) + \sqrt{2d}\,z,\quad d = \kappa\sigma_t^2: \qquad "
    r"q_t \propto \prod_i p_{i,t}^{c_i}\ \mathrm{stays,\ up\ to}\ O(\kappa)$"
)
FALSIFIED_BY = (
    "moves of one total size whose bias does not fall with the size of each; a chain of weights and moves that ends "
    "more than .02 from the product in total variation; a certificate that is not the divergence of its chain within "
    "five standard errors, or is below the divergence of its end"
)

KAPPAS = (0.2, 0.1, 0.05, 0.025)
TOTAL = 2.0  # of kappa times the number of moves
STEPS, MOVES, KAPPA = 120, 1, 0.2
T_MIN = 0.02


def check(settings: Settings) -> Outcome:
    """Follow densities through moves, and through chains of steps and moves, with weights and without."""
    still = [_still(settings, i) for i in range(settings.choose(4, 12))]
    chains = [_chain(_line2(), settings, None)]
    chains += [_chain(None, settings, i) for i in range(settings.choose(2, 8))]
    far = chains[0]
    measurements = [
        Measurement(f"bias of moves from q as a power of their size, least of {len(still)} laws",
                    min(slope(KAPPAS, law.biases) for law in still), ">=", 0.8,
                    "another preference's score", max(slope(KAPPAS, law.wrong) for law in still)),
        Measurement(f"TV to q after {round(TOTAL / KAPPAS[-1])} moves of size {KAPPAS[-1]} from it, worst",
                    max(law.biases[-1] for law in still), "<=", 0.01,
                    "noise added to an earlier q, line2", _still(settings, None).renoised),
        Measurement(f"TV(weights and moves, q) at the end, worst of {len(chains)} chains",
                    max(chain.weighted for chain in chains), "<=", 0.02, "moves alone, line2", far.alone),
        Measurement("certificate of the run with moves less its chain's divergence (std errors)",
                    max(abs(chain.sampled - chain.path) / chain.error for chain in chains), "<=", 5,
                    "the chain without moves", max(abs(c.sampled - c.unmoved) / c.error for c in chains)),
        Measurement("KL(end of the run with moves || q) over its certificate, worst",
                    max(chain.divergence / chain.sampled for chain in chains), "<=", 1,
                    "a quarter of -E[log W]", max(chain.divergence / chain.quartered for chain in chains)),
    ]  # fmt: skip
    findings = [
        f"line2 at KL weight .25: TV to q is {far.plain:.3f} for the blend, {far.alone:.3f} with a move of {KAPPA} "
        f"after each of {STEPS} steps, {far.weighted:.3f} with moves and weights; the certificate falls from "
        f"{far.unmoved:.3f} to {far.path:.3f} nats",
    ]
    return Outcome(measurements, {"still": still, "chains": chains}, findings)


def figure(outcome: Outcome) -> Figure:
    """The bias of moves over their size, the ends of chains, and certificates with and without moves."""
    from proofs_checks.harness import figures

    still, chains = outcome.data["still"], outcome.data["chains"]
    picture, (bias, ends, nats) = figures.panels(3)
    for n, law in enumerate(still):
        bias.loglog(KAPPAS, law.biases, "o-", color=figures.GOOD, label=None if n else "moves by the blend's score")
        bias.loglog(KAPPAS, law.wrong, "x-", color=figures.BROKEN, label=None if n else "control: another preference")
        if not law.single:
            label = "re-noising" if n == 0 else None
            bias.loglog(KAPPAS[-1:], [law.renoised], "s", color=figures.BASE, label=label)
    figures.label(bias, f"From q, moves of total size {TOTAL:g}", "size of a move", "TV to q")
    bias.set_xticks(KAPPAS, [f"{kappa:g}" for kappa in KAPPAS])
    bias.minorticks_off()
    places = list(range(len(chains)))
    for name, colour in (("plain", figures.BLEND), ("alone", figures.BROKEN), ("weighted", figures.GOOD)):
        words = {"plain": "blend", "alone": "blend and moves", "weighted": "weights and moves"}[name]
        ends.semilogy(places, [getattr(chain, name) for chain in chains], "o", color=colour, label=words)
    figures.label(ends, f"Chains of {STEPS} steps, line2 first", "chain", "TV to q at the end")
    for name, colour in (("unmoved", figures.BLEND), ("path", figures.GOOD), ("divergence", figures.OTHER)):
        words = {"unmoved": "certificate without moves", "path": "with moves", "divergence": "KL with moves"}[name]
        nats.semilogy(places, [getattr(chain, name) for chain in chains], "o", color=colour, label=words)
    figures.label(nats, "What the certificate says", "chain", "nats")
    for axes in (ends, nats):
        axes.set_xticks(places)
    return picture


class _Still(NamedTuple):
    """TV to q_t: from it by moves of each size, by those along another preference's score, and of q_s re-noised."""

    biases: list[float]
    wrong: list[float]
    renoised: float
    single: bool


def _still(settings: Settings, i: int | None) -> _Still:
    """Move q_t of a blend, or for every second draw the tilt of a single member, at a time that is drawn."""
    generator, schedule = settings.generator(f"corrector.still.{i}"), VPLinear()
    drawn, single = (_line2(), False) if i is None else (draw_line(generator, (0.25, 0.5)), i % 2 == 1)
    preference = Preference({"right": 1.0, "left": 0.0}) if single else drawn.preference
    drawn = Drawn(drawn.problem, preference)
    other = Drawn(drawn.problem, Preference({"right": 0.75, "left": 0.25} if single else {"right": 0.9, "left": 0.1}))
    t = uniform(generator, 0.1, 0.25)
    variance = float(schedule.sigma(t).square())
    nodes = _nodes(math.sqrt(2 * KAPPAS[-1] * variance))
    dx = float(nodes[1] - nodes[0])
    q = product_density(drawn.laws, drawn.coefficients, schedule, t, nodes)

    def moved(problem: Drawn, kappa: float) -> float:
        d, score = kappa * variance, problem.blend(schedule)(nodes[:, None], t)[:, 0]
        kernel, law = transition(nodes, nodes + d * score, 2 * d), q
        for _ in range(round(TOTAL / kappa)):
            law = kernel @ law
        return total_variation(law, q, dx)

    # Re-noising: the product at an earlier level s, with the noise that leads from s to t.
    s = t / 4
    ratio = float(schedule.alpha(t) / schedule.alpha(s))
    added = variance - ratio**2 * float(schedule.sigma(s).square())
    earlier = product_density(drawn.laws, drawn.coefficients, schedule, s, nodes)
    renoised = total_variation(transition(nodes, ratio * nodes, added) @ earlier, q, dx)
    return _Still([moved(drawn, k) for k in KAPPAS], [moved(other, k) for k in KAPPAS], renoised, single)


class _Chain(NamedTuple):
    """TV to q at the end (blend, with moves, with moves and weights), divergences in nats, and a sampled run."""

    plain: float
    alone: float
    weighted: float
    unmoved: float
    path: float
    divergence: float
    sampled: float
    quartered: float
    error: float


def _line2() -> Drawn:
    return Drawn(line2(0.25), Preference({"right": 0.5, "left": 0.5}))


def _chain(drawn: Drawn | None, settings: Settings, i: int | None) -> _Chain:
    """Follow a chain with moves and without, and sample it with the library's corrector."""
    generator, schedule = settings.generator(f"corrector.chain.{i}"), VPLinear(t_min=T_MIN)
    drawn = drawn or draw_line(generator, (0.25, 0.6), float(uniform(generator, 0.8, 1.0)))
    grid = time_grid(schedule, STEPS, to_zero=False)
    moves, c = EulerMaruyama().plan(schedule, grid), drawn.coefficients
    least = math.sqrt(2 * KAPPA) * float(schedule.sigma(schedule.t_min))
    nodes = _nodes(min(least, *(move.g for move in moves)))
    dx = float(nodes[1] - nodes[0])

    def end(count: int) -> Reached:
        *_, last = line_chain(drawn.laws, c, schedule, moves, nodes, KAPPA, count)
        return last

    still, moved = end(0), end(MOVES)
    q = product_density(drawn.laws, c, schedule, moved.t, nodes)
    mass = [float(reached.geometric.sum()) * dx for reached in (still, moved)]
    start = schedule.prior((settings.choose(20_000, 100_000), 1), generator=generator, dtype=torch.float64)
    run = solve(BackwardSDE(schedule, drawn.blend(schedule)), start, grid, noise=generator, correct="certify",
                corrector=Corrector(MOVES, KAPPA))  # fmt: skip
    assert run.certificate is not None  # it was certified
    quarter = -0.25 * run.certificate.per_sample
    return _Chain(
        plain=total_variation(still.blended, q, dx),
        alone=total_variation(moved.blended, q, dx),
        weighted=total_variation(moved.geometric / mass[1], q, dx),
        unmoved=still.nats + math.log(mass[0]),
        path=moved.nats + math.log(mass[1]),
        divergence=divergence(moved.blended, moved.geometric / mass[1], dx),
        sampled=run.certificate.value,
        quartered=float(quarter.exp().mean().log()) - float(quarter.mean()),
        error=run.certificate.standard_error,
    )


def _nodes(spacing: float) -> Tensor:
    """Return nodes that are dense enough for a transition of this standard deviation."""
    half = math.ceil(REACH / spacing)
    return torch.linspace(-REACH, REACH, 2 * half + 1, dtype=torch.float64)
