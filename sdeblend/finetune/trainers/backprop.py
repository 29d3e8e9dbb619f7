"""Direct reward back-propagation: the chain is a function of its noise, so differentiate the reward through it.

With the noise fixed, x_0 and what the control costs in KL are differentiable in the parameters, and

    maximise   E[ r(x_0) / kl_weight - sum_k v_k |S_k - S_base,k|^2 / 2 ]

by its exact gradient. Both terms are those of the continuous processes to second order in the step, for which see
``sdeblend.finetune.paths``, and with all n steps differentiated the optimum is the tilt to within a per cent or two
of strength at 50 steps. With the last K only (DRaFT-K), states before them are constants, the KL of earlier steps sees
its own step alone, and nothing tells them of the reward: the cheaper gradient is biased, and the KL weight it ends at
is not the one stated.

Source: Clark et al. 2309.17400 (DRaFT); Prabhudesai et al. 2310.03739 (AlignProp, random K).
"""

from __future__ import annotations

from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sdeblend.finetune.model import take
from sdeblend.finetune.paths import follow
from sdeblend.finetune.trainer import Metrics, Trainer, TrainerSettings


class BackpropSettings(TrainerSettings):
    """What back-propagation needs besides.

    Attributes:
        last: K, steps through which the reward is differentiated; 0 for all, which alone is exact.
        random: draw K from 1 to ``last`` (or all) each iteration.
        recompute: evaluate networks twice and keep no activations: memory of one step in place of K.
        ema_decay: as every trainer's; the strength of the last parameters wanders by a tenth.
    """

    last: int = Field(default=0, ge=0)
    random: bool = False
    recompute: bool = False
    ema_decay: float = Field(default=0.98, ge=0, lt=1)

    @model_validator(mode="after")
    def _of_the_steps(self) -> Self:
        if self.last > self.steps:
            raise ValueError(f"last must lie within 0 (all) and the {self.steps} steps, got {self.last}")
        return self


class RewardBackprop(Trainer):
    """The back-propagation trainer; arguments as ``Trainer``."""

    name = "backprop"
    settings_class = BackpropSettings
    settings: BackpropSettings

    def prepare(self) -> None:
        self.calibrated = not self.settings.random and self.settings.last in (0, self.settings.steps)

    def iterate(self) -> Metrics:
        settings, batch = self.settings, self.draw()
        keep = settings.last or settings.steps
        if settings.random:
            keep = int(torch.randint(1, keep + 1, (), generator=self.generator))
        rows = batch.noise.shape[1]
        rewards, kls = torch.zeros(rows), torch.zeros(rows)

        def loss_of(index: Tensor) -> Tensor:
            condition = take(batch.condition, index)
            noise = batch.noise[:, index]
            run = follow(self.model, self.grid, noise, condition, keep=keep, recompute=settings.recompute)
            reward = self.score(run.samples, condition, graded=True)
            rewards[index], kls[index] = reward.detach().cpu().float(), run.kl.detach().cpu().float()
            return run.kl - reward / settings.kl_weight

        loss = self.descend(rows, loss_of)
        self.iteration += 1
        return {"reward": self.mean(rewards), "kl": self.mean(kls), "loss": loss}
