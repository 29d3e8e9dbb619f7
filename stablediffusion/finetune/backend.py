"""The backend of ``sdeblend finetune`` for diffusers pipelines: a ``[model]`` table in, model and rewards out.

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
from typing import Self

import torch
from pydantic import Field, model_validator

from sdeblend.finetune.model import ModelSettings, Tunable
from sdeblend.reward import Reward
from stablediffusion.finetune.tunable import Layers, PipelineTunable
from stablediffusion.pipelines.loading import load_pipeline
from stablediffusion.rewards.registry import Precision, WeightsByName, image_rewards
from stablediffusion.scenes.captions import training_captions
from stablediffusion.small.files import MODEL

_DEFAULTS: Mapping[str, object] = {"groups": 8, "group_size": 16, "batch": 512, "value_batch": 512, "buffer": 6400}
_LARGE: Mapping[str, object] = {"learning_rate": 1e-4, "recompute": True}


class PipelineSettings(ModelSettings):
    """The ``[model]`` table of a pipeline: besides those below, the arguments of ``PipelineTunable``.

    Attributes:
        path: folder or hub id; the bundled model if left out.
        prompts: a file with one a line, or a list; for the bundled model, if left out, captions as it was trained on,
            never those held out for its evaluation.
        rewards: where learned rewards have their weights, see ``stablediffusion.rewards.registry``.
        dtype: of the networks.
    """

    path: str | None = None
    prompts: str | tuple[str, ...] | None = None
    rewards: WeightsByName = Field(default_factory=dict)
    rank: int = 4
    alpha: float | None = None
    layers: tuple[Layers, ...] = ("attention",)
    guidance: float | None = None
    negative: str = ""
    embedded_guidance: float | None = None
    height: int | None = None
    width: int | None = None
    checkpointing: bool = False
    batch: int = 16
    graded_batch: int | None = None
    decode_batch: int = 8
    dtype: Precision = "float32"
    save_dtype: Precision = "float32"

    @model_validator(mode="after")
    def _with_prompts(self) -> Self:
        if self.path is not None and self.prompts is None:
            raise ValueError("prompts is missing; give a string or a list of strings, as path names another model")
        return self

    def build(
        self, rewards: Sequence[str], /, *, file: Path, seed: int, device: torch.device
    ) -> tuple[Tunable, dict[str, Reward]]:
        """Build the pipeline with its adapter, and the rewards; see ``ModelSettings``.

        Raises:
            ValueError: a pipeline that cannot be read or tuned, an unknown reward.
        """
        found = image_rewards(rewards, self.rewards, file=file, device=device)
        pipe = load_pipeline(self.path or str(MODEL), getattr(torch, self.dtype), what=f"{file}: [model] path")
        arguments = dict(self) | {"save_dtype": getattr(torch, self.save_dtype)}
        for key in ("path", "prompts", "rewards", "dtype"):
            del arguments[key]
        prompts = training_captions if self.prompts is None else self.prompts
        try:
            return PipelineTunable(pipe.to(device), prompts, seed=seed, **arguments), found
        except ValueError as error:
            raise ValueError(f"{file}: [model] {error}") from error

    def trainer_defaults(self) -> Mapping[str, object]:
        """Return the trainers' defaults; see the module's docstring."""
        return {**_DEFAULTS, **({} if self.path is None else _LARGE)}
