"""Tiny modular pipelines, from the components of the tiny pipelines."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import modular_pipelines

from stablediffusion.testing.pipelines import IMAGE_SIZE, tiny_pipeline
from stablediffusion.testing.text import T5_LENGTH

# What the names of a family's modular classes begin with.
MODULAR = {
    "sdxl": "StableDiffusionXL",
    "flux2-klein": "Flux2KleinBase",
    "qwen-image": "QwenImage",
    "z-image": "ZImage",
}


def tiny_modular(family: str = "sdxl", *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """Build a random modular pipeline of a family, with the components of ``tiny_pipeline(family)``.

    Args:
        family: of ``MODULAR``.
        seed: of the weights.
        dtype: of every network.

    Returns:
        a diffusers ``ModularPipeline`` of its default blocks, progress bars off.

    Raises:
        ValueError: for a family that has none here.
    """
    if family not in MODULAR:
        raise ValueError(f"a tiny modular pipeline exists for {', '.join(MODULAR)}, got {family!r}")
    parts = tiny_pipeline(family, seed=seed, dtype=dtype).components
    pipe = getattr(modular_pipelines, f"{MODULAR[family]}ModularPipeline")()
    pipe.update_components(
        **{name: part for name, part in parts.items() if name in pipe.components and part is not None}
    )
    pending = [pipe._blocks]
    while pending:
        block = pending.pop()
        pending += block.sub_blocks.values()
        if hasattr(block, "progress_bar"):
            block.set_progress_bar_config(disable=True)
    return pipe


def tiny_modular_call(pipe: Any, steps: int = 3) -> dict[str, Any]:
    """Return what a tiny modular pipeline must be called with, besides prompt and generator, for a quick run.

    Args:
        pipe: what ``tiny_modular`` returned.
        steps: number of inference steps.

    Returns:
        keyword arguments: steps and size, and ``output="latents"``.
    """
    given = {"num_inference_steps": steps, "max_sequence_length": T5_LENGTH, "height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return {"output": "latents"} | {name: value for name, value in given.items() if name in pipe.blocks.input_names}
