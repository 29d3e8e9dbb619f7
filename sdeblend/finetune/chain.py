"""The ancestral chain as a Markov decision process: Gaussian steps, their log-probability, their exact KL.

A step from t_k to t_{k+1} is the core's ancestral step with the score written in what the network predicts:

    x_{k+1} = P_k x_k + Q_k out(x_k, t_k) + G_k z_k,          z_k ~ N(0, I),

affine in the prediction, so that for two networks at the same state

    KL(step || base step) = |Q_k (out - out_base)|^2 / (2 G_k^2),
    log p(x_{k+1} | x_k)  = -|x_{k+1} - P_k x_k - Q_k out|^2 / (2 G_k^2) + const.

Both are sums over dimensions. The last step goes to t = 0, is the posterior mean and has no density; it belongs to
the decoder, so to speak, and is the same map for every policy that agrees at t_min.

With E[r] - kl_weight KL(chain || base chain) as the objective the optimum is the chain of p_base exp(r / kl_weight),
provided that x_0 is independent of the start (eta = 1, alpha(t_max) near 0): Domingo-Enrich et al. 2409.08861.

Source: Fan et al. 2305.16381 (DPOK); Black et al. 2305.13301 (DDPO).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdeblend.finetune.model import Condition, Tunable, per_row
from sdeblend.grid import check_grid
from sdeblend.score import conversion
from sdeblend.steps import Ancestral


@dataclass(frozen=True)
class Chain:
    """The steps of one grid for one kind of network.

    Attributes:
        grid: times, float64 (n + 1,), from noise to 0.
        p, q, g: coefficients P, Q, G of the n steps, float64 (n,); the last G is 0.
    """

    grid: Tensor
    p: Tensor
    q: Tensor
    g: Tensor

    @classmethod
    def of(cls, model: Tunable, grid: Tensor) -> Chain:
        """Return the chain of ``model`` on ``grid``, float64 (n + 1,), which must end at 0.

        Raises:
            ValueError: for a grid that does not decrease to 0 or has fewer than two steps.
        """
        grid = check_grid(grid, model.schedule)
        if len(grid) < 3 or float(grid[-1]) != 0:
            raise ValueError(
                f"a chain needs at least 2 steps and must end at t = 0, got {len(grid) - 1} ending at "
                f"{float(grid[-1]):g}; use sdeblend.time_grid"
            )
        moves = Ancestral().plan(model.schedule, grid)
        a, b, g = (torch.tensor([getattr(move, name) for move in moves], dtype=torch.float64) for name in "abg")
        p, q = conversion(model.schedule, grid[:-1], model.prediction, "score")
        return cls(grid, a + b * p, b * q, g)

    def __len__(self) -> int:
        return len(self.p)

    @property
    def noisy(self) -> int:
        """Number of steps that have a density: all but the last."""
        return len(self) - 1

    def mean(self, x: Tensor, prediction: Tensor, k: Tensor) -> Tensor:
        """Return the mean of step k, (B, *event), from state x and prediction (B, *event), k long (B,)."""
        return per_row(self.p[k], x) * x + per_row(self.q[k], x) * prediction

    def log_prob(self, x: Tensor, prediction: Tensor, k: Tensor, following: Tensor) -> Tensor:
        """Return log p(following | x) of noisy steps k up to a constant, (B,); the sum over dimensions."""
        distance = (following - self.mean(x, prediction, k)).square().flatten(1).sum(1)
        return -distance / (2 * self.g[k].to(distance).square())

    def kl(self, prediction: Tensor, base: Tensor, k: Tensor) -> Tensor:
        """Return the exact KL of noisy steps k to the base's from the same state, nats (B,)."""
        ratio = (self.q[k] / self.g[k]).to(prediction)
        return ratio.square() * (prediction - base).square().flatten(1).sum(1) / 2

    def times(self, k: Tensor) -> Tensor:
        """Return the times at which steps k evaluate the network, float64, shaped as k."""
        return self.grid[k]


def draw_noise(model: Tunable, chain: Chain, rows: slice, total: int, generator: torch.Generator) -> Tensor:
    """Draw the noise of a batch of ``total`` samples and return that of ``rows``, (n, B, *event).

    Entry 0 is the start, entry k + 1 belongs to noisy step k. The whole batch is drawn wherever it is computed, so
    that results do not depend on how it is shared out.
    """
    out = []
    for _ in range(len(chain)):
        draw = torch.randn((total, *model.event), generator=generator, device=generator.device)
        out.append(draw[rows].to(model.device))
    return torch.stack(out)


def roll_out(
    model: Tunable, chain: Chain, noise: Tensor, condition: Condition | None, *, base: bool = False
) -> Tensor:
    """Run the chain.

    Args:
        model: base and tuned network.
        chain: the steps.
        noise: from ``draw_noise``, (n, B, *event).
        condition: of the B samples.
        base: run the base's chain instead of the tuned one.

    Returns:
        states (n + 1, B, *event), the last at t = 0; differentiable unless grad is disabled.
    """
    network = model.base if base else model.tuned
    x = noise[0] * model.schedule.prior_std()
    states = [x]
    for k in range(len(chain)):
        index = torch.full((x.shape[0],), k, dtype=torch.long)
        x = chain.mean(x, network(x, chain.times(index), condition), index)
        if k < chain.noisy:
            x = x + float(chain.g[k]) * noise[k + 1]
        states.append(x)
    return torch.stack(states)
