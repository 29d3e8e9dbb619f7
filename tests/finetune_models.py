"""Models small enough that the best policy of a family is known to rounding: N(mean, variance) with affine control.

The control is h(t) (shift + slope x) in units of eps, with the h of the exact control for a linear reward. A chain
of affine Gaussian steps is Gaussian, so E[r] - kl_weight KL is a closed form of (shift, slope) for quadratic r.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdeblend import VPLinear
from sdeblend.finetune.chain import Chain
from sdeblend.finetune.reward import WeightedReward
from sdeblend.finetune.state import safetensors_bytes
from sdeblend.io import write_atomically


class Prompts:
    """A condition that is its text."""

    def __init__(self, prompts: tuple[str, ...]) -> None:
        self.prompts = prompts

    def rows(self, index: Tensor) -> Prompts:
        return Prompts(tuple(self.prompts[i] for i in index.tolist()))


class Line:
    """A Gaussian in ``dim`` independent dimensions; its trainable part is an affine control, zero at first."""

    prediction = "eps"

    def __init__(self, mean: float = 0.0, variance: float = 1.0, dim: int = 1, prompts: tuple[str, ...] = ()) -> None:
        self.schedule = VPLinear()
        self.event = (dim,)
        self.device = torch.device("cpu")
        self.center, self.variance, self.prompts = mean, variance, prompts
        self.shift = torch.nn.Parameter(torch.zeros(dim))
        self.slope = torch.nn.Parameter(torch.zeros(dim))
        self.calls = 0

    def base(self, x: Tensor, t: Tensor, condition: Any) -> Tensor:
        a, s = self.schedule.alpha(t).to(x), self.schedule.sigma(t).to(x)
        return (s / (a**2 * self.variance + s**2))[:, None] * (x - a[:, None] * self.center)

    def strength(self, t: Tensor) -> Tensor:
        a, s = self.schedule.alpha(t), self.schedule.sigma(t)
        return -s * a / (a**2 * self.variance + s**2)

    def tuned(self, x: Tensor, t: Tensor, condition: Any) -> Tensor:
        self.calls += len(x)
        return self.base(x, t, condition) + self.strength(t).to(x)[:, None] * (self.shift + self.slope * x)

    def trainable(self) -> Mapping[str, torch.nn.Parameter]:
        return {"shift": self.shift, "slope": self.slope}

    def conditions(self, groups: int, size: int, generator: torch.Generator) -> Prompts | None:
        if not self.prompts:
            return None
        drawn = torch.randint(len(self.prompts), (groups,), generator=generator).tolist()
        return Prompts(tuple(self.prompts[i] for i in drawn for _ in range(size)))

    def decode(self, x: Tensor) -> Tensor:
        return x

    def save(self, path: Path, metadata: Mapping[str, str]) -> Path:
        write_atomically(path, safetensors_bytes(self.trainable(), metadata))
        return path

    def identity(self) -> str:
        return f"line {self.center} {self.variance} {self.event}"


def quadratic(b: float = 1.0, q: float = 0.0, **prompts: float) -> WeightedReward:
    """Return r(x) = sum_i b x_i - q x_i^2 / 2, plus a constant a prompt."""

    def reward(x: Tensor, condition: Prompts | None) -> Tensor:
        value = (b * x - q * x.square() / 2).flatten(1).sum(1)
        if condition is None:
            return value
        return value + torch.tensor([prompts[p] for p in condition.prompts])

    return WeightedReward({"r": reward})


def objective(model: Line, chain: Chain, shift: Tensor, slope: Tensor, b: float, q: float) -> tuple[Tensor, ...]:
    """Return E[r] and KL to the base of one dimension under a control, and mean and variance at 0; exact."""
    m, v = torch.zeros((), dtype=torch.float64), torch.tensor(model.schedule.prior_std() ** 2, dtype=torch.float64)
    kl = torch.zeros((), dtype=torch.float64)
    for k in range(len(chain)):
        t = chain.grid[k]
        a, s, h = model.schedule.alpha(t), model.schedule.sigma(t), model.strength(t)
        rate = s / (a**2 * model.variance + s**2)
        if k < chain.noisy:
            second = (shift + slope * m) ** 2 + slope**2 * v
            kl = kl + (chain.q[k] / chain.g[k] * h) ** 2 * second / 2
        gain = chain.p[k] + chain.q[k] * (rate + h * slope)
        m = gain * m + chain.q[k] * (h * shift - rate * a * model.center)
        v = gain**2 * v + chain.g[k] ** 2
    return b * m - q * (m**2 + v) / 2, kl, m, v


def best(model: Line, chain: Chain, kl_weight: float, b: float, q: float, *, dropped: bool = False) -> Tensor:
    """Return the (shift, slope) where the gradient of E[r] - kl_weight KL vanishes, (2,).

    Args:
        model: base.
        chain: steps.
        kl_weight: alpha.
        b, q: the reward.
        dropped: leave out what the KL's gradient owes to where the policy leads, as most code does.
    """
    theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    for _ in range(20000):
        reward, kl, *_ = objective(model, chain, *theta, b, q)
        gradient = torch.autograd.grad(reward, theta, retain_graph=True)[0]
        if dropped:
            gradient = gradient - kl_weight * partial_kl(model, chain, theta)
        else:
            gradient = gradient - kl_weight * torch.autograd.grad(kl, theta)[0]
        with torch.no_grad():
            theta += 0.1 / kl_weight * gradient
        if float(gradient.abs().max()) < 1e-9:
            break
    return theta.detach()


def partial_kl(model: Line, chain: Chain, theta: Tensor) -> Tensor:
    """Return the gradient of the KL with the law of the states held fixed, (2,)."""
    frozen, total = theta.detach(), torch.zeros((), dtype=torch.float64)
    m, v = torch.zeros((), dtype=torch.float64), torch.tensor(model.schedule.prior_std() ** 2, dtype=torch.float64)
    for k in range(chain.noisy):
        t = chain.grid[k]
        a, s, h = model.schedule.alpha(t), model.schedule.sigma(t), model.strength(t)
        rate = s / (a**2 * model.variance + s**2)
        total = total + (chain.q[k] / chain.g[k] * h) ** 2 * ((theta[0] + theta[1] * m) ** 2 + theta[1] ** 2 * v) / 2
        gain = chain.p[k] + chain.q[k] * (rate + h * frozen[1])
        m = gain * m + chain.q[k] * (h * frozen[0] - rate * a * model.center)
        v = gain**2 * v + chain.g[k] ** 2
    return torch.autograd.grad(total, theta)[0]
