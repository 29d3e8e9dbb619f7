"""Diffusers pipelines as what ``sdeblend finetune`` tunes."""

from stablediffusion.finetune.backend import PipelineSettings
from stablediffusion.finetune.tunable import Layers, PipelineTunable

__all__ = ["Layers", "PipelineSettings", "PipelineTunable"]
