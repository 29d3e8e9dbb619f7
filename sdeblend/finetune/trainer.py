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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sdeblend.finetune.model import Condition, Tunable, flat_parameters, take
from sdeblend.finetune.paths import draw_noise
from sdeblend.finetune.workers import LossScale
from sdeblend.grid import Spacing, time_grid
from sdeblend.reward import WeightedReward
from sdeblend.shell.processes import Processes
from sdeblend.shell.settings import Settings

Metrics = dict[str, float]
Loss = Callable[[Tensor], Tensor]


class TrainerSettings(Settings):
    """What every trainer needs to know.

    Attributes:
        kl_weight: alpha, in units of the reward.
        groups: conditions (prompts) an iteration.
        group_size: samples a condition; a trainer that compares the samples of a group needs two.
        steps: steps of the sampling chain.
        spacing: of its times, see ``sdeblend.grid``; uniform steps in t are coarse where modes are sharp, and what
            a trainer learns from its own samples inherits that.
        learning_rate: of AdamW; 1e-3 suits a LoRA of a small network, 1e-5 to 1e-4 Stable Diffusion.
        weight_decay: of AdamW.
        clip_norm: largest norm of a gradient; infinity for none.
        ema_decay: of the averaged parameters that are saved, at most (n + 1) / (n + 10) after n steps of the optimiser,
            so that a short run does not save the base it started from; 0 saves the last ones.
        micro_batch: rows evaluated at once, fewer where the model says so (``Tunable.graded_batch``); gradients are
            accumulated over the batch.
        seed: of every random number of the run.
    """

    kl_weight: Annotated[float, Field(gt=0), "a finite number above 0, the alpha of exp(r / alpha)"] = 1.0
    groups: int = Field(default=1, ge=1)
    group_size: int = Field(default=256, ge=2)
    steps: int = Field(default=50, ge=2)
    spacing: Spacing = "log-snr"
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    clip_norm: Annotated[float, Field(gt=0, allow_inf_nan=True), "a number above 0, inf for none"] = 1.0
    ema_decay: Annotated[float, Field(ge=0, lt=1), "a number within [0, 1), 0 for no average"] = 0.0
    micro_batch: int = Field(default=4096, ge=1)
    seed: int = 0

    @classmethod
    def preset(cls, given: Mapping[str, object], /) -> Mapping[str, object]:
        """Return the defaults that some of the given values choose in place of the class's own; here none."""
        return {}

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, given: dict[str, object]) -> dict[str, object]:
        return {**cls.preset(given), **given}

    @property
    def total(self) -> int:
        """Samples an iteration, over all processes."""
        return self.groups * self.group_size

    def to_json(self) -> dict[str, object]:
        """Return the settings by name as JSON has them: infinity, which no strict reader takes, is "inf"."""
        return {name: "inf" if value == math.inf else value for name, value in self}


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
        settings: of ``settings_class``.
        processes: those that share each batch.
        scale: keeps small gradients in half precision; None for gradients as they are.

    Attributes:
        name: as settings files have it.
        settings_class: what it needs to know, with its defaults, presets and checks.
        calibrated: whether ``kl_weight`` is the alpha of the optimum.
        iteration: rounds done.
        reward_calls: reward evaluations so far, of all processes: what users pay for.
    """

    name: ClassVar[str]
    settings_class: ClassVar[type[TrainerSettings]]
    calibrated: bool = True

    def __init__(
        self,
        model: Tunable,
        reward: WeightedReward,
        settings: TrainerSettings,
        processes: Processes | None = None,
        scale: LossScale | None = None,
    ) -> None:
        if not isinstance(settings, self.settings_class):
            wanted, given = self.settings_class.__name__, type(settings).__name__
            raise TypeError(f"trainer {self.name!r} needs {wanted}, got {given}; make them by its settings_class")
        self.model, self.reward, self.settings = model, reward, settings
        self.processes, self.scale = processes or Processes(), scale
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.parameters = flat_parameters(model)
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.average = [p.detach().clone() for p in self.parameters] if settings.ema_decay else None
        self.grid = time_grid(model.schedule, settings.steps, settings.spacing)
        self.micro_batch = min(settings.micro_batch, model.graded_batch or settings.micro_batch)
        self.iteration = self.reward_calls = 0
        self.prepare()

    def prepare(self) -> None:  # noqa: B027 (a trainer may need nothing)
        """Compute what the run needs besides; raise a ValueError for a model or settings it cannot do with."""

    @abstractmethod
    def iterate(self) -> Metrics:
        """Do one round: draw samples, score them, update the parameters.

        Returns:
            numbers to log, at least "reward" (mean), "kl" (nats a sample, to the base) and "loss".

        Raises:
            ValueError: a reward that is not finite or of another shape.
            FloatingPointError: samples, a loss or a gradient that is not finite.
        """

    def conditions(self, generator: torch.Generator) -> Condition | None:
        """Draw an iteration's conditions and return those of this process's rows."""
        drawn = self.model.conditions(self.settings.groups, self.settings.group_size, generator)
        return take(drawn, torch.arange(self.settings.total)[self.processes.rows(self.settings.total)])

    def draw(self) -> Batch:
        """Draw this iteration's conditions and noise and return this process's share of them."""
        rows, condition = self.processes.rows(self.settings.total), self.conditions(self.generator)
        noise = draw_noise(self.model, self.settings.steps, rows, self.settings.total, self.generator)
        return Batch(condition, noise, rows)

    def score(self, samples: Tensor, condition: Condition | None, *, graded: bool = False) -> Tensor:
        """Return the rewards of clean samples, (B,), in the dtype of the samples; counts the calls.

        Args:
            samples: (B, *event).
            condition: of the B samples.
            graded: whether gradients must reach the samples.

        Raises:
            FloatingPointError: for samples that are not finite, or whose squares are not: what a reward makes of them
                is not its fault.
            ValueError: for a reward without a gradient where one is needed.
        """
        seen = self.model.decode(samples)
        for words, values in (("samples", samples), ("decoded samples", seen)):
            bad = ~values.detach().square().flatten(1).sum(1).isfinite()
            if bool(bad.any()):
                raise FloatingPointError(
                    f"{words} and their squares must stay finite, got others in {int(bad.sum())} of {len(bad)} in "
                    f"iteration {self.iteration + 1}; lower learning_rate or raise kl_weight"
                )
        self.reward_calls += len(samples) * self.processes.count
        value = self.reward(seen, condition)
        if graded and not value.requires_grad:
            raise ValueError(
                "this trainer needs rewards that are differentiable in the sample, got one without a gradient; use the "
                "regression trainer"
            )
        return value.to(samples.dtype)

    def descend(self, rows: int, loss_of: Loss, *, total: int | None = None) -> float:
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
        total = rows * self.processes.count if total is None else total
        self.optimizer.zero_grad(set_to_none=False)
        summed = torch.zeros((), dtype=torch.float64)
        factor = 1.0 if self.scale is None else self.scale.factor
        # A process may have none of a drawn subset of the rows; its gradient is then 0.
        for index in torch.arange(rows).split(self.micro_batch) if rows else ():
            loss = loss_of(index).sum() / total
            (loss * factor).backward()
            summed += loss.detach().double().cpu()
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        self.processes.add([*gradients, summed])
        if factor != 1:
            for gradient in gradients:
                gradient /= factor
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.scale and math.isfinite(float(summed)) and self.scale.accept(math.isfinite(float(norm))):
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
        return float(self.processes.gather(values.detach()).double().mean())

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Give the model the averaged parameters for a while, if there is an average."""
        own = [p.detach().clone() for p in self.parameters]
        try:
            self.set_parameters(self.average or own)
            yield
        finally:
            self.set_parameters(own)

    @torch.no_grad()
    def set_parameters(self, values: Sequence[Tensor]) -> None:
        """Set the model's parameters, in the order of their names."""
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    def buffers(self) -> dict[str, Tensor]:
        """Return what a trainer keeps besides parameters and optimiser (value network, replay buffer), by name."""
        return {}

    def load_buffers(self, buffers: dict[str, Tensor]) -> None:
        """Take back what ``buffers`` returned."""
        if buffers:
            raise ValueError(f"{self.name} keeps no buffers, got {', '.join(buffers)}; resume with the same trainer")
