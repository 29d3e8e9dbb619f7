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
from types import MappingProxyType
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sdeblend.finetune.model import take
from sdeblend.finetune.trainer import Loss, Metrics
from sdeblend.finetune.trainers.policy import PolicySettings, PolicyTrainer, Steps, StepWeights
from sdeblend.finetune.trainers.replay import Replay
from sdeblend.finetune.trainers.value import Value
from sdeblend.parametrisation import conversion


class DPOKSettings(PolicySettings):
    """What DPOK needs besides; the defaults are of "exact", and ``PUBLISHED`` has those of the other mode.

    Attributes:
        mode: "exact", where ``kl_weight`` is the theory's alpha, or "published", where it is a weight on eps.
        reward_weight: factor of the reward; 1 in "exact", whose ``kl_weight`` says it all.
        buffer: steps kept, first in, first out, over all processes.
        batch: steps drawn for each update.
        value_updates, value_batch, value_rate: the same of the value function, and its learning rate.
    """

    # 6 prompts x 1 image, 12 x 2 steps accumulated.
    PUBLISHED: ClassVar[Mapping[str, object]] = MappingProxyType({
        "kl_weight": 0.1, "reward_weight": 1000.0, "clip": 1e-4, "clip_norm": 0.1, "learning_rate": 1e-5,
        "groups": 6, "group_size": 1, "steps": 50, "spacing": "uniform", "buffer": 1000, "updates": 5,
        "batch": 24, "value_updates": 5, "value_batch": 256, "value_rate": 1e-4,
    })  # fmt: skip

    mode: Literal["exact", "published"] = "exact"
    # The value function is what it compares with.
    group_size: int = Field(default=256, ge=1)
    reward_weight: float = Field(default=1.0, gt=0)
    buffer: int = Field(default=40_000, ge=1)
    updates: int = Field(default=8, ge=1)
    batch: int = Field(default=4096, ge=1)
    value_updates: int = Field(default=8, ge=1)
    value_batch: int = Field(default=4096, ge=1)
    value_rate: float = Field(default=3e-3, gt=0)

    @classmethod
    def preset(cls, given: Mapping[str, object], /) -> Mapping[str, object]:
        return cls.PUBLISHED if given.get("mode") == "published" else {}

    @model_validator(mode="after")
    def _of_the_mode(self) -> Self:
        if self.mode == "exact" and self.reward_weight != 1:
            raise ValueError(f"reward_weight must be 1 with mode = 'exact', got {self.reward_weight}; set kl_weight")
        return self


class DPOK(PolicyTrainer):
    """Policy gradient with replay and a value function; arguments as ``Trainer``."""

    name = "dpok"
    settings_class = DPOKSettings
    settings: DPOKSettings

    def prepare(self) -> None:
        super().prepare()
        model, settings = self.model, self.settings
        self.exact = self.calibrated = settings.mode == "exact"
        if not self.exact:
            self.weights = StepWeights.of(model, self.grid, "chain")
        # |eps - eps_base|^2 over the square of the prediction's difference.
        self.eps = conversion(model.schedule, self.grid[:-1], model.prediction, "eps")[1].square()
        self.dimension = torch.Size(model.event).numel()
        self.value = Value(self.dimension, settings.value_rate, settings.seed, model.device)
        self.replay = Replay(settings.buffer, len(self.weights))

    def kl_weights(self) -> Tensor:
        """Return the KL weight that the published loss amounts to at each noisy step, float64 (n - 1,).

        Its two gradients at ratio 1 are reward_weight / D times that of A log p and kl_weight / D times that of
        |eps - eps_base|^2; the theory's are once the first and alpha times that of the step's exact KL.
        """
        chain = StepWeights.of(self.model, self.grid, "chain")
        return self.settings.kl_weight / self.settings.reward_weight * self.eps[:-1] / chain.cost

    def iterate(self) -> Metrics:
        state = self.generator.get_state()
        paths = self.draw_paths()
        later = paths.cost.flip(1).cumsum(1).flip(1) - paths.cost
        weight = self.settings.kl_weight if self.exact else 0.0
        self.replay.add(paths, paths.rewards[:, None] - weight * later, state)
        # The value function first: the policy's advantages are against it.
        value_loss = self._fit_value()
        losses = []
        for _ in range(self.settings.updates):
            chosen = self.replay.draw(self.settings.batch, self.settings.total, self.generator)
            mine = self.replay.own(chosen, self.settings.total)
            losses.append(self.descend(len(mine), self._loss(mine), total=self.settings.batch))
        self.iteration += 1
        return {
            "reward": self.mean(paths.rewards),
            "kl": self.mean(paths.kl),
            "loss": sum(losses) / len(losses),
            "clipped": self.clipped_share(self.settings.updates * self.settings.batch),
            "value_loss": value_loss,
        }

    def _fit_value(self) -> float:
        """Fit the value function to the returns in the buffer; return the last mean square, in units of its scale."""
        loss = 0.0
        for _ in range(self.settings.value_updates):
            chosen = self.replay.draw(self.settings.value_batch, self.settings.total, self.generator)
            steps = self.replay.take(self.replay.own(chosen, self.settings.total))
            times = self.grid[steps.k] / self.grid[0]
            loss = self.value.fit(steps, times, len(chosen), self.processes)
        return loss

    def _loss(self, mine: Tensor) -> Loss:
        """Return the loss of these steps of the buffer."""

        def loss(index: Tensor) -> Tensor:
            steps, returns, k, prompts, pieces = self.replay.take(mine[index])
            x, t = steps.states, self.grid[k]
            tuned = [self.model.tuned(x[part], t[part], take(condition, rows)) for part, condition, rows in pieces]
            advantage = returns - self.value(x, t / self.grid[0], prompts).to(returns)
            return (self.surrogate if self.exact else self._published)(torch.cat(tuned), steps, k, advantage)

        return loss

    def _published(self, tuned: Tensor, steps: Steps, k: Tensor, advantage: Tensor) -> Tensor:
        """Return the authors' loss, (B,); arguments as for ``surrogate``."""
        clip, log_ratio = self.settings.clip, self.weights.log_ratio(tuned - steps.predictions, steps.noise, k)
        ratio = (log_ratio / self.dimension).exp()
        self.hold(ratio)
        square = self.eps[k].to(tuned) * (tuned - steps.base).flatten(1).square().mean(1)
        gain = self.settings.reward_weight * advantage * ratio.clamp(1 - clip, 1 + clip)
        return self.settings.kl_weight * square - gain

    def buffers(self) -> dict[str, Tensor]:
        return {f"value.{k}": v for k, v in self.value.state().items()} | {
            f"replay.{k}": v for k, v in self.replay.state(self.processes).items()
        }

    def load_buffers(self, buffers: dict[str, Tensor]) -> None:
        parts: dict[str, dict[str, Tensor]] = {"value": {}, "replay": {}}
        for name, tensor in buffers.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        self.value.load(parts["value"])
        rows = self.processes.rows(self.settings.total)
        self.replay.load(parts["replay"], rows, self.conditions, self.model.device)
