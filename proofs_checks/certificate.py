"""The certificate: KL(law of the blend || target) <= log E[W] - E[log W], and what that number is exactly.

(1) On the line the law of the blend comes from the Fokker-Planck equation, with no sampler; its divergence from the
exact target must stay below the certificate of a sampled run, and its total variation below sqrt(certificate / 2).

(2) For a chain of few steps the certificate is the path-space divergence between the blended chain P and the
normalised geometric mean Q of the members' chains. Both are integrated on nodes: with the members' transition densities
R_i themselves, K = prod_i R_i^{c_i}, and beta_n(x) = int K(x', x) beta_{n+1}(x') dx' (beta = 1 at the end),

    KL(P || Q) = log int rho_0 beta_0 + sum_n int rho_n(x) R(x', x) log( R(x', x) / K(x', x) ) dx' dx.

Source: data processing and Jensen; theory of the certificate in ``sdeblend.correct``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from proofs_checks.harness.chains import divergence, line_chain, line_nodes
from proofs_checks.harness.check import Figure, Measurement, Outcome, Settings
from proofs_checks.harness.draw import draw_line, uniform
from sdeblend import Ancestral, BackwardSDE, Certificate, Solution, VPLinear, solve, time_grid
from toy.statements.fokker_planck import backward_density

PLACE = 90
TITLE = "The certificate: how wrong a blend can be, from its own paths"
WORDS = (
    "The weights that would correct a blend also say how much there is to correct. The logarithm of their mean less "
    "the mean of their logarithms bounds, in nats, the divergence of the blend's samples from the wanted target; no "
    "reward and no further model call is needed. On the line the true divergence is known from the Fokker-Planck "
    "equation. On a chain of a few steps the number is, exactly, the divergence between the blended chain and the "
    "geometric mean of its members."
)
FORMULA = (
    r"$\mathrm{KL}(\mathrm{blend} \,\|\, \mathrm{target}) \leq \log E[W] - E[\log W], \qquad "
    r"\mathrm{TV} \leq \sqrt{\mathrm{KL}/2}$"
)
FALSIFIED_BY = (
    "one problem whose divergence, from the Fokker-Planck equation, exceeds the certificate; a chain whose path-space "
    "divergence, by quadrature, is not the certificate within five standard errors"
)

STEPS = 200
CHAIN_STEPS = 8


def check(settings: Settings) -> Outcome:
    """Compare certificates with divergences from the Fokker-Planck equation, and with path divergences."""
    lines = [_line(settings, i) for i in range(settings.choose(6, 16))]
    paths = [_path(settings, i) for i in range(settings.choose(4, 12))]
    both: list[_Line | _Path] = [*lines, *paths]
    # A quarter: where the bound is loose by a factor of two, half of it would still hold.
    measurements = [
        Measurement(f"KL(blend || target) over certificate, worst of {len(lines)} problems",
                    max(line.divergence / line.certificate for line in lines), "<=", 1,
                    "a quarter of the spread", max(line.divergence / line.quartered for line in lines)),
        Measurement("TV(blend, target) over sqrt(certificate/2), worst",
                    max(line.variation / math.sqrt(line.certificate / 2) for line in lines), "<=", 1,
                    "without the root", max(line.variation / (line.certificate / 2) for line in lines)),
        Measurement(f"path KL by quadrature less certificate (std errors), {len(paths)} chains",
                    max(abs(path.sampled - path.path) / path.error for path in paths), "<=", 5,
                    "log E[W] dropped, or half the spread",
                    min(max(abs(path.sampled - path.without_normalizer) / path.error for path in paths),
                        max(abs(path.halved - path.path) / path.error for path in paths))),
        Measurement("KL of the chain's end over its path KL, worst", max(path.divergence / path.path for path in paths),
                    "<=", 1, "geometric mean not normalised",
                    max((path.divergence - path.log_normalizer) / path.path for path in paths)),
        Measurement("these KL less scipy's for the same densities, relative",
                    max(abs(law.divergence / law.again - 1) for law in both), "<=", 1e-3,
                    "taken the other way round", max(abs(law.reverse / law.again - 1) for law in both)),
    ]  # fmt: skip
    loose = [line.certificate / line.divergence for line in lines]
    ends = [path.path / path.divergence for path in paths]
    findings = [
        f"the certificate is {min(loose):.2f} to {max(loose):.2f} times the true divergence ({len(lines)} problems, "
        f"alpha .2 to 1, strength .6 to 1.2, divergences from {min(line.divergence for line in lines):.2g} to "
        f"{max(line.divergence for line in lines):.2g} nats)",
        f"on chains of {CHAIN_STEPS} steps the path divergence is {min(ends):.2f} to {max(ends):.2f} times "
        "that of the end",
    ]
    return Outcome(measurements, {"lines": lines, "paths": paths}, findings)


def figure(outcome: Outcome) -> Figure:
    """True divergence against certificate, total variation against its bound, and path divergences."""
    from proofs_checks.harness import figures

    lines, paths = outcome.data["lines"], outcome.data["paths"]
    picture, axes = figures.panels(3)
    certificates, quarters = [line.certificate for line in lines], [line.quartered for line in lines]
    divergences, variations = [line.divergence for line in lines], [line.variation for line in lines]
    roots, halves = [math.sqrt(c / 2) for c in certificates], [c / 2 for c in certificates]
    sampled = [path.sampled for path in paths]
    drawn, broken = ("drawn problems", "o", figures.BLEND), ("x", figures.BROKEN)
    panels = (
        ("Divergence, Fokker-Planck equation", "certificate (nats)", "KL(blend || target) (nats)",
         "never above: KL = certificate",
         ((certificates, divergences, *drawn), (quarters, divergences, "control: a quarter of the spread", *broken))),
        ("Total variation", "sqrt(certificate / 2)", "TV(blend, target)", "never above: TV = bound",
         ((roots, variations, *drawn), (halves, variations, "control: without the root", *broken))),
        (f"Chains of {CHAIN_STEPS} steps", "certificate (nats)", "divergence (nats)", "exact: path KL = certificate",
         ((sampled, [path.path for path in paths], "path KL, quadrature", "o", figures.GOOD),
          (sampled, [path.divergence for path in paths], "KL of the chain's end", "s", figures.BLEND),
          (sampled, [path.without_normalizer for path in paths], "control: log E[W] dropped", *broken))),
    )  # fmt: skip
    for ax, (title, x_label, y_label, diagonal, clouds) in zip(axes, panels, strict=True):
        for x, y, words, marker, colour in clouds:
            ax.loglog(x, y, marker, color=colour, label=words)
        everywhere = [value for x, *_ in clouds for value in x]
        ends = [min(everywhere) / 1.5, max(everywhere) * 1.5]
        ax.loglog(ends, ends, color=figures.EXACT, linewidth=1, label=diagonal)
        ax.tick_params(which="minor", labelbottom=False, labelleft=False)
        figures.label(ax, title, x_label, y_label)
    return picture


class _Line(NamedTuple):
    """A drawn problem on the line: divergences from the Fokker-Planck equation, and bounds from a sampled run."""

    divergence: float
    again: float
    reverse: float
    variation: float
    certificate: float
    quartered: float


def _line(settings: Settings, i: int) -> _Line:
    """Return the true divergence of a drawn problem, and its certificate, also from a quarter of the spread."""
    generator, schedule = settings.generator(f"certificate.line.{i}"), VPLinear()
    drawn = draw_line(generator, (0.2, 1.0), float(uniform(generator, 0.6, 1.2)))
    sde = BackwardSDE(schedule, drawn.blend(schedule))
    law, target = backward_density(sde), drawn.target
    start = schedule.prior((20_000, 1), generator=generator)
    certificate = _certificate(solve(sde, start, time_grid(schedule, STEPS), noise=generator, correct="certify"))
    again = _entropy(law.p, target.log_prob(law.x[:, None]).exp())
    return _Line(law.kl_to(target), again, law.kl_from(target), law.total_variation(target), certificate.value,
                 _part(certificate, 0.25))  # fmt: skip


class _Path(NamedTuple):
    """A short chain by quadrature (nats): path divergence, that of its end, the same without log E[W]; and sampled."""

    path: float
    divergence: float
    again: float
    reverse: float
    without_normalizer: float
    log_normalizer: float
    sampled: float
    halved: float
    error: float


def _path(settings: Settings, i: int) -> _Path:
    """Integrate the blended chain and the geometric mean of its members' chains, and sample the certificate."""
    generator, schedule = settings.generator(f"certificate.path.{i}"), VPLinear(t_min=0.05)
    drawn, step = draw_line(generator, (0.4, 0.8), float(uniform(generator, 0.7, 1.15))), Ancestral()
    grid = time_grid(schedule, CHAIN_STEPS, "log-snr", to_zero=False)
    moves = step.plan(schedule, grid)
    nodes = line_nodes(moves)
    dx = float(nodes[1] - nodes[0])
    *_, (_, blended, geometric, spread) = line_chain(drawn.laws, drawn.coefficients, schedule, moves, nodes)
    normalizer = float(geometric.sum()) * dx
    start = schedule.prior((settings.choose(100_000, 400_000), 1), generator=generator, dtype=torch.float64)
    sde, mean = BackwardSDE(schedule, drawn.blend(schedule)), geometric / normalizer
    certificate = _certificate(solve(sde, start, grid, noise=generator, step=step, correct="certify"))
    return _Path(spread + math.log(normalizer), divergence(blended, mean, dx), _entropy(blended, mean),
                 divergence(mean, blended, dx), spread, math.log(normalizer), certificate.value,
                 _part(certificate, 0.5), certificate.standard_error)  # fmt: skip


def _certificate(run: Solution) -> Certificate:
    assert run.certificate is not None  # the run was certified
    return run.certificate


def _part(certificate: Certificate, share: float) -> float:
    """Return the certificate that this share of the spread would give."""
    log_w = -share * certificate.per_sample
    return float(log_w.logsumexp(0)) - math.log(len(log_w)) - float(log_w.mean())


def _entropy(p: Tensor, q: Tensor) -> float:
    """Return KL(p || q) by scipy, which knows which way round it is."""
    from scipy.stats import entropy

    held = (p > 1e-200) & (q > 1e-200)
    return float(entropy(p[held].numpy(), q[held].numpy()))
