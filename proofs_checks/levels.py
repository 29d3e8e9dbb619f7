"""The certificate at every noise level, and correction down to one.

On the line both chains are integrated on nodes, step by step: the blend's P_n, and the geometric mean Q_n of the
members' chains up to step n. The curve of one sampled run must be, at every n, log E[W_n] - E[log W_n] of these chains,
and lie above KL(P_n || Q_n). Weights gathered down to a level and then left alone make the law Q there, finished by the
blend's own remaining steps: its end is Q_n pushed through them.

Source: data processing; theory of the levels in ``sdeblend.certificate``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from proofs_checks.harness.chains import (
    divergence,
    line_chain,
    line_nodes,
    member_means,
    product_density,
    total_variation,
    transition,
)
from proofs_checks.harness.check import Figure, Measurement, Outcome, Settings
from proofs_checks.harness.draw import Drawn, draw_line, uniform
from sdeblend import BackwardSDE, Correction, EulerMaruyama, Preference, Solution, VPLinear, solve, time_grid
from toy.problems import line2

PLACE = 94
TITLE = "The certificate at every noise level"
WORDS = (
    "The weights that a run has gathered down to a noise level bound how far its law is from the members' product "
    "there. What remains of the run finishes both alike and cannot part them. So one run says, at every level and at "
    "no call, how near its samples are to that product finished by the blend: what is finer than the level does not "
    "count. Weights that stop at a level correct down to it and no further."
)
FORMULA = (
    r"$\mathrm{KL}(P_n \,\|\, q_n) \leq \log E[W_n] - E[\log W_n]\ \ \mathrm{for\ every}\ n,\qquad "
    r"q_n \propto \prod_i p_{i,n}^{c_i}$"
)
FALSIFIED_BY = (
    "a level at which the divergence, by quadrature, exceeds the curve of a sampled run, or the curve is not the "
    "divergence of the chains within five standard errors; samples, weighted down to a level, whose mean is not that "
    "of the product there, finished by the blend"
)

STEPS = 24
T_MIN = 0.04
# Levels with fewer nats are left out: quadrature is off by 2e-7 of them, which 100 000 samples tell from nothing there.
LEAST = 3e-4


def check(settings: Settings) -> Outcome:
    """Compare curves of sampled runs with chains by quadrature, and samples corrected down to a level with theirs."""
    lines = [_line(settings, i) for i in range(settings.choose(4, 12))]
    measurements = [
        Measurement(f"KL(P_n || Q_n) over the curve, worst level of {len(lines)} runs",
                    max(max(line.ratios) for line in lines), "<=", 1,
                    "weights of one step fewer", max(max(line.late) for line in lines)),
        Measurement("curve less the chains' divergence (std errors), worst level",
                    max(line.off for line in lines), "<=", 5,
                    "of one step fewer", min(line.off_late for line in lines)),
        Measurement("mean of samples weighted down to a level, less quadrature (std errors), worst",
                    max(line.part for line in lines), "<=", 5,
                    "weighted to the end, or not at all", min(max(line.to_the_end for line in lines),
                                                              max(line.plain for line in lines))),
    ]  # fmt: skip
    own = lines[0]
    findings = [
        "line2 at KL weight .25, noise level, nats there, TV of the product from the one at the end: "
        + "; ".join(f"{level:.2g}, {nats:.3f}, {apart:.3f}"
                    for level, nats, apart in list(zip(own.levels, own.curve, own.apart, strict=True))[-8::2])
    ]  # fmt: skip
    return Outcome(measurements, {"lines": lines}, findings)


def figure(outcome: Outcome) -> Figure:
    """The curves, what they bound, and how far the product at a level is from that at the end."""
    from proofs_checks.harness import figures

    lines = outcome.data["lines"]
    picture, (first, ratios, apart) = figures.panels(3)
    own = lines[0]
    told = [n for n, nats in enumerate(own.curve) if nats > LEAST / 10]  # below, quadrature draws its own error
    for values, colour, name in (
        (own.curve, figures.BLEND, "certificate at the level"),
        (own.divergences, figures.GOOD, "KL(P || product there)"),
    ):
        first.loglog([own.levels[n] for n in told], [values[n] for n in told], "o-", ms=3, color=colour, label=name)
    first.invert_xaxis()
    figures.label(first, "line2, KL weight .25", "noise level", "nats")
    for n, line in enumerate(lines):
        ratios.semilogx(line.seen, line.ratios, "o-", ms=3, color=figures.GOOD, label=None if n else "KL / certificate")
        words = None if n else "control: one step fewer"
        ratios.loglog(line.seen, line.late, "x", ms=4, color=figures.BROKEN, label=words)
        apart.loglog(line.levels, line.apart, color=figures.OTHER, label=None if n else "product here, at the end")
    ratios.axhline(1, color=figures.EXACT, lw=1)
    for axes in (ratios, apart):
        axes.invert_xaxis()
    for axes in (first, ratios):
        axes.set_xticks([1, 0.5, 0.2], ["1", "0.5", "0.2"])
        axes.minorticks_off()
    ratios.set_yticks([0.3, 0.5, 1, 2], ["0.3", "0.5", "1", "2"])
    figures.label(ratios, "Never above one", "noise level", "ratio")
    figures.label(apart, "What the level leaves out", "noise level", "TV between two products")
    return picture


class _Line(NamedTuple):
    """One problem: what is known at each level, by quadrature and from a sampled run."""

    levels: list[float]
    curve: list[float]
    divergences: list[float]
    apart: list[float]
    seen: list[float]
    ratios: list[float]
    late: list[float]
    off: float
    off_late: float
    part: float
    to_the_end: float
    plain: float


def _line(settings: Settings, i: int) -> _Line:
    """Follow a chain and sample it; the first is line2."""
    generator, schedule = settings.generator(f"levels.line.{i}"), VPLinear(t_min=T_MIN)
    drawn = Drawn(line2(0.25), Preference({"right": 0.5, "left": 0.5}))
    if i:
        drawn = draw_line(generator, (0.2, 0.5), float(uniform(generator, 0.8, 1.0)))
    grid = time_grid(schedule, STEPS, to_zero=False)
    moves, c = EulerMaruyama().plan(schedule, grid), drawn.coefficients
    nodes = line_nodes(moves)
    dx = float(nodes[1] - nodes[0])
    chain = list(line_chain(drawn.laws, c, schedule, moves, nodes))
    normal = [reached.geometric / (float(reached.geometric.sum()) * dx) for reached in chain]
    divergences = [divergence(reached.blended, q, dx) for reached, q in zip(chain, normal, strict=True)]
    paths = [reached.nats + math.log(float(reached.geometric.sum()) * dx) for reached in chain]
    count = settings.choose(20_000, 100_000)
    start = schedule.prior((count, 1), generator=generator, dtype=torch.float64)
    sde, seed = BackwardSDE(schedule, drawn.blend(schedule)), int(torch.randint(2**31, (), generator=generator))

    def run(correction: Correction) -> Solution:
        return solve(sde, start, grid, noise=torch.Generator().manual_seed(seed), correct=correction)

    whole = run(Correction())
    assert whole.certificate is not None  # it was certified
    curve = whole.certificate.curve
    nats, errors, levels = curve.nats.tolist(), curve.standard_error.tolist(), curve.level.tolist()
    told = [n for n in range(1, STEPS) if paths[n] > LEAST]
    # Down to the level where half of the nats are gathered.
    half = next(n for n in range(STEPS) if paths[n] > paths[-1] / 2)
    part = run(Correction(down_to=levels[half]))
    finished = normal[half]
    for move in moves[half + 1 :]:
        means = c @ member_means(drawn.laws, schedule, move, nodes)
        finished = transition(nodes, means, move.g**2) @ finished
    exact = float(finished @ nodes) * dx

    def away(log_weights: Tensor | None) -> float:
        assert log_weights is not None  # it was certified
        w, x = log_weights.softmax(0), part.samples[:, 0]
        mean = float(w @ x)
        return abs(mean - exact) / float((w * (x - mean)).norm())

    last = product_density(drawn.laws, c, schedule, chain[-1].t, nodes)
    return _Line(
        levels, nats, divergences,
        [total_variation(product_density(drawn.laws, c, schedule, r.t, nodes), last, dx) for r in chain],
        [levels[n] for n in told],
        [divergences[n] / nats[n] for n in told],
        [divergences[n] / nats[n - 1] for n in told],
        max(abs(nats[n] - paths[n]) / errors[n] for n in told),
        max(abs(nats[n - 1] - paths[n]) / errors[n] for n in told),
        away(part.log_weights), away(whole.log_weights), away(torch.zeros(count).double()),
    )  # fmt: skip
