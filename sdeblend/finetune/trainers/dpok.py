"""DPOK: policy gradient on the chain with a value function and a replay buffer, exactly or as published.

"exact" draws steps from the buffer and minimises, with V a network of state, time and prompt,

    -min(rho A, clip(rho, 1 +- clip) A) + kl_weight KL_k,        A = r - kl_weight sum_{j > k} cost_j - V(x_k, t_k),

rho the likelihood ratio to the policy that drew the step (a sum over dimensions), costs as in
``trainers.policy``. Where the policy comes to rest the buffer is its own, and the optimum is the tilt.

"published" is the authors' code: log-probabilities are means over dimensions, rho is held in 1 +- clip with no
gradient outside and without PPO's minimum, and the KL is replaced by the mean square difference of eps:

    -reward_weight (r - V) clamp(rho^(1/D), 1 +- clip) + kl_weight |eps - eps_base|^2 / D.

Its KL weight in the theory's sense then depends on the step (``DPOK.kl_weights``), so that members tuned by it have
none to state.

Source: Fan et al. 2305.16381 and its code; Schulman et al. 1707.06347.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from sdeblend.finetune.model import Tunable, take
from sdeblend.finetune.trainer import Metrics, Settings, Trainer, Workers
from sdeblend.finetune.trainers.policy import KL, Loss, StepWeights, clipped, follow
from sdeblend.finetune.trainers.replay import Replay
from sdeblend.finetune.trainers.value import Value
from sdeblend.reward import WeightedReward
from sdeblend.score import conversion

Mode = Literal["exact", "published"]


@dataclass(frozen=True)
class DPOKSettings(Settings):
    """Settings of DPOK beside those of every trainer; the defaults are of "exact", ``presets`` has the others.

    Attributes:
        mode: "exact", where ``kl_weight`` is the theory's alpha, or "published", where it is a weight on eps.
        kl: which KL "exact" weighs, "process" or "chain"; see ``trainers.policy``.
        clip: how far the likelihood ratio may leave 1.
        reward_weight: factor of the reward; 1 in "exact", whose ``kl_weight`` says it all.
        buffer: steps kept, first in, first out, over all processes.
        updates: optimiser steps of the policy an iteration.
        batch: steps drawn for each of them.
        value_updates, value_batch, value_rate: the same of the value function, and its learning rate.

    Raises:
        ValueError: for a value outside its range.
    """

    least_group: ClassVar[int] = 1
    # 6 prompts x 1 image, 12 x 2 steps accumulated.
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "published": {
            "kl_weight": 0.1, "reward_weight": 1000.0, "clip": 1e-4, "clip_norm": 0.1, "learning_rate": 1e-5,
            "groups": 6, "group_size": 1, "steps": 50, "spacing": "uniform", "buffer": 1000, "updates": 5,
            "batch": 24, "value_updates": 5, "value_batch": 256, "value_rate": 1e-4,
        }
    }  # fmt: skip

    mode: Mode = "exact"
    kl: KL = "process"
    clip: float = 0.2
    reward_weight: float = 1.0
    buffer: int = 40_000
    updates: int = 8
    batch: int = 4096
    value_updates: int = 8
    value_batch: int = 4096
    value_rate: float = 3e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in ("exact", "published"):
            raise ValueError(f"mode must be 'exact' or 'published', got {self.mode!r}")
        if not 0 < self.clip < 1:
            raise ValueError(f"clip must lie within (0, 1), got {self.clip}; 0.2 is usual, the published value 1e-4")
        for name in ("buffer", "updates", "batch", "value_updates", "value_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("reward_weight", "value_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.mode == "exact" and self.reward_weight != 1:
            raise ValueError(f"reward_weight must be 1 with mode = 'exact', got {self.reward_weight}; set kl_weight")

    @classmethod
    def published(cls, **changes: Any) -> DPOKSettings:
        """Return the published settings with changes."""
        return cls(**{"mode": "published", **cls.presets["published"], **changes})


class DPOK(Trainer):
    """Policy gradient with replay and a value function."""

    name: ClassVar[str] = "dpok"
    settings: DPOKSettings

    def __init__(
        self, model: Tunable, reward: WeightedReward, settings: DPOKSettings, workers: Workers | None = None
    ) -> None:
        super().__init__(model, reward, settings, workers)
        self.exact = self.calibrated = settings.mode == "exact"
        self.weights = StepWeights.of(model, self.chain, settings.kl if self.exact else "chain")
        # |eps - eps_base|^2 over the square of the prediction's difference.
        self.eps = conversion(model.schedule, self.chain.grid[:-1], model.prediction, "eps")[1].square()
        self.dimension = torch.Size(model.event).numel()
        self.value = Value(self.dimension, settings.value_rate, settings.seed, model.device)
        self.replay = Replay(settings.buffer, len(self.weights))

    def kl_weights(self) -> Tensor:
        """Return the KL weight that the published loss amounts to at each noisy step, float64 (n - 1,).

        Its two gradients at ratio 1 are reward_weight / D times that of A log p and kl_weight / D times that of
        |eps - eps_base|^2; the theory's are once the first and alpha times that of the step's exact KL.
        """
        chain = StepWeights.of(self.model, self.chain, "chain")
        return self.settings.kl_weight / self.settings.reward_weight * self.eps[:-1] / chain.cost

    def iterate(self) -> Metrics:
        state = self.generator.get_state()
        paths = follow(self, self.weights)
        later = paths.cost.flip(1).cumsum(1).flip(1) - paths.cost
        weight = self.settings.kl_weight if self.exact else 0.0
        self.replay.add(paths, paths.rewards[:, None] - weight * later, state)
        # The value function first: the policy's advantages are against it.
        value_loss = self._fit_value()
        held, losses = torch.zeros(1), []
        for _ in range(self.settings.updates):
            chosen = self.replay.draw(self.settings.batch, self.settings.total, self.generator)
            mine = self.replay.own(chosen, self.settings.total)
            losses.append(self.descend(len(mine), self._loss(mine, held), total=self.settings.batch))
        self.workers.add([held])
        self.iteration += 1
        return {
            "reward": self.mean(paths.rewards),
            "kl": self.mean(paths.kl),
            "loss": sum(losses) / len(losses),
            "clipped": float(held) / (self.settings.updates * self.settings.batch),
            "value_loss": value_loss,
        }

    def _fit_value(self) -> float:
        """Fit the value function to the returns in the buffer; return the last mean square, in units of its scale."""
        loss = 0.0
        for _ in range(self.settings.value_updates):
            chosen = self.replay.draw(self.settings.value_batch, self.settings.total, self.generator)
            steps = self.replay.take(self.replay.own(chosen, self.settings.total))
            times = self.chain.times(steps.k) / self.chain.grid[0]
            loss = self.value.fit(steps, times, len(chosen), self.workers)
        return loss

    def _loss(self, mine: Tensor, held: Tensor) -> Loss:
        """Return the loss of these steps of the buffer; counts those whose ratio is held."""

        def loss(index: Tensor) -> Tensor:
            s = self.replay.take(mine[index])
            t = self.chain.times(s.k)
            tuned = torch.cat([
                self.model.tuned(s.states[part], t[part], take(condition, rows)) for part, condition, rows in s.pieces
            ])
            ratio = self.weights.log_ratio(tuned - s.predictions, s.noise, s.k)
            advantage = s.returns - self.value(s.states, t / self.chain.grid[0], s.prompts).to(s.returns)
            if not self.exact:
                return self._published(tuned - s.base, (ratio / self.dimension).exp(), advantage, s.k, held)
            ratio = ratio.exp()
            held.add_(((ratio.detach() - 1).abs() > self.settings.clip).sum().cpu())
            gain = clipped(ratio, advantage, self.settings.clip)
            return len(self.weights) * (self.settings.kl_weight * self.weights.kl(tuned - s.base, s.k) - gain)

        return loss

    def _published(self, away: Tensor, ratio: Tensor, advantage: Tensor, k: Tensor, held: Tensor) -> Tensor:
        clip = self.settings.clip
        held.add_(((ratio.detach() - 1).abs() > clip).sum().cpu())
        square = self.eps[k].to(away) * away.flatten(1).square().mean(1)
        gain = self.settings.reward_weight * advantage * ratio.clamp(1 - clip, 1 + clip)
        return self.settings.kl_weight * square - gain

    def buffers(self) -> dict[str, Tensor]:
        return {f"value.{k}": v for k, v in self.value.state().items()} | {
            f"replay.{k}": v for k, v in self.replay.state(self.workers).items()
        }

    def load_buffers(self, buffers: dict[str, Tensor]) -> None:
        parts: dict[str, dict[str, Tensor]] = {"value": {}, "replay": {}}
        for name, tensor in buffers.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        self.value.load(parts["value"])
        rows = self.workers.rows(self.settings.total)

        def conditions(generator: torch.Generator) -> Any:
            drawn = self.model.conditions(self.settings.groups, self.settings.group_size, generator)
            return take(drawn, torch.arange(self.settings.total)[rows])

        self.replay.load(parts["replay"], rows, conditions, self.model.device)
