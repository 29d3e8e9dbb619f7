"""Every reward of images by its name, and where a settings file says that learned ones have their weights.

A name is one of ``REWARDS`` or a function of one's own, ``"package.module:function"``. A file says where the weights of
a learned reward are, by its name, where the default is not wanted, in a table such as

    [model.rewards]
    hpsv2 = "weights/hpsv2"                                       # folder or hub id
    pickscore = { revision = "main", dtype = "float16", batch = 8 }   # any of these, and model
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field

from sdeblend.reward import Reward, find_reward
from sdeblend.shell.settings import Settings
from stablediffusion.rewards.formulas import FORMULAS
from stablediffusion.rewards.learned import BATCH, LEARNED, Learned

REWARDS: Mapping[str, Reward | Learned] = {**FORMULAS, **LEARNED}
Precision = Literal["float32", "bfloat16", "float16"]


class Weights(Settings):
    """The table of one learned reward.

    Attributes:
        model: folder or hub id; the reward's own default if left out.
        revision: branch, tag or commit on the hub.
        dtype: of the weights.
        batch: images at a time.
    """

    model: str | None = None
    revision: str | None = None
    dtype: Precision = "float32"
    batch: int = Field(BATCH, ge=1)

    def options(self) -> dict[str, Any]:
        """Return what is given, as ``Learned`` takes it."""
        given = self.model_dump(exclude_unset=True)
        return given | ({"dtype": getattr(torch, self.dtype)} if "dtype" in given else {})


def _table(given: Any) -> Any:
    return {"model": given} if isinstance(given, str) else given


WeightsByName = Mapping[str, Annotated[Weights, BeforeValidator(_table), "a folder, a hub id or a table"]]


def image_reward(name: str, model: str | None = None, **options: Any) -> Reward:
    """Return a reward by its name; a learned one loads its weights.

    Args:
        name: of a reward; see the module's docstring.
        model: folder or hub id of a learned reward's weights.
        options: of a learned reward, see ``Learned``.

    Raises:
        ValueError: an unknown name, weights that are missing or of another model, or options for a reward without.
    """
    return find_reward(name, REWARDS, **({} if model is None else {"model": model}), **options)


def image_rewards(
    names: Sequence[str],
    weights: Mapping[str, Weights],
    *,
    file: str | Path,
    section: str = "[model.rewards]",
    device: torch.device | str = "cpu",
) -> dict[str, Reward]:
    """Return rewards by name, with weights where a settings file says.

    Args:
        names: of the rewards.
        weights: name -> table.
        file: the settings file, for messages.
        section: how the table is headed there, for messages.
        device: where learned rewards compute.

    Raises:
        ValueError: a reward that does not exist or cannot be loaded, weights for a reward that is not asked for.
    """
    for name in weights:
        if name not in names:
            raise ValueError(
                f"{file}: {section} {name!r} is none of the rewards asked for ({', '.join(names)}); name it there, or "
                "take it out"
            )
    rewards = {}
    for name in names:
        options = weights[name].options() if name in weights else {}
        if isinstance(REWARDS.get(name), Learned):
            options["device"] = device
        try:
            rewards[name] = image_reward(name, **options)
        except ValueError as error:
            head = f"{section[:-1]}.{name}]" if name in weights else "[rewards]"
            raise ValueError(f"{file}: {head} {error}") from error
    return rewards
