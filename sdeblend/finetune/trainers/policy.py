"""Policy gradients on the chain: paths, likelihood ratios, and what each step costs in KL.

The ancestral chain is a Markov decision process: a Gaussian step x_{k+1} = P x_k + Q out(x_k, t_k) + G z, affine in
what the network predicts. With c = Q / G, prediction d away from another's at the same state, and the noise z of a
step,

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

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from sdeblend.finetune.model import Condition, Tunable, per_row, take
from sdeblend.finetune.paths import evaluated, log_snr_weights, visits
from sdeblend.finetune.trainer import Trainer, TrainerSettings
from sdeblend.parametrisation import conversion
from sdeblend.steps import Ancestral

KL = Literal["process", "chain"]


class PolicySettings(TrainerSettings):
    """What policy gradients need besides.

    Attributes:
        clip: how far the likelihood ratio of a step may leave 1 before it is held there; 0.2 is usual.
        updates: optimiser steps an iteration.
        kl: which KL ``kl_weight`` weighs, "process" or "chain"; see ``sdeblend.finetune.trainers.policy``.
    """

    clip: Annotated[float, Field(gt=0, lt=1), "a number within (0, 1), 0.2 is usual"] = 0.2
    updates: int = Field(default=4, ge=1)
    kl: KL = "process"


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
    def of(cls, model: Tunable, grid: Tensor, kl: KL) -> StepWeights:
        """Return the weights of a grid's steps: of all n for "process", of the n - 1 noisy ones for "chain"."""
        times, moves = grid[:-1], Ancestral().plan(model.schedule, grid)[:-1]
        gains = torch.tensor([move.b / move.g for move in moves], dtype=torch.float64)
        ratio = gains * conversion(model.schedule, times[:-1], model.prediction, "score")[1]
        if kl == "chain":
            return cls(ratio, ratio.square() / 2, torch.ones_like(ratio))
        weight = log_snr_weights(model.schedule, times) / 2
        cost = weight * conversion(model.schedule, times, model.prediction, "eps")[1].square()
        return cls(pad(ratio, (0, 1)), cost, pad(2 * cost[:-1] / ratio.square(), (0, 1)))

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


class Steps(NamedTuple):
    """Steps of the chain, (..., *event): where the policy was, what it and the base predicted, its noise."""

    states: Tensor
    predictions: Tensor
    base: Tensor
    noise: Tensor

    def at(self, row: Tensor, k: Tensor) -> Steps:
        """Return steps k of paths ``row``, (N, *event), from those of whole paths, (B, m, *event)."""
        return Steps(*(tensor[row, k] for tensor in self))


@dataclass(frozen=True)
class Paths:
    """The paths of one iteration, this process's rows of them.

    Attributes:
        steps: those that count, (B, m, *event).
        cost: sampled cost of each step, nats (B, m).
        rewards: (B,).
        kl: exact KL of the whole path, (B,).
        condition: of the B rows.
        rows: which rows of the whole batch these are.
    """

    steps: Steps
    cost: Tensor
    rewards: Tensor
    kl: Tensor
    condition: Condition | None
    rows: slice

    def own(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Return (row, step) of those among steps of the whole batch, numbered row by row, that are here."""
        row, k = chosen // self.cost.shape[1] - self.rows.start, chosen % self.cost.shape[1]
        here = (row >= 0) & (row < len(self.cost))
        return row[here], k[here]


class PolicyTrainer(Trainer):
    """A trainer of the chain.

    Attributes:
        weights: of its steps.
        held: how many likelihood ratios of this iteration were held, (1,).
    """

    settings: PolicySettings

    def prepare(self) -> None:
        self.weights, self.held = StepWeights.of(self.model, self.grid, self.settings.kl), torch.zeros(1)

    @torch.no_grad()
    def draw_paths(self) -> Paths:
        """Draw this iteration's conditions and noise, run the tuned chain, score where it ends."""
        model, weights, batch, kept = self.model, self.weights, self.draw(), []
        for index in torch.arange(batch.noise.shape[1]).split(self.settings.micro_batch):
            condition, parts = take(batch.condition, index), list[tuple[Tensor, ...]]()
            for k, visit in enumerate(visits(model, Ancestral(), self.grid, batch.noise[:, index], condition)):
                if k < len(weights):
                    here = torch.full((len(index),), k, dtype=torch.long)
                    base = evaluated(model, model.base, visit.x, visit.t, condition)[0]
                    exact = cost = weights.kl(visit.prediction - base, here)
                    z = torch.zeros_like(visit.x) if visit.noise is None else visit.noise
                    if visit.noise is not None:
                        # p and its noise are the tuned policy's, so the base's log-ratio changes sign.
                        sampled = weights.log_ratio(base - visit.prediction, z, here)
                        cost = -per_row(weights.share[here], exact) * sampled
                    parts.append((visit.x, visit.prediction, base, z, cost, exact))
                last = visit.following
            kept.append((*(torch.stack(part, 1) for part in zip(*parts, strict=True)), last))
        *steps, costs, exact, last = (torch.cat(part) for part in zip(*kept, strict=True))
        rewards = self.score(last, batch.condition)
        return Paths(Steps(*steps), costs, rewards, exact.sum(1), batch.condition, batch.rows)

    def surrogate(self, tuned: Tensor, steps: Steps, k: Tensor, advantage: Tensor) -> Tensor:
        """Return PPO's loss of steps with the exact KL, (B,); counts the ratios that are held.

        Args:
            tuned: what the policy predicts now, (B, *event).
            steps: as they were drawn.
            k: their numbers, long (B,).
            advantage: A, (B,).
        """
        ratio = self.weights.log_ratio(tuned - steps.predictions, steps.noise, k).exp()
        gain = clipped(ratio, advantage, self.settings.clip)
        self.hold(ratio)
        return len(self.weights) * (self.settings.kl_weight * self.weights.kl(tuned - steps.base, k) - gain)

    def hold(self, ratio: Tensor) -> None:
        """Count the ratios that are held."""
        self.held += ((ratio.detach() - 1).abs() > self.settings.clip).sum().cpu()

    def clipped_share(self, steps: int) -> float:
        """Return the share of held ratios among ``steps`` of all processes, and begin to count anew."""
        held, self.held = self.held, torch.zeros(1)
        self.processes.add([held])
        return float(held) / steps


def clipped(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """Return PPO's surrogate min(ratio A, clip(ratio, 1 +- clip) A), (B,)."""
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
