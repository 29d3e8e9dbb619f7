"""Chains computed without the library's steps: transition means and variances straight from the papers' formulas."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdeblend import NoiseSchedule

Score = Callable[[Tensor, float], Tensor]
KINDS = ("euler-maruyama", "ddim-ancestral", "dpm-2m-sde")


@dataclass
class Chain:
    """A sampler's Markov (or two-step) chain for one score.

    Attributes:
        kind: of ``KINDS``.
        schedule, grid: as in a run.
        score: (x, t) -> score.
    """

    kind: str
    schedule: NoiseSchedule
    grid: Sequence[float]
    score: Score

    def _constants(self, n: int) -> tuple[float, float, float, float]:
        t, s = self.grid[n], self.grid[n + 1]
        at, a = (float(self.schedule.alpha(u)) for u in (t, s))
        st, sd = (float(self.schedule.sigma(u)) for u in (t, s))
        return at, st, a, sd

    def denoised(self, x: Tensor, n: int) -> Tensor:
        at, st, _, _ = self._constants(n)
        return (x + st**2 * self.score(x, self.grid[n])) / at

    def variance(self, n: int) -> float:
        """Return the variance V of step n."""
        t, s = self.grid[n], self.grid[n + 1]
        at, st, a, sd = self._constants(n)
        if self.kind == "euler-maruyama":
            return (t - s) * float(self.schedule.diffusion_sq(t))
        if self.kind == "ddim-ancestral":
            return (sd / st) ** 2 * (st**2 - (at / a) ** 2 * sd**2)
        h = math.log(a / sd) - math.log(at / st)
        return sd**2 * (1 - math.exp(-2 * h))

    def mean(self, history: Sequence[Tensor]) -> Tensor:
        """Return the transition mean of the step after the states ``history`` (the start first)."""
        n, x = len(history) - 1, history[-1]
        t, s = self.grid[n], self.grid[n + 1]
        at, st, a, sd = self._constants(n)
        d = self.denoised(x, n)
        if self.kind == "euler-maruyama":
            f, g2 = float(self.schedule.drift_coef(t)), float(self.schedule.diffusion_sq(t))
            return x - (t - s) * (f * x - g2 * self.score(x, t))
        if self.kind == "ddim-ancestral":
            eps = (x - at * d) / st
            return a * d + math.sqrt(max(sd**2 - self.variance(n), 0.0)) * eps
        h = math.log(a / sd) - math.log(at / st)
        if n:
            at0, st0, _, _ = self._constants(n - 1)
            r = (math.log(at / st) - math.log(at0 / st0)) / h
            d = d + (d - self.denoised(history[-2], n - 1)) / (2 * r)
        return sd / st * math.exp(-h) * x + a * (1 - math.exp(-2 * h)) * d


def log_increments(chains: Sequence[Chain], c: Sequence[float], states: Sequence[Tensor]) -> list[Tensor]:
    """Return what each step adds to log W: -(sum c |m_i|^2 - |sum c m_i|^2) / (2 V), (B,) each."""
    out = []
    for n in range(len(states) - 1):
        means = [chain.mean(states[: n + 1]).flatten(1) for chain in chains]
        blended = torch.stack([w * m for w, m in zip(c, means, strict=True)]).sum(0)
        squares = torch.stack([w * m.square().sum(1) for w, m in zip(c, means, strict=True)]).sum(0)
        out.append(-(squares - blended.square().sum(1)) / (2 * chains[0].variance(n)))
    return out


def quadratic_form(chain: Chain, prior_variance: float) -> tuple[Tensor, Tensor, float]:
    """Return the path law of a chain with a linear score on the line, as -x'Px/2 + q.x + constant.

    Returns:
        P (n + 1, n + 1), q (n + 1,), constant, of the path (start, ..., end).
    """
    steps = len(chain.grid) - 1
    precision = torch.zeros(steps + 1, steps + 1, dtype=torch.float64)
    info, constant = torch.zeros(steps + 1, dtype=torch.float64), -math.log(2 * math.pi * prior_variance) / 2
    precision[0, 0] = 1 / prior_variance
    for n in range(steps):
        # The mean is affine in the states so far: probe it with the unit paths and with zero.
        probes = torch.cat([torch.eye(n + 1, dtype=torch.float64), torch.zeros(1, n + 1, dtype=torch.float64)])
        values = chain.mean([probes[:, k : k + 1] for k in range(n + 1)])[:, 0]
        offset, variance = float(values[-1]), chain.variance(n)
        row = torch.zeros(steps + 1, dtype=torch.float64)
        row[: n + 1], row[n + 1] = offset - values[:-1], 1.0
        precision += torch.outer(row, row) / variance
        info += row * offset / variance
        constant -= offset**2 / (2 * variance) + math.log(2 * math.pi * variance) / 2
    return precision, info, constant


def log_mass(form: tuple[Tensor, Tensor, float]) -> float:
    """Return the logarithm of the integral of exp(-x'Px/2 + q.x + constant)."""
    precision, info, constant = form
    quadratic = float(info @ torch.linalg.solve(precision, info))
    return constant + quadratic / 2 + (len(info) * math.log(2 * math.pi) - float(torch.logdet(precision))) / 2


def gaussian_kl(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor]) -> float:
    """Return KL(one || two) of Gaussians given as (mean, covariance)."""
    (m1, c1), (m2, c2) = one, two
    inverse, gap = torch.linalg.inv(c2), m2 - m1
    trace = float(torch.trace(inverse @ c1)) + float(gap @ inverse @ gap) - len(m1)
    return (trace + float(torch.logdet(c2) - torch.logdet(c1))) / 2


def moments(form: tuple[Tensor, Tensor, float]) -> tuple[Tensor, Tensor]:
    """Return mean and covariance of the normalised form."""
    covariance = torch.linalg.inv(form[0])
    return covariance @ form[1], covariance
