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
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from proofs_checks.harness.chains import line_nodes, log_transition, member_means, normal_density
from proofs_checks.harness.check import Measurement, Outcome, Settings
from proofs_checks.harness.draw import draw_line, uniform
from sdeblend import Ancestral, BackwardSDE, VPLinear, solve, time_grid
from toy.statements.fokker_planck import backward_density

if TYPE_CHECKING:
    from proofs_checks.harness.figures import Axes, Figure

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

    def worst(what: str, bound: str) -> float:
        return max(getattr(line, what) / getattr(line, bound) for line in lines)

    loose = [line.certificate / line.divergence for line in lines]
    ends = [path.path / path.end for path in paths]
    measurements = [
        Measurement(
            f"KL(blend || target) over certificate, worst of {len(lines)} problems",
            worst("divergence", "certificate"),
            "<=",
            1,
            "half the spread",
            worst("divergence", "halved"),
        ),
        Measurement(
            "TV(blend, target) over sqrt(certificate/2), worst",
            worst("variation", "pinsker"),
            "<=",
            1,
            "without the root",
            max(line.variation / (line.certificate / 2) for line in lines),
        ),
        Measurement(
            f"path KL by quadrature less certificate (std errors), {len(paths)} chains",
            max(abs(path.sampled - path.path) / path.error for path in paths),
            "<=",
            5,
            "log E[W] dropped",
            max(abs(path.sampled - path.without_normalizer) / path.error for path in paths),
        ),
        Measurement(
            "KL of the chain's end over its path KL, worst",
            max(path.end / path.path for path in paths),
            "<=",
            1,
            "half the path KL",
            max(2 * path.end / path.path for path in paths),
        ),
    ]
    findings = [
        f"the certificate is {min(loose):.2f} to {max(loose):.2f} times the true divergence ({len(lines)} problems, "
        f"alpha .2 to 1, strength .6 to 1.2, divergences from {min(line.divergence for line in lines):.2g} to "
        f"{max(line.divergence for line in lines):.2g} nats)",
        f"on chains of {CHAIN_STEPS} steps the path divergence is {min(ends):.2f} to {max(ends):.2f} times "
        "that of the end",
    ]
    data = {
        "lines": [tuple(line) for line in lines],
        "paths": [tuple(path) for path in paths],
    }
    return Outcome(measurements, data, findings)


def figure(outcome: Outcome) -> Figure:
    """True divergence against certificate, total variation against its bound, and path divergences."""
    from proofs_checks.harness import figures

    fig, (left, middle, right) = figures.panels(3)
    lines = [_Line(*row) for row in outcome.data["lines"]]
    paths = [_Path(*row) for row in outcome.data["paths"]]
    _against(
        left,
        [line.certificate for line in lines],
        [line.divergence for line in lines],
        "drawn problems",
        figures.BLEND,
        "o",
    )
    _against(
        left,
        [line.halved for line in lines],
        [line.divergence for line in lines],
        "control: half the spread",
        figures.BROKEN,
        "x",
    )
    _diagonal(
        left, [line.certificate for line in lines] + [line.halved for line in lines], "never above: KL = certificate"
    )
    figures.label(left, "Divergence, Fokker-Planck equation", "certificate (nats)", "KL(blend || target) (nats)")
    _against(
        middle,
        [line.pinsker for line in lines],
        [line.variation for line in lines],
        "drawn problems",
        figures.BLEND,
        "o",
    )
    _against(
        middle,
        [line.certificate / 2 for line in lines],
        [line.variation for line in lines],
        "control: without the root",
        figures.BROKEN,
        "x",
    )
    _diagonal(
        middle, [line.pinsker for line in lines] + [line.certificate / 2 for line in lines], "never above: TV = bound"
    )
    figures.label(middle, "Total variation", "sqrt(certificate / 2)", "TV(blend, target)")
    _against(
        right, [path.sampled for path in paths], [path.path for path in paths], "path KL, quadrature", figures.GOOD, "o"
    )
    _against(
        right,
        [path.sampled for path in paths],
        [path.end for path in paths],
        "KL of the chain's end",
        figures.BLEND,
        "s",
    )
    _against(
        right,
        [path.sampled for path in paths],
        [path.without_normalizer for path in paths],
        "control: log E[W] dropped",
        figures.BROKEN,
        "x",
    )
    _diagonal(right, [path.sampled for path in paths], "exact: path KL = certificate")
    figures.label(right, f"Chains of {CHAIN_STEPS} steps", "certificate (nats)", "divergence (nats)")
    return fig


def _against(ax: Axes, x: list[float], y: list[float], text: str, colour: str, marker: str) -> None:
    ax.loglog(x, y, marker, color=colour, label=text)


def _diagonal(ax: Axes, x: list[float], text: str) -> None:
    ends = [min(x) / 1.5, max(x) * 1.5]
    ax.loglog(ends, ends, color="black", linewidth=1, label=text)
    ax.tick_params(which="minor", labelbottom=False, labelleft=False)


class _Line(NamedTuple):
    """A drawn problem on the line: divergences from the Fokker-Planck equation, and bounds from a sampled run."""

    divergence: float
    variation: float
    certificate: float
    halved: float

    @property
    def pinsker(self) -> float:
        """Bound on the total variation."""
        return math.sqrt(max(self.certificate, 0.0) / 2)


def _line(settings: Settings, i: int) -> _Line:
    """Return the true divergence of a drawn problem, and its certificate, also from half the spread."""
    generator, schedule = settings.generator(f"certificate.line.{i}"), VPLinear()
    drawn = draw_line(generator, (0.2, 1.0), float(uniform(generator, 0.6, 1.2)))
    sde = BackwardSDE(schedule, drawn.blend(schedule))
    law = backward_density(sde)
    start = schedule.prior((20_000, 1), generator=generator)
    certificate = solve(sde, start, time_grid(schedule, STEPS), noise=generator, correct="certify").certificate
    assert certificate is not None  # the run was certified
    half = -certificate.per_sample / 2
    halved = float(half.logsumexp(0)) - math.log(len(half)) - float(half.mean())
    return _Line(law.kl_to(drawn.target), law.total_variation(drawn.target), certificate.value, halved)


class _Path(NamedTuple):
    """A short chain by quadrature (nats): path divergence, that of its end, the same without log E[W]; and sampled."""

    path: float
    end: float
    without_normalizer: float
    sampled: float
    error: float


def _path(settings: Settings, i: int) -> _Path:
    """Integrate the blended chain and the geometric mean of its members' chains, and sample the certificate."""
    generator, schedule = settings.generator(f"certificate.path.{i}"), VPLinear(t_min=0.05)
    drawn, step = draw_line(generator, (0.4, 0.8), float(uniform(generator, 0.7, 1.15))), Ancestral()
    grid = time_grid(schedule, CHAIN_STEPS, "log-snr", to_zero=False)
    moves = step.plan(schedule, grid)
    nodes = line_nodes(moves)
    dx, blended, geometric = float(nodes[1] - nodes[0]), normal_density(nodes), normal_density(nodes)
    spread = 0.0
    for move in moves:
        means = member_means(drawn.laws, schedule, move, nodes)
        log_k = torch.einsum("k,kij->ij", drawn.coefficients, log_transition(nodes, means, move.g**2))
        log_r = log_transition(nodes, drawn.coefficients @ means, move.g**2)
        moved = log_r.exp() * blended * dx
        spread += float((moved * (log_r - log_k)).sum()) * dx
        blended, geometric = moved.sum(1), log_k.exp() @ geometric * dx
    normalizer = float(geometric.sum()) * dx
    start = schedule.prior((settings.choose(100_000, 400_000), 1), generator=generator, dtype=torch.float64)
    sde = BackwardSDE(schedule, drawn.blend(schedule))
    certificate = solve(sde, start, grid, noise=generator, step=step, correct="certify").certificate
    assert certificate is not None  # the run was certified
    end = _divergence(blended, geometric / normalizer, dx)
    return _Path(spread + math.log(normalizer), end, spread, certificate.value, certificate.standard_error)


def _divergence(p: Tensor, q: Tensor, dx: float) -> float:
    """Return KL(p || q) of two densities on nodes of spacing dx, where both are above 1e-200."""
    held = (p > 1e-200) & (q > 1e-200)
    return float((p[held] * (p[held] / q[held]).log()).sum()) * dx
