"""Models small enough that the best policy of a family is known to rounding: N(mean, variance) with affine control.

The control is h(t) (shift + slope x) in units of eps, with the h of the exact control for a linear reward. A chain
of affine Gaussian steps is Gaussian, so E[r] - kl_weight KL is a closed form of (shift, slope) for quadratic r.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdeblend import VPLinear
from sdeblend.finetune.model import ModelSettings
from sdeblend.finetune.state import safetensors_bytes
from sdeblend.finetune.trainers.policy import KL, StepWeights
from sdeblend.parametrisation import conversion
from sdeblend.reward import Reward, WeightedReward
from sdeblend.shell.files import write_atomically
from sdeblend.steps import Ancestral


class Prompts:
    """A condition that is its text."""

    def __init__(self, prompts: tuple[str, ...]) -> None:
        self.prompts = prompts

    def rows(self, index: Tensor) -> Prompts:
        return Prompts(tuple(self.prompts[i] for i in index.tolist()))


class Line:
    """A Gaussian in ``dim`` independent dimensions; its trainable part is an affine control, zero at first."""

    prediction = "eps"
    guidance = 1.0
    graded_batch = None

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
        return value + torch.tensor([prompts.get(p, 0.0) for p in condition.prompts])

    return WeightedReward({"r": reward})


class Chain:
    """The ancestral chain on a grid: x_{k+1} = P x_k + Q out(x_k) + G z, float64 (n,) each; the last G is 0."""

    def __init__(self, model: Line, grid: Tensor) -> None:
        a, b, self.g = torch.tensor(
            [(move.a, move.b, move.g) for move in Ancestral().plan(model.schedule, grid)], dtype=torch.float64
        ).T
        p, q = conversion(model.schedule, grid[:-1], "eps", "score")
        self.grid, self.p, self.q = grid, a + b * p, b * q

    def mean(self, x: Tensor, prediction: Tensor, k: Tensor) -> Tensor:
        """Return the mean of steps k from states and predictions (B, d)."""
        return self.p[k, None].to(x) * x + self.q[k, None].to(x) * prediction


def cost_of(model: Line, chain: Chain, kl: KL) -> Tensor:
    """Return the KL of each of the n steps over |eps - eps_base|^2, (n,)."""
    cost = StepWeights.of(model, chain.grid, kl).cost
    return torch.nn.functional.pad(cost, (0, len(chain.p) - len(cost)))


def objective(
    model: Line, chain: Chain, cost: Tensor, theta: Tensor, b: float, q: float, led: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return E[r] and KL to the base of one dimension under a control, and the mean at 0; exact, differentiable.

    Args:
        model, chain: base and steps.
        cost: from ``cost_of``.
        theta: (shift, slope).
        b, q: the reward.
        led: the control that leads the states, ``theta`` by default; with another, held fixed, the KL's gradient
            lacks the part that most code drops.
    """
    led = theta if led is None else led
    m, v = torch.zeros((), dtype=torch.float64), torch.tensor(model.schedule.prior_std() ** 2, dtype=torch.float64)
    kl = torch.zeros((), dtype=torch.float64)
    times = chain.grid[:-1]
    alpha, sigma, h = model.schedule.alpha(times), model.schedule.sigma(times), model.strength(times)
    rate = sigma / (alpha**2 * model.variance + sigma**2)
    gains = chain.p + chain.q * (rate + h * led[1])
    pushes = chain.q * (h * led[0] - rate * alpha * model.center)
    for gain, push, noise, price in zip(gains, pushes, chain.g**2, cost * h**2, strict=True):
        kl = kl + price * ((theta[0] + theta[1] * m) ** 2 + theta[1] ** 2 * v)
        m, v = gain * m + push, gain**2 * v + noise
    return b * m - q * (m**2 + v) / 2, kl, m


def gradient_of(model: Line, chain: Chain, kl: KL, theta: Tensor, kl_weight: float, b: float, q: float, *,
                dropped: bool = False) -> Tensor:
    """Return the gradient of E[r] - kl_weight KL in (shift, slope), exact; ``dropped``: as most code has it."""
    theta = theta.detach().double().requires_grad_()
    cost = cost_of(model, chain, kl)
    reward = objective(model, chain, cost, theta, b, q)[0]
    nats = objective(model, chain, cost, theta, b, q, theta.detach() if dropped else None)[1]
    return torch.autograd.grad(reward - kl_weight * nats, theta)[0]


def best(model: Line, chain: Chain, kl: KL, kl_weight: float, b: float, q: float, *, dropped: bool = False) -> Tensor:
    """Return the (shift, slope) where that gradient vanishes, (2,)."""
    theta = torch.zeros(2, dtype=torch.float64)
    for _ in range(30):
        value = gradient_of(model, chain, kl, theta, kl_weight, b, q, dropped=dropped)
        hessian = torch.stack([
            (gradient_of(model, chain, kl, theta + 1e-5 * e, kl_weight, b, q, dropped=dropped) - value) / 1e-5
            for e in torch.eye(2, dtype=torch.float64)
        ], 1)
        theta = theta - 0.9 * torch.linalg.solve(hessian, value)
        if float(value.abs().max()) < 1e-7:
            break
    return theta


class LineSettings(ModelSettings):
    """The ``[model]`` table of a line."""

    mean: float = 0.3
    dim: int = 1
    prompts: tuple[str, ...] = ()

    def build(
        self, rewards: Sequence[str], /, *, file: Path, seed: int, device: torch.device
    ) -> tuple[Any, dict[str, Reward]]:
        """Build a line and its rewards, as a backend does."""
        known = {"up": quadratic(1.0).rewards["r"], "near": quadratic(0.0, 1.0).rewards["r"],
                 "odd": Reward("odd", odd), "nan": Reward("nan", broken)}  # fmt: skip
        for name in rewards:
            if name not in known:
                raise ValueError(f"{file}: [rewards] knows {', '.join(known)}, got {name!r}")
        return Line(self.mean, 1.0, self.dim, self.prompts), {name: known[name] for name in rewards}


def odd(x: Tensor, condition: Any) -> Tensor:
    """Return a reward of the wrong shape."""
    return x


def broken(x: Tensor, condition: Any) -> Tensor:
    """Return a reward that is not a number."""
    return x[:, 0] * torch.nan
