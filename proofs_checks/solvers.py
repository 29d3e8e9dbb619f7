"""The coupling of solvers: the same backward SDE by our steps and by torchsde's, which share no code.

Three couplings. (1) Euler on one path: torchsde's Brownian increments drive our Euler-Maruyama step, and both agree to
rounding at every sample. (2) SRK, of strong order 1.5, on one path: our Euler-Maruyama comes closer to it at its
declared strong order, one. (3) Independent noise, many samples: moments agree within their standard errors.

With an exact score whatever is left is discretisation, and can look like an error of the blend. For data N(0, 1) the
score is linear, so the end is linear in start and noise: their responses, one row each, give the law exactly.

Source: Li et al. 2001.01328 (torchsde); Roessler 2010 (SRK); Kloeden and Platen 1992 for the orders.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from proofs_checks.harness.check import Figure, Measurement, Outcome, Settings, slope
from proofs_checks.harness.draw import draw_line, draw_space
from sdeblend import BackwardSDE, NoiseSchedule, RectifiedFlow, ReplayNoise, ScoreFunction, VPLinear, solve, time_grid
from sdeblend.grid import Spacing
from sdeblend.steps import STEPS, Step
from sdeblend.torchsde_bridge import TorchSDE, solve_torchsde
from toy import GaussianMixture
from toy.scores.stack import mixture_score

PLACE = 100
TITLE = "The coupling of solvers: our steps and torchsde's"
WORDS = (
    "Two solvers that share no code and are given the same equation must give the same law; on the same Brownian path "
    "they must give the same samples, up to what their orders of convergence say. What remains with an exact score is "
    "the step's own error, and every experiment must be read beside it: too few steps can look like a wrong blend."
)
FORMULA = (
    r"$x_s = x_t - h (f x_t - g^2 \bar S_t(x_t)) + g\,(w_t - w_s), \qquad "
    r"|x^{\mathrm{Euler}}_n - x^{\mathrm{SRK}}| = O(1/n)$"
)
FALSIFIED_BY = (
    "an Euler path of ours that leaves torchsde's by more than rounding; a distance to SRK on the same path that does "
    "not shrink like 1/n; a moment that differs by more than five standard errors"
)

OFF = 1.05
GRIDS = (30, 60, 120, 240)
KEPT_STEPS = (25, 50, 100)


def check(settings: Settings) -> Outcome:
    """Couple our steps with torchsde's, and list each step's own error with an exact score."""
    path, path_off = _euler_path(settings)
    errors, errors_off = _strong(settings)
    z, z_off, names = _law(settings)
    off = f"score {OFF - 1:.0%} off"
    measurements = [
        Measurement("Euler on one path: largest difference of samples (units of x)", path, "<=", 1e-9, off, path_off),
        Measurement("SRK on one path: |order - 1| of the median distance, 4 grids", abs(slope(GRIDS, errors) + 1), "<=",
                    0.15, off, abs(slope(GRIDS, errors_off) + 1)),
        Measurement("independent noise: largest difference of moments (std errors)", max(map(abs, z)), "<=", 5,
                    off, max(map(abs, z_off))),
    ]  # fmt: skip
    kept, flow = _kept_by_all()
    findings = [
        f"with the exact score of N(0, 1) at {', '.join(map(str, KEPT_STEPS))} steps, VP-linear, {name} on a "
        f"{_spacing(STEPS[name]())} grid keeps {_percent(row)} % of the variance"
        for name, row in kept.items()
    ]
    findings.append(f"the same for rectified flow and DDIM eta=1 on a uniform grid: {_percent(flow)} %")
    data = {"errors": errors, "errors_off": errors_off, "moments": names, "z": z, "z_off": z_off, "kept": kept}
    return Outcome(measurements, data, findings)


def figure(outcome: Outcome) -> Figure:
    """Distance to SRK on one path, moments on independent noise, and each step's own error."""
    from proofs_checks.harness import figures

    data = outcome.data
    picture, (left, middle, right) = figures.panels(3)
    broken = "control: score 5% off"
    left.loglog(GRIDS, data["errors"], "o-", color=figures.BLEND, label="our Euler-Maruyama")
    left.loglog(GRIDS, data["errors_off"], "x--", color=figures.BROKEN, label=broken)
    guide = [data["errors"][0] * GRIDS[0] / n for n in GRIDS]
    left.loglog(GRIDS, guide, ":", color=figures.EXACT, label="slope -1")
    figures.ticks(left, GRIDS)
    figures.label(left, "One Brownian path", "steps n", "median distance to SRK (units of x)")
    places = list(range(len(data["z"])))
    middle.axhspan(-5, 5, color=figures.GOOD, alpha=0.15, label="bound")
    middle.axhline(0, color=figures.EXACT, linewidth=1)
    middle.plot(places, data["z"], "o", color=figures.BLEND, label="ours less torchsde's")
    middle.plot(places, data["z_off"], "x", color=figures.BROKEN, label=broken)
    middle.set_xticks(places, data["moments"], rotation=30)
    reach = 1.7 * max(map(abs, data["z"] + data["z_off"]))
    middle.set_ylim(-reach, reach)
    figures.label(middle, "Independent noise", "moment", "difference (standard errors)", loc="upper right")
    colours = (figures.BLEND, figures.OTHER, figures.GOOD, figures.PINK, figures.LIGHT)
    for (name, row), colour, marker in zip(data["kept"].items(), colours, "o^sDv", strict=True):
        right.semilogx(KEPT_STEPS, [100 * value for value in row], marker=marker, color=colour, label=name)
    right.axhline(100, color=figures.EXACT, linewidth=1, label="exact")
    figures.ticks(right, KEPT_STEPS)
    figures.label(right, "Exact score of N(0, 1), VP-linear", "steps", "variance kept (%)")
    return picture


def _percent(row: list[float]) -> str:
    return " / ".join(f"{100 * value:.1f}" for value in row)


def _scaled(score: ScoreFunction) -> ScoreFunction:
    return lambda x, t: OFF * score(x, t)


class _SharedPath:
    """Our noise source on torchsde's Brownian path: z = (w(end) - w(start)) / sqrt(h) in its time start - t."""

    def __init__(self, path: Any, start: float) -> None:
        self.path, self.start = path, start

    def __call__(self, n: int, t: Tensor, s: Tensor, like: Tensor) -> Tensor:
        begin, end = self.start - float(t), self.start - float(s)
        return self.path(begin, end) / math.sqrt(end - begin)


def _brownian(x: Tensor, length: float, seed: int, area: str = "none") -> Any:
    import torchsde

    return torchsde.BrownianInterval(
        t0=0.0, t1=length, size=tuple(x.shape), dtype=x.dtype, entropy=seed, levy_area_approximation=area
    )


def _euler_path(settings: Settings) -> tuple[float, float]:
    """Return the largest difference to torchsde's Euler on its own Brownian path, and with a score 5 % off."""
    # Times that are exact in binary: where the clocks round apart by eps, a Brownian path differs by sqrt(eps).
    n = 64
    generator, schedule = settings.generator("solvers.path"), VPLinear(t_min=1 / n)
    blend = draw_space(generator, 2, 1.2).blend(schedule)
    start = schedule.prior((64, 2), generator=generator, dtype=torch.float64)
    grid, seed = torch.arange(n, -1, -1, dtype=torch.float64) / n, int(torch.randint(2**31, (), generator=generator))
    theirs = solve_torchsde(BackwardSDE(schedule, blend), start, grid, seed=seed)

    def ours(score: ScoreFunction) -> Tensor:
        # The same entropy and the same questions in the same order give the same path.
        noise = _SharedPath(_brownian(start, float(grid[0] - grid[-2]), seed), float(grid[0]))
        return solve(BackwardSDE(schedule, score), start, grid, noise=noise).samples

    return float((ours(blend) - theirs).abs().max()), float((ours(_scaled(blend)) - theirs).abs().max())


def _strong(settings: Settings) -> tuple[list[float], list[float]]:
    """Return the median distance of our Euler-Maruyama to a fine SRK run on one path, at each grid; and 5 % off."""
    import torchsde

    # Times that are exact in binary, as in _euler_path.
    generator, schedule, fine = settings.generator("solvers.strong"), VPLinear(t_min=1 / 16), GRIDS[-1]
    blend = draw_space(generator, 2, 1.0).blend(schedule)
    start = schedule.prior((settings.choose(400, 1000), 2), generator=generator, dtype=torch.float64)
    length = 1 - schedule.t_min
    path = _brownian(start, length, int(torch.randint(2**31, (), generator=generator)), "space-time")
    problem = TorchSDE(BackwardSDE(schedule, blend), schedule.t_max, (2,))
    with torch.no_grad():
        ends = torch.tensor([0.0, length], dtype=torch.float64)
        exact = torchsde.sdeint(problem, start, ends, bm=path, method="srk", dt=length / fine)[-1]
    increments = torch.stack([path(k * length / fine, (k + 1) * length / fine) for k in range(fine)])

    def distance(score: ScoreFunction, n: int) -> float:
        grid = 1 - torch.arange(n + 1, dtype=torch.float64) * (length / n)
        noise = ReplayNoise(list(increments.unflatten(0, (n, fine // n)).sum(1) / math.sqrt(length / n)))
        mine = solve(BackwardSDE(schedule, score), start, grid, noise=noise).samples
        # Not the mean: the few paths on a watershed, which end in different modes, would be all of it.
        return float((mine - exact).norm(dim=1).median())

    return [distance(blend, n) for n in GRIDS], [distance(_scaled(blend), n) for n in GRIDS]


def _law(settings: Settings) -> tuple[list[float], list[float], list[str]]:
    """Return differences of moments in standard errors, ours less torchsde's Euler, also with a score 5 % off."""
    generator, schedule = settings.generator("solvers.law"), VPLinear()
    drawn = draw_line(generator, (0.4, 1.0))
    blend, target = drawn.blend(schedule), drawn.target
    batch, grid = settings.choose(80_000, 160_000), time_grid(schedule, 100)
    names, functions = _moments(target)

    def moments(samples: Tensor) -> tuple[Tensor, Tensor]:
        values = functions(samples.double())
        return values.mean(1), values.var(1) / batch

    def prior() -> Tensor:
        return schedule.prior((batch, 1), generator=generator)

    seed = int(torch.randint(2**31, (), generator=generator))
    mine = moments(solve(BackwardSDE(schedule, blend), prior(), grid, noise=generator).samples)
    rows = []
    for score in (blend, _scaled(blend)):
        theirs = moments(solve_torchsde(BackwardSDE(schedule, score), prior(), grid, seed=seed))
        rows.append(((mine[0] - theirs[0]) / (mine[1] + theirs[1]).sqrt()).tolist())
    return rows[0], rows[1], names


def _moments(target: GaussianMixture) -> tuple[list[str], Callable[[Tensor], Tensor]]:
    """Return names, and a function from samples (B, 1) to values (moments, B)."""
    modes = [f"mode {k + 1}" for k in range(target.components - 1)]

    def functions(x: Tensor) -> Tensor:
        return torch.cat([x.T, x.T.square(), target.log_prob(x)[None], target.responsibilities(x).T[:-1]])

    return ["x", "x^2", "log p(x)", *modes], functions


def _spacing(step: Step) -> Spacing:
    return "log-snr" if step.multistep else "uniform"


@cache
def _kept_by_all() -> tuple[dict[str, list[float]], list[float]]:
    """Return ``_kept`` of every step for VP-linear, and of DDIM for rectified flow: nothing in it is drawn."""
    kept = {name: _kept(step(), VPLinear(), _spacing(step())) for name, step in STEPS.items()}
    return kept, _kept(STEPS["ddim-ancestral"](), RectifiedFlow(), "uniform")


def _kept(step: Step, schedule: NoiseSchedule, spacing: Spacing) -> list[float]:
    """Return the share of the variance of N(0, 1) that a step keeps with the exact score, at KEPT_STEPS."""
    score = mixture_score(GaussianMixture([1.0], [[0.0]], [1.0]), schedule)
    out = []
    for n in KEPT_STEPS:
        # Row 0 responds to the start, row j to the noise of step j: the score is linear, so variances add.
        rows = torch.eye(n + 1, dtype=torch.float64)[..., None]
        start = rows[0] * schedule.prior_std()
        noise, grid = ReplayNoise(list(rows[1:])), time_grid(schedule, n, spacing)
        end = solve(BackwardSDE(schedule, score), start, grid, noise=noise, step=step).samples
        out.append(float(end.square().sum()))
    return out
