"""DDPO: proximal policy optimisation of the chain, advantages within each prompt.

For step k of a path the loss is

    -min(rho A_k, clip(rho, 1 +- clip) A_k) + kl_weight KL_k,        rho = p(x_{k+1} | x_k) / p_old(x_{k+1} | x_k),

A_k the return of ``trainers.policy`` minus its mean over the other samples of the prompt. It is not divided by its
standard deviation, as is usual: that would multiply r and leave KL_k, so each prompt would have a kl_weight of its own.
AdamW does not care about the scale of a loss.

Source: Black et al. 2305.13301; Schulman et al. 1707.06347; Kool et al. 2019 (leave-one-out means).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sdeblend.finetune.model import Tunable, take
from sdeblend.finetune.trainer import Metrics, Settings, Trainer, Workers
from sdeblend.finetune.trainers.policy import KL, Loss, Paths, StepWeights, clipped, follow
from sdeblend.reward import WeightedReward


@dataclass(frozen=True)
class DDPOSettings(Settings):
    """Settings of DDPO beside those of every trainer.

    Attributes:
        clip: how far the likelihood ratio of a step may leave 1 before it is held there.
        updates: optimiser steps an iteration, each on its share of the steps of all paths.
        kl: which KL ``kl_weight`` weighs, "process" or "chain"; see ``trainers.policy``.

    Raises:
        ValueError: for a value outside its range.
    """

    clip: float = 0.2
    updates: int = 4
    kl: KL = "process"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.clip < 1:
            raise ValueError(f"clip must lie within (0, 1), got {self.clip}; 0.2 is usual")
        if self.updates < 1:
            raise ValueError(f"updates must be at least 1, got {self.updates}")


class DDPO(Trainer):
    """PPO on the denoising chain with the exact KL to the base."""

    name: ClassVar[str] = "ddpo"
    settings: DDPOSettings

    def __init__(
        self, model: Tunable, reward: WeightedReward, settings: DDPOSettings, workers: Workers | None = None
    ) -> None:
        super().__init__(model, reward, settings, workers)
        self.weights = StepWeights.of(model, self.chain, settings.kl)

    def iterate(self) -> Metrics:
        paths = follow(self, self.weights)
        returns = self.returns(paths)
        steps = len(self.weights)
        order = torch.randperm(self.settings.total * steps, generator=self.generator)
        held, losses = torch.zeros(1), []
        for chosen in order.chunk(self.settings.updates):
            row, k = paths.own(chosen)
            losses.append(self.descend(len(row), self._loss(paths, returns, row, k, held), total=len(chosen)))
        self.workers.add([held])
        self.iteration += 1
        return {
            "reward": self.mean(paths.rewards),
            "kl": self.mean(paths.kl),
            "loss": sum(losses) / len(losses),
            "clipped": float(held) / len(order),
        }

    def returns(self, paths: Paths) -> Tensor:
        """Return A_k of each step, (B, m): without the other samples' mean, for this process's rows."""
        other = paths.cost.sum(1, keepdim=True) - paths.cost
        returns = self.workers.gather(paths.rewards[:, None] - self.settings.kl_weight * other)
        size = self.settings.group_size
        groups = returns.reshape(self.settings.groups, size, -1)
        # A sample's distance to the mean of the others is size / (size - 1) of that to the mean of all.
        centred = (groups - groups.mean(1, keepdim=True)) * (size / (size - 1))
        return centred.flatten(0, 1)[paths.rows]

    def _loss(self, paths: Paths, returns: Tensor, row: Tensor, k: Tensor, held: Tensor) -> Loss:
        """Return the loss of chosen steps, a path's sum over its steps on average; counts the clipped ones."""

        def loss(index: Tensor) -> Tensor:
            i, step = row[index], k[index]
            tuned = self.model.tuned(paths.states[i, step], self.chain.times(step), take(paths.condition, i))
            ratio = self.weights.log_ratio(
                tuned - paths.predictions[i, step], paths.noise[i, step], step
            ).exp()
            held.add_(((ratio.detach() - 1).abs() > self.settings.clip).sum().cpu())
            gain = clipped(ratio, returns[i, step], self.settings.clip)
            kl = self.weights.kl(tuned - paths.base[i, step], step)
            return len(self.weights) * (self.settings.kl_weight * kl - gain)

        return loss
