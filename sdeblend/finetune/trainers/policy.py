"""Policy gradients on the chain: paths, likelihood ratios, and what each step costs in KL.

With c = Q / G, prediction d away from another's at the same state, and the noise z of a step,

    log p'(x_{k+1} | x_k) / p(x_{k+1} | x_k) = c <d, z> - c^2 |d|^2 / 2        (p drew the step with z, p' is d away),

which keeps its digits where the difference of two log-probabilities of a large image has none left.

The gradient of E[r] - alpha sum_k E[KL_k] has two parts for the KL: that of KL_k itself, and one through the states
where the policy leads, which needs alpha times the cost of the other steps in the return. Leave it out and the
optimum is not the tilt. In the return

    A_k = r - alpha sum_{j != k} cost_j,        cost_j = w_j log p(x_{j+1} | x_j) / p_base(x_{j+1} | x_j),

the sampled log-ratio stands for KL_j, whose mean is the same: along a path of the optimum r - alpha log p / p_base is
constant, so the variance of the gradient nearly vanishes there, five times less standard deviation on Gaussians than
with KL_j itself. The step's own KL is exact, in the loss.

What is the KL? Of the steps as they are, "chain": w_j = 1. But ancestral steps are narrower than the process they
stand for, and their KL is too large at any affordable number: with 50 of them, even in t, 1.6 times for data of
variance 1 and 12 times for .02. So by default, "process": the KL of the two continuous processes,

    1/2 int |eps - eps_base|^2 dl,      l the log signal-to-noise ratio,

by the trapezoidal rule on the chain's own grid, within a per cent where the grid is even in l; w_j is its share of
the step's. Then kl_weight is the theory's alpha, and not that of a coarse chain. What stays is the chain's law, right
to first order: with 50 steps even in l the best control is a fifth too strong far from the data and a sixth too weak
near it; over all levels up to 7 % are lost on modes apart, and half of that with 100 steps.

Source: Black et al. 2305.13301; Fan et al. 2305.16381; Richter et al. 2010.10436 (log-ratios as control variates);
Kingma et al. 2107.00630 (KL in log-SNR).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sdeblend.finetune.chain import Chain
from sdeblend.finetune.model import Condition, Tunable, per_row, take
from sdeblend.finetune.paths import log_snr_weights
from sdeblend.finetune.trainer import Trainer
from sdeblend.score import conversion

KL = Literal["process", "chain"]
Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class StepWeights:
    """What a difference d in the prediction does at each step.

    Attributes:
        ratio: c of the log-ratio, float64 (m,); 0 for a last step without noise.
        cost: KL over |d|^2, nats, float64 (m,).
        share: w, float64 (m,); 0 where there is no noise.
    """

    ratio: Tensor
    cost: Tensor
    share: Tensor

    @classmethod
    def of(cls, model: Tunable, chain: Chain, kl: KL) -> StepWeights:
        """Return the weights of a chain: of all n steps for "process", of the n - 1 noisy ones for "chain"."""
        ratio = chain.q[:-1] / chain.g[:-1]
        if kl == "chain":
            return cls(ratio, ratio.square() / 2, torch.ones_like(ratio))
        times = chain.grid[:-1]
        weight = log_snr_weights(model.schedule, times) / 2
        cost = weight * conversion(model.schedule, times, model.prediction, "eps")[1].square()
        share = torch.nn.functional.pad(2 * cost[:-1] / ratio.square(), (0, 1))
        return cls(torch.nn.functional.pad(ratio, (0, 1)), cost, share)

    def __len__(self) -> int:
        return len(self.ratio)

    def log_ratio(self, difference: Tensor, noise: Tensor, k: Tensor) -> Tensor:
        """Return log p' / p of steps k that p took with this noise; p' predicts ``difference`` more, (B,)."""
        c = self.ratio[k].to(difference)
        d, z = difference.flatten(1), noise.flatten(1)
        return c * (d * z).sum(1) - c.square() * d.square().sum(1) / 2

    def kl(self, difference: Tensor, k: Tensor) -> Tensor:
        """Return the exact KL of steps k of two policies ``difference`` apart, nats (B,)."""
        return self.cost[k].to(difference) * difference.flatten(1).square().sum(1)


@dataclass(frozen=True)
class Paths:
    """The paths of one iteration, this process's rows of them.

    Attributes:
        states, predictions, base, noise: of the steps that count, (B, m, *event): where the policy was, what it
            and the base predicted, the noise it moved with.
        cost: sampled cost of each step, nats (B, m).
        rewards: (B,).
        kl: exact KL of the whole path, (B,).
        condition: of the B rows.
        rows: which rows of the whole batch these are.
    """

    states: Tensor
    predictions: Tensor
    base: Tensor
    noise: Tensor
    cost: Tensor
    rewards: Tensor
    kl: Tensor
    condition: Condition | None
    rows: slice

    def own(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Return (row, step) of those among steps of the whole batch, numbered row by row, that are here."""
        row, k = chosen // self.states.shape[1] - self.rows.start, chosen % self.states.shape[1]
        here = (row >= 0) & (row < len(self.states))
        return row[here], k[here]


@torch.no_grad()
def follow(trainer: Trainer, weights: StepWeights) -> Paths:
    """Draw this iteration's conditions and noise, run the tuned chain, score where it ends."""
    model, chain, batch = trainer.model, trainer.chain, trainer.draw()
    steps, kept = len(weights), []
    for index in torch.arange(batch.noise.shape[1]).split(trainer.settings.micro_batch):
        condition, noise = take(batch.condition, index), batch.noise[:, index]
        x = noise[0] * model.schedule.prior_std()
        parts: list[tuple[Tensor, ...]] = []
        for k in range(len(chain)):
            here = torch.full((len(index),), k, dtype=torch.long)
            t = chain.times(here)
            tuned = model.tuned(x, t, condition)
            z = noise[k + 1] if k < chain.noisy else torch.zeros_like(x)
            if k < steps:
                base = model.base(x, t, condition)
                # p and its noise are the tuned policy's, so the base's log-ratio changes sign.
                exact = weights.kl(tuned - base, here)
                sampled = -per_row(weights.share[here], exact) * weights.log_ratio(base - tuned, z, here)
                parts.append((x, tuned, base, z, sampled if k < chain.noisy else exact, exact))
            x = chain.mean(x, tuned, here) + float(chain.g[k]) * z
        kept.append((*(torch.stack(part, 1) for part in zip(*parts, strict=True)), x))
    states, predictions, base, noise, cost, exact, last = (torch.cat(part) for part in zip(*kept, strict=True))
    rewards = trainer.score(last, batch.condition)
    return Paths(states, predictions, base, noise, cost, rewards, exact.sum(1), batch.condition, batch.rows)


def clipped(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """Return PPO's surrogate min(ratio A, clip(ratio, 1 +- clip) A), (B,)."""
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
