"""Diffusers pipelines as what ``sdeblend finetune`` tunes."""

from stablediffusion.finetune.backend import build, trainer_defaults
from stablediffusion.finetune.tunable import Layers, PipelineTunable

__all__ = ["Layers", "PipelineTunable", "build", "trainer_defaults"]
