"""The backend of ``sdeblend finetune`` for diffusers pipelines: a ``[model]`` table in, model and rewards out.

``kind = "pipeline"``; ``path`` is a folder or hub id, and ``prompts`` a file with one a line, or a list. Without a path
it is the bundled model, and then prompts may be left out too: they are captions as it was trained on, never those held
out for its evaluation. ``rewards`` is a table of the learned rewards' models, see ``stablediffusion.rewards``. The
other keys are the arguments of ``PipelineTunable``.

Where the file says nothing, trainers have other defaults than on mixtures (``trainer_defaults``):

    groups = 8, group_size = 16     prompts an iteration, images a prompt
    batch, value_batch = 512        of dpok, steps of the chain a gradient step
    buffer = 6400                   of dpok, in memory and in each checkpoint: 256 kB a step of Stable Diffusion 1.5 at
                                    512 x 512 pixels, 1.7 GB

and with a ``path``, which leads to a larger network than the bundled one,

    learning_rate = 1e-4            the bundled model: 1e-3
    recompute = true                of backprop, which differentiates through all steps
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from sdeblend.config import REQUIRED, Spec, check_keys
from sdeblend.finetune.model import Tunable
from sdeblend.reward import RewardFunction
from stablediffusion.finetune.tunable import Layers, PipelineTunable
from stablediffusion.pipelines.loading import load_pipeline
from stablediffusion.rewards.scoring import image_rewards
from stablediffusion.scenes.captions import training_captions
from stablediffusion.small.files import MODEL

_Precision = Literal["float32", "bfloat16", "float16"]
_OPTIONAL: Spec = {
    "rewards": (dict, {}),
    "rank": (int, 4),
    "alpha": (float, None),
    "layers": (list[Layers], ["attention"]),
    "guidance": (float, 1.0),
    "negative": (str, ""),
    "embedded_guidance": (float, 3.5),
    "height": (int, None),
    "width": (int, None),
    "checkpointing": (bool, False),
    "batch": (int, 16),
    "graded_batch": (int, None),
    "decode_batch": (int, 8),
    "dtype": (_Precision, "float32"),
    "save_dtype": (_Precision, "float32"),
}
_PROMPTS = str | list[str]
_DEFAULTS: Mapping[str, Any] = {"groups": 8, "group_size": 16, "batch": 512, "value_batch": 512, "buffer": 6400}
_LARGE: Mapping[str, Any] = {"learning_rate": 1e-4, "recompute": True}
_GIVEN: Spec = {"path": (str, REQUIRED), "prompts": (_PROMPTS, REQUIRED)} | dict(_OPTIONAL)
_BUNDLED: Spec = {"prompts": (_PROMPTS, None)} | dict(_OPTIONAL)


def build(
    table: Mapping[str, Any], rewards: Sequence[str], /, *, file: Path, seed: int, device: torch.device
) -> tuple[Tunable, dict[str, RewardFunction]]:
    """Build the pipeline with its adapter, and the rewards; see ``sdeblend.finetune.config.Builder``.

    Raises:
        ValueError: a key that does not exist, a pipeline that cannot be read or tuned, an unknown reward.
    """
    settings = check_keys(table, _GIVEN if "path" in table else _BUNDLED, file=file, section="[model]")
    found: dict[str, RewardFunction] = {**image_rewards(rewards, settings.pop("rewards"), file=file, device=device)}
    path, dtype = settings.pop("path", str(MODEL)), getattr(torch, settings.pop("dtype"))
    pipe = load_pipeline(path, dtype, what=f"{file}: [model] path").to(device)
    settings["save_dtype"] = getattr(torch, settings["save_dtype"])
    prompts = settings.pop("prompts")
    try:
        return PipelineTunable(pipe, training_captions if prompts is None else prompts, seed=seed, **settings), found
    except ValueError as error:
        raise ValueError(f"{file}: [model] {error}") from error


def trainer_defaults(table: Mapping[str, Any], /) -> Mapping[str, Any]:
    """Return the trainers' defaults for a ``[model]`` table; see the module's docstring."""
    return {**_DEFAULTS, **(_LARGE if "path" in table else {})}
