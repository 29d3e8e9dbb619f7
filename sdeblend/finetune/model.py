"""What a trainer needs of a model: a base, a trainable difference to it, and conditions to draw.

A ``Tunable`` predicts eps, x0, v, a score or a flow velocity, at one time a row, with and without its trainable
part. Nothing else of a network is known here: a small network on a mixture and a UNet with a LoRA adapter are
trained by the same code.

A condition is what the prediction depends on besides x and t, one row a sample (prompts, say); None where there is
nothing. It can be restricted to rows, so that a batch may be cut, repeated and shared out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from sdeblend.parametrisation import Parametrisation, conversion
from sdeblend.reward import Condition, Reward
from sdeblend.schedule import NoiseSchedule
from sdeblend.shell.settings import Settings


class Tunable(Protocol):
    """A base and a trainable difference to it, on one forward process.

    Attributes:
        schedule: the forward process both belong to.
        prediction: what the network predicts.
        event: shape of one sample.
        device: where samples live.
        guidance: scale of classifier-free guidance in both predictions; 1 is none.
        graded_batch: most rows that ``tuned`` and ``base`` are to be given at once where gradients are wanted; None for
            any number.
    """

    schedule: NoiseSchedule
    prediction: Parametrisation
    event: tuple[int, ...]
    device: torch.device
    guidance: float
    graded_batch: int | None

    def tuned(self, x: Tensor, t: Tensor, condition: Condition | None, /) -> Tensor:
        """Return the prediction with the trainable part, (B, *event), at x (B, *event) and times t (B,) float64."""

    def base(self, x: Tensor, t: Tensor, condition: Condition | None, /) -> Tensor:
        """Return the prediction without it; differentiable in x, and in nothing else."""

    def trainable(self) -> Mapping[str, torch.nn.Parameter]:
        """Return the trainable parameters by name, and no others."""

    def conditions(self, groups: int, size: int, generator: torch.Generator, /) -> Condition | None:
        """Draw ``groups`` conditions, each repeated ``size`` times in a row: groups * size rows."""

    def decode(self, x: Tensor, /) -> Tensor:
        """Return what rewards see (images, say) of clean samples x (B, *event); differentiable."""

    def save(self, path: Path, metadata: Mapping[str, str], /) -> Path:
        """Write the trainable part as safetensors with string metadata; return the file's path."""

    def identity(self) -> str:
        """Return a short text that tells the base from any other (a hash of its weights, say)."""


class ModelSettings(Settings, ABC):
    """The ``[model]`` table of a backend, without its ``kind``: an entry point ``KIND = module:class`` of a subclass.

    Paths in it are relative to the working folder.
    """

    @abstractmethod
    def build(
        self, rewards: Sequence[str], /, *, file: Path, seed: int, device: torch.device
    ) -> tuple[Tunable, Mapping[str, Reward]]:
        """Build the model and its rewards.

        Args:
            rewards: the names in ``[rewards]``, each once; exactly these are returned.
            file: the settings file, for messages.
            seed: of the trainable part's first values, so that every process starts from the same.
            device: where to compute: this process's own.

        Returns:
            the model, its trainable part at a start where it changes nothing, and name -> reward.

        Raises:
            ValueError: for a model that cannot be used or a reward that does not exist, naming those that do.
        """

    def trainer_defaults(self) -> Mapping[str, object]:
        """Return settings of trainers where they are not the trainers' own; keys that one lacks do not count."""
        return {}


def take(condition: Condition | None, index: Tensor) -> Condition | None:
    """Return the condition of the rows ``index``; None stays None."""
    return None if condition is None else condition.rows(index)


def converted(model: Tunable, value: Tensor, x: Tensor, t: Tensor, target: Parametrisation) -> Tensor:
    """Convert a prediction made at one time a row.

    Args:
        model: gives schedule and source parametrisation.
        value: prediction (B, *event).
        x: state it was made at, (B, *event).
        t: times, float64 (B,).
        target: what is wanted.

    Returns:
        the prediction as ``target``, (B, *event), in the dtype of x.

    Source: ``sdeblend.score``.
    """
    if model.prediction == target:
        return value
    p, q = conversion(model.schedule, t, model.prediction, target)
    return per_row(p, x) * x + per_row(q, x) * value


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """Return one number a row, (B,), shaped to multiply ``like`` (B, *event), in its dtype and on its device."""
    return values.to(like).reshape(-1, *[1] * (like.ndim - 1))


def noised(schedule: NoiseSchedule, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """Return x_t = alpha(t) x_0 + sigma(t) eps for times t (B,), (B, *event)."""
    return per_row(schedule.alpha(t), x0) * x0 + per_row(schedule.sigma(t), x0) * eps


def flat_parameters(model: Tunable) -> list[torch.nn.Parameter]:
    """Return the trainable parameters in the order of their names."""
    named = model.trainable()
    return [named[name] for name in sorted(named)]
