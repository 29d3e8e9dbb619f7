"""What all trainers share: the batch, the descent step, the average of the parameters, and the whole state.

Every trainer maximises

    E[r(x_0)] - kl_weight KL(tuned process || base process),

whose optimum, for a memoryless process, is p_base exp(r / kl_weight) / Z. A trainer differs from another in how it
estimates the gradient. ``iterate`` does one round: draw, score, update.

All random numbers come from one generator, and noise is drawn for the whole batch before it is shared out, so that a
run can be resumed bit for bit and does not depend on the number of processes (up to the order of sums).

Source: Fan et al. 2305.16381; Domingo-Enrich et al. 2409.08861 (memoryless processes).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from torch import Tensor

from sdeblend.finetune.chain import Chain, draw_noise
from sdeblend.finetune.model import Condition, Tunable, flat_parameters, take
from sdeblend.grid import Spacing, time_grid
from sdeblend.reward import WeightedReward

Metrics = dict[str, float]


@dataclass(frozen=True)
class Settings:
    """What every trainer needs to know.

    Attributes:
        kl_weight: alpha, in units of the reward.
        groups: conditions (prompts) an iteration.
        group_size: samples a condition.
        steps: steps of the sampling chain.
        spacing: of its times, see ``sdeblend.grid``; uniform steps in t are coarse where modes are sharp, and what
            a trainer learns from its own samples inherits that.
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        clip_norm: largest norm of a gradient; infinity for none.
        ema_decay: of the averaged parameters that are saved, at most (n + 1) / (n + 10) after n steps of the optimiser,
            so that a short run does not save the base it started from; 0 saves the last ones.
        micro_batch: rows evaluated at once, fewer where the model says so (``Tunable.graded_batch``); gradients are
            accumulated over the batch.
        seed: of every random number of the run.

    Raises:
        ValueError: for a value outside its range.
    """

    # A trainer that compares the samples of a group needs two; one with a value function does with one.
    least_group: ClassVar[int] = 2

    kl_weight: float = 1.0
    groups: int = 1
    group_size: int = 256
    steps: int = 50
    spacing: Spacing = "log-snr"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    ema_decay: float = 0.0
    micro_batch: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("groups", 1), ("group_size", self.least_group), ("steps", 2), ("micro_batch", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        for name in ("kl_weight", "learning_rate", "clip_norm"):
            value = getattr(self, name)
            if not value > 0 or (name != "clip_norm" and not math.isfinite(value)):
                raise ValueError(f"{name} must be above 0, got {value}; {_HINTS[name]}")
        if self.spacing not in get_args(Spacing):
            raise ValueError(f"spacing must be one of {', '.join(get_args(Spacing))}, got {self.spacing!r}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie within [0, 1), got {self.ema_decay}; 0 is no average")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay}")

    @property
    def total(self) -> int:
        """Samples an iteration, over all processes."""
        return self.groups * self.group_size


_HINTS = {
    "kl_weight": "it is the alpha of exp(r / alpha)",
    "learning_rate": "1e-3 suits a LoRA of a small network, 1e-5 to 1e-4 Stable Diffusion",
    "clip_norm": "give inf for none",
}


class LossScale:
    """A factor on the loss that keeps gradients in half precision from vanishing, found while training.

    It doubles after ``patience`` steps in a row whose gradients were finite, and halves after one whose were not;
    that one is left out.

    Attributes:
        factor: now.
        steps: finite steps since it last changed.

    Source: Micikevicius et al. 1710.03740.
    """

    patience: ClassVar[int] = 2000

    def __init__(self) -> None:
        self.factor, self.steps = 2.0**16, 0

    def accept(self, finite: bool) -> bool:
        """Take note of a step's gradients; return whether to leave the step out.

        Nothing is left out at a factor of 1 or less: then the gradients themselves are not finite.
        """
        if finite:
            self.steps += 1
            if self.steps == self.patience:
                self.factor, self.steps = 2 * self.factor, 0
            return False
        if self.factor <= 1:
            return False
        self.factor, self.steps = self.factor / 2, 0
        return True


class Workers:
    """The processes that share a batch: here one. ``sdeblend.finetune.workers`` has several.

    Attributes:
        index: this process.
        count: number of processes.
    """

    index = 0
    count = 1
    # None, or what keeps small gradients in half precision.
    scaler: LossScale | None = None

    @property
    def main(self) -> bool:
        """Whether this process writes files and speaks to the user."""
        return self.index == 0

    def wait(self) -> None:
        """Wait for the other processes."""

    def rows(self, total: int) -> slice:
        """Return the rows of this process in a batch of ``total``.

        Raises:
            ValueError: if the batch cannot be shared out evenly.
        """
        if total % self.count:
            raise ValueError(f"{self.count} processes need a batch they divide, got {total}; change groups")
        share = total // self.count
        return slice(self.index * share, (self.index + 1) * share)

    def add(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by its sum over the processes."""

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the rows of all processes, in order."""
        return tensor


@dataclass
class Batch:
    """The samples of one iteration that this process has.

    Attributes:
        condition: of its rows.
        noise: of its rows, (n, B, *event).
        rows: which rows of the whole batch these are.
    """

    condition: Condition | None
    noise: Tensor
    rows: slice


class Trainer(ABC):
    """One way to tune a model for a reward at a KL weight.

    Args:
        model: base and trainable difference.
        reward: one or several weighted rewards.
        settings: see ``Settings``; a trainer may take a subclass with settings of its own.
        workers: the processes that share each batch.
    """

    name: ClassVar[str]
    # Whether kl_weight is the alpha of the optimum.
    calibrated: bool = True

    def __init__(
        self, model: Tunable, reward: WeightedReward, settings: Settings, workers: Workers | None = None
    ) -> None:
        self.model, self.reward, self.settings = model, reward, settings
        self.workers = workers or Workers()
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.parameters = flat_parameters(model)
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.average = [p.detach().clone() for p in self.parameters] if settings.ema_decay else None
        self.chain = Chain.of(model, time_grid(model.schedule, settings.steps, settings.spacing))
        self.micro_batch = min(settings.micro_batch, model.graded_batch or settings.micro_batch)
        self.iteration = 0
        # Reward evaluations so far, of all processes: what users pay for.
        self.reward_calls = 0

    @abstractmethod
    def iterate(self) -> Metrics:
        """Do one round: draw samples, score them, update the parameters.

        Returns:
            numbers to log, at least "reward" (mean), "kl" (nats a sample, to the base) and "loss".

        Raises:
            ValueError: a reward that is not finite or of another shape.
            FloatingPointError: samples, a loss or a gradient that is not finite.
        """

    def draw(self) -> Batch:
        """Draw this iteration's conditions and noise and return this process's share of them."""
        total = self.settings.total
        rows = self.workers.rows(total)
        condition = self.model.conditions(self.settings.groups, self.settings.group_size, self.generator)
        noise = draw_noise(self.model, self.chain, rows, total, self.generator)
        return Batch(take(condition, torch.arange(total)[rows]), noise, rows)

    def score(self, samples: Tensor, condition: Condition | None) -> Tensor:
        """Return the rewards of clean samples, (B,), in the dtype of the samples; counts the calls.

        Raises:
            FloatingPointError: for samples that are not finite, or whose squares are not: what a reward makes of them
                is not its fault.
        """
        seen = self.model.decode(samples)
        for words, values in (("samples", samples), ("decoded samples", seen)):
            bad = ~values.detach().square().flatten(1).sum(1).isfinite()
            if bool(bad.any()):
                raise FloatingPointError(
                    f"{words} and their squares must stay finite, got others in {int(bad.sum())} of {len(bad)} in "
                    f"iteration {self.iteration + 1}; lower learning_rate or raise kl_weight"
                )
        self.reward_calls += len(samples) * self.workers.count
        return self.reward(seen, condition).to(samples.dtype)

    def descend(self, rows: int, loss_of: Callable[[Tensor], Tensor], *, total: int | None = None) -> float:
        """Take one optimiser step on the mean of a loss over the batch.

        Args:
            rows: number of rows of this process.
            loss_of: index (N,) of some of these rows -> their losses (N,), differentiable.
            total: rows over all processes; ``rows`` times the number of processes if left out.

        Returns:
            the mean loss over all processes.

        Raises:
            FloatingPointError: if loss or gradient is not finite; the parameters are as they were.
        """
        total = rows * self.workers.count if total is None else total
        self.optimizer.zero_grad(set_to_none=False)
        summed = torch.zeros((), dtype=torch.float64)
        scaler = self.workers.scaler
        scale = 1.0 if scaler is None else scaler.factor
        # A process may have none of a drawn subset of the rows; its gradient is then 0.
        for index in torch.arange(rows).split(self.micro_batch) if rows else ():
            loss = loss_of(index).sum() / total
            (loss * scale).backward()
            summed += loss.detach().double().cpu()
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        self.workers.add([*gradients, summed])
        if scale != 1:
            for gradient in gradients:
                gradient /= scale
        norm = torch.nn.utils.get_total_norm(gradients)
        if scaler is not None and math.isfinite(float(summed)) and scaler.accept(math.isfinite(float(norm))):
            return float(summed)
        if not (math.isfinite(float(summed)) and math.isfinite(float(norm))):
            raise FloatingPointError(
                f"training must stay finite, got a loss of {float(summed):g} and a gradient of {float(norm):g} in "
                f"iteration {self.iteration + 1}; lower learning_rate or raise kl_weight"
            )
        torch.nn.utils.clip_grads_with_norm_(self.parameters, self.settings.clip_norm, norm)
        self.optimizer.step()
        if self.average is not None:
            # AdamW counts the steps, and is saved with a checkpoint.
            count = int(self.optimizer.state[self.parameters[0]]["step"])
            decay = min(self.settings.ema_decay, (1 + count) / (10 + count))
            for mean, parameter in zip(self.average, self.parameters, strict=True):
                mean.lerp_(parameter.detach(), 1 - decay)
        return float(summed)

    def mean(self, values: Tensor) -> float:
        """Return the mean of one number a row, (B,), over all processes."""
        return float(self.workers.gather(values.detach()).double().mean())

    def buffers(self) -> dict[str, Tensor]:
        """Return what a trainer keeps besides parameters and optimiser (value network, replay buffer), by name."""
        return {}

    def load_buffers(self, buffers: dict[str, Tensor]) -> None:
        """Take back what ``buffers`` returned."""
        if buffers:
            raise ValueError(f"{self.name} keeps no buffers, got {', '.join(buffers)}; resume with the same trainer")
