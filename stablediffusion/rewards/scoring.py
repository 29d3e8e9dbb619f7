"""Scores of images that one bad image, or one bad reward, does not spoil."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdeblend.reward import Condition, Reward
from sdeblend.shell.files import write_atomically


@dataclass(frozen=True)
class Prompts:
    """The least condition that rewards need.

    Attributes:
        prompts: one an image.
    """

    prompts: tuple[str, ...]

    def rows(self, index: Tensor) -> Prompts:
        """Return the condition of the rows ``index``, long (N,), repeated rows allowed."""
        return Prompts(tuple(self.prompts[i] for i in index.tolist()))

    def __len__(self) -> int:
        return len(self.prompts)


def score_each(
    rewards: Mapping[str, Reward],
    images: Tensor,
    condition: Condition | None,
    *,
    keep: Path | None = None,
    stem: str = "",
    differentiate: bool = False,
) -> tuple[dict[str, Tensor], list[str]]:
    """Score images one reward at a time; a reward that fails on some of them costs these and no others.

    Where a reward raises an error on the batch it is asked again, image by image.

    Args:
        rewards: name -> reward.
        images: (B, 3, H, W) in [0, 1].
        condition: of the B rows, with ``prompts`` and ``rows``; None if no reward needs it.
        keep: folder for the images on which a reward failed, as PNG files; None keeps none.
        stem: how their names begin.
        differentiate: whether gradients are to reach the images; they may be NaN where the value is.

    Returns:
        name -> (B,) on the images' device, NaN where the reward failed; one sentence for each failure.
    """
    values: dict[str, Tensor] = {}
    failures: list[str] = []
    for name, reward in rewards.items():
        with torch.set_grad_enabled(differentiate):
            value, wrong = _scored(reward, images, condition)
        values[name] = value
        for row, what in sorted(wrong.items()):
            place = _kept(images[row], keep, f"{stem}{'-' if stem else ''}{name}-{row}")
            failures.append(f"reward {name!r} failed on image {row}{place}: {what}")
    return values, failures


def _scored(reward: Reward, images: Tensor, condition: Condition | None) -> tuple[Tensor, dict[int, str]]:
    """Return the values of one reward, (B,), and row -> what went wrong."""
    wrong: dict[int, str] = {}
    try:
        value = _checked(reward(images, condition), len(images)).to(images.device)
    except Exception:
        parts = []
        for row in range(len(images)):
            index = torch.tensor([row], device=images.device)
            try:
                one = _checked(reward(images[index], None if condition is None else condition.rows(index)), 1)
            except Exception as error:
                one, wrong[row] = torch.tensor([torch.nan]), _sentence(error)
            parts.append(one.to(images.device))
        value = torch.cat(parts) if parts else images.new_zeros(0)
    for row in (~value.isfinite()).nonzero().flatten().tolist():
        wrong.setdefault(row, f"its value is {float(value[row].detach())}")
    return torch.where(value.isfinite(), value, torch.nan), wrong


def _checked(value: Any, count: int) -> Tensor:
    if not isinstance(value, Tensor) or value.shape != (count,):
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"it must give a tensor of shape ({count},), got {got}")
    # float16 ends at 65504, and integers know no NaN
    return value if value.dtype == torch.float64 else value.float()


def _sentence(error: Exception) -> str:
    """Return the type and the first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}{f': {lines[0]}' if lines else ''}"


def _kept(image: Tensor, folder: Path | None, name: str) -> str:
    """Write an image (3, H, W), what is not finite as black, and return where, for a message."""
    if folder is None:
        return ""
    # late: it brings matplotlib
    from sdeblend.shell.figures import encoded, montage

    path = folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '_', name)}.png"
    try:
        picture = montage(image.detach().float().nan_to_num(0.0, 1.0, 0.0)[None], 1)
        write_atomically(path, encoded(picture))
    except Exception as error:
        return f" (which could not be kept as {path}: {_sentence(error)})"
    return f" ({path})"
