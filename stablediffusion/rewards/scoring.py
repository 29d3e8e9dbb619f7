"""Rewards of images by name, wherever they come from, and scores that one bad image does not spoil.

A name is one of ``formulas.REWARDS``, a function of one's own as ``"package.module:function"``, or one of
``learned.SCORERS``, whose weights are a folder or a hub id. A settings file says which, by name, where the default is
not wanted, in a table such as

    [model.rewards]
    hpsv2 = "weights/hpsv2"                                       # folder or hub id
    pickscore = { revision = "main", dtype = "float16", batch = 8 }   # any of these, and model
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sdeblend.config import Spec, check_keys
from sdeblend.shell.files import write_atomically
from stablediffusion.rewards.formulas import REWARDS, ImageReward, find_reward

BATCH = 16
_MODEL: Spec = {
    "model": (str, None),
    "revision": (str, None),
    "dtype": (Literal["float32", "bfloat16", "float16"], "float32"),
    "batch": (int, BATCH),
}


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


def image_reward(
    name: str,
    model: str | None = None,
    *,
    revision: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch: int = BATCH,
) -> ImageReward:
    """Return a reward by its name; a learned one loads its weights.

    Args:
        name: of a reward; see the module's docstring.
        model: folder or hub id of a learned reward's weights; its own default if left out.
        revision: branch, tag or commit on the hub.
        device: where a learned reward computes.
        dtype: of a learned reward's weights.
        batch: images at a time in a learned reward.

    Raises:
        ValueError: an unknown name, weights that are missing or of another model, or a model for a reward without.
    """
    if ":" in name or name in REWARDS:
        if model is not None or revision is not None:
            raise ValueError(f"reward {name!r} loads no weights, got model {model!r}; leave model and revision out")
        return find_reward(name)
    # late: transformers takes seconds
    from stablediffusion.rewards.learned import SCORERS, load_scorer

    if name not in SCORERS:
        raise ValueError(
            f"a reward must be one of {', '.join((*REWARDS, *SCORERS))} or 'package.module:function', got {name!r}; "
            "correct it"
        )
    return load_scorer(name, model, revision=revision, device=device, dtype=dtype, batch=batch)


def image_rewards(
    names: Sequence[str],
    models: Mapping[str, Any],
    *,
    file: str | Path,
    section: str = "[model.rewards]",
    device: torch.device | str = "cpu",
) -> dict[str, ImageReward]:
    """Return rewards by name, their models as a settings file gives them.

    Args:
        names: of the rewards.
        models: name -> folder or hub id, or a table with ``model``, ``revision``, ``dtype`` and ``batch``.
        file: the settings file, for messages.
        section: how the table is headed there, for messages.
        device: where learned rewards compute.

    Raises:
        ValueError: a reward that does not exist or cannot be loaded, a key that is not known, a model for a reward
            that is not asked for.
    """
    for name in models:
        if name not in names:
            raise ValueError(
                f"{file}: {section} {name!r} is none of the rewards asked for ({', '.join(names)}); name it there, or "
                "take it out"
            )
    rewards = {}
    for name in names:
        given = models.get(name, {})
        if not isinstance(given, str | Mapping):
            raise ValueError(f"{file}: {section} {name} must be a folder, a hub id or a table, got {given!r}")
        table = {"model": given} if isinstance(given, str) else given
        head = f"{section[:-1]}.{name}]"
        options = check_keys(table, _MODEL, file=file, section=head)
        options["dtype"] = getattr(torch, options["dtype"])
        try:
            rewards[name] = image_reward(name, device=device, **options)
        except ValueError as error:
            raise ValueError(f"{file}: {head if name in models else '[rewards]'} {error}") from error
    return rewards


def score_each(
    rewards: Mapping[str, ImageReward],
    images: Tensor,
    condition: Any,
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


def _scored(reward: ImageReward, images: Tensor, condition: Any) -> tuple[Tensor, dict[int, str]]:
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
    path = folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '_', name)}.png"
    try:
        from sdeblend.shell.figures import encoded, montage

        write_atomically(path, encoded(montage(image.detach().float().nan_to_num(0.0, 1.0, 0.0)[None], 1)))
    except Exception as error:
        return f" (which could not be kept as {path}: {_sentence(error)})"
    return f" ({path})"
