"""Diffusers pipelines on the core's own ``Blend``: attach a blend to a pipeline, or sample latents with ``solve``.

    members = load_members(pipe, {"compress": "compress.safetensors", "vivid": "vivid/"})
    with blend(pipe, members, Preference({"compress": 0.3, "vivid": 0.7})) as knobs:
        images = pipe("a red circle", eta=1.0).images

or, with the core's solver in place of the pipeline's, ``pipeline_score(pipe, prompt, members=members)``; or, on a
modular pipeline, ``pipe.update_components(guider=BlendGuidance(pipe.guider, {"compress": 0.3, "vivid": 0.7}))``.
"""

from stablediffusion.adapters.files import convert_lora, read_lora
from stablediffusion.adapters.loading import load_lora, save_lora
from stablediffusion.adapters.members import Member, Members, load_members
from stablediffusion.blending.attach import blend
from stablediffusion.blending.guider import BlendGuidance
from stablediffusion.blending.knobs import Knobs
from stablediffusion.blending.latents import PipelineScore, pipeline_score
from stablediffusion.blending.particles import EffectiveSamples
from stablediffusion.pipelines.flow_ancestral import FlowAncestral
from stablediffusion.pipelines.grids import scheduler_grid
from stablediffusion.pipelines.schedulers import schedule_of

__all__ = [
    "BlendGuidance",
    "EffectiveSamples",
    "FlowAncestral",
    "Knobs",
    "Member",
    "Members",
    "PipelineScore",
    "blend",
    "convert_lora",
    "load_lora",
    "load_members",
    "pipeline_score",
    "read_lora",
    "save_lora",
    "schedule_of",
    "scheduler_grid",
]
