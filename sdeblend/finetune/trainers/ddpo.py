"""DDPO: proximal policy optimisation of the chain, advantages within each prompt.

For step k of a path the loss is

    -min(rho A_k, clip(rho, 1 +- clip) A_k) + kl_weight KL_k,        rho = p(x_{k+1} | x_k) / p_old(x_{k+1} | x_k),

A_k the return of ``trainers.policy`` minus its mean over the other samples of the prompt. It is not divided by its
standard deviation, as is usual: that would multiply r and leave KL_k, so each prompt would have a kl_weight of its own.
AdamW does not care about the scale of a loss.

Source: Black et al. 2305.13301; Schulman et al. 1707.06347; Kool et al. 2019 (leave-one-out means).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdeblend.finetune.model import take
from sdeblend.finetune.trainer import Loss, Metrics
from sdeblend.finetune.trainers.policy import Paths, PolicySettings, PolicyTrainer


class DDPOSettings(PolicySettings):
    """What DDPO needs: what policy gradients do; each of its updates has its share of the steps of all paths."""


class DDPO(PolicyTrainer):
    """PPO on the denoising chain with the exact KL to the base; arguments as ``Trainer``."""

    name = "ddpo"
    settings_class = DDPOSettings
    settings: DDPOSettings

    def iterate(self) -> Metrics:
        paths = self.draw_paths()
        returns, losses = self.returns(paths), []
        order = torch.randperm(self.settings.total * len(self.weights), generator=self.generator)
        for chosen in order.chunk(self.settings.updates):
            row, k = paths.own(chosen)
            losses.append(self.descend(len(row), self._loss(paths, returns, row, k), total=len(chosen)))
        self.iteration += 1
        return {
            "reward": self.mean(paths.rewards),
            "kl": self.mean(paths.kl),
            "loss": sum(losses) / len(losses),
            "clipped": self.clipped_share(len(order)),
        }

    def returns(self, paths: Paths) -> Tensor:
        """Return A_k of each step, (B, m): without the other samples' mean, for this process's rows."""
        other = paths.cost.sum(1, keepdim=True) - paths.cost
        returns = self.processes.gather(paths.rewards[:, None] - self.settings.kl_weight * other)
        size = self.settings.group_size
        groups = returns.reshape(self.settings.groups, size, -1)
        # A sample's distance to the mean of the others is size / (size - 1) of that to the mean of all.
        centred = (groups - groups.mean(1, keepdim=True)) * (size / (size - 1))
        return centred.flatten(0, 1)[paths.rows]

    def _loss(self, paths: Paths, returns: Tensor, row: Tensor, k: Tensor) -> Loss:
        """Return the loss of chosen steps, a path's sum over its steps on average."""

        def loss(index: Tensor) -> Tensor:
            i, step = row[index], k[index]
            steps = paths.steps.at(i, step)
            tuned = self.model.tuned(steps.states, self.grid[step], take(paths.condition, i))
            return self.surrogate(tuned, steps, step, returns[i, step])

        return loss
