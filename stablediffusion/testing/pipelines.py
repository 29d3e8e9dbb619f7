"""Whole pipelines of every family and task from tiny random components.

    pipe = tiny_pipeline("sd15", seed=0)
    image = pipe("a red circle", num_inference_steps=4, generator=torch.Generator().manual_seed(0)).images[0]

A tiny pipeline takes 16 x 16 images (8 x 8 latents) and prompts of lower-case text.
"""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

from stablediffusion.testing.families import FAMILIES
from stablediffusion.testing.families.tiny import LATENT_SIZE, TASKS
from stablediffusion.testing.networks import controlnet, seeded
from stablediffusion.testing.text import T5_LENGTH

IMAGE_SIZE = 2 * LATENT_SIZE
# Options of calls that begin with an image; other calls may take one, and need none.
_NEED_AN_IMAGE = ("strength", "mask_image", "controlnet_conditioning_scale", "_auto_resize")
_SPATIAL = ("vae_scale_factor", "vae_scale_factor_spatial", "vae_spatial_compression_ratio")
_TEMPORAL = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio")
# Sizes and prompts as they are: no size that a model prefers, no text around a prompt.
_AS_GIVEN = {
    "_auto_resize": False,
    "use_resolution_binning": False,
    "complex_human_instruction": None,
    "system_prompt": "",
    "prompt_template": {"template": "{}", "crop_start": 0},
}
_SUFFIX = dict(zip(TASKS, ("", "Img2Img", "Inpaint", "Inpaint", "ControlNet"), strict=True))


def tiny_pipeline(
    family: str = "sd15",
    task: str = "text2img",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    scheduler: Any = None,
) -> Any:
    """Build a random pipeline of a family that runs in milliseconds, offline.

    Args:
        family: of ``FAMILIES``.
        task: "text2img", "img2img", "inpaint" (4 channels), "inpaint9" (a UNet of 9), "controlnet";
            the last two for UNets only.
        seed: of the weights; the global generator is left as it was.
        dtype: of every network.
        scheduler: in place of the family's own (DDIM, or flow matching).

    Returns:
        a diffusers pipeline, progress bar off.

    Raises:
        ValueError: for an unknown family or task, or one that does not exist for the family.
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    tiny = FAMILIES[family]
    if task not in tiny.tasks:
        raise ValueError(f"a tiny {family} pipeline has no task {task!r}; {', '.join(tiny.tasks)} exist")
    with seeded(seed):
        parts = {"vae": tiny.vae(), **tiny.text()}
        more = 5 if task == "inpaint9" else 0
        denoiser = tiny.denoiser(more)
        name = "unet" if isinstance(denoiser, diffusers.UNet2DConditionModel) else "transformer"
        parts[name] = denoiser
        if tiny.second:
            parts[f"{name}_2"] = tiny.denoiser(more)
        if task == "controlnet":
            parts["controlnet"] = controlnet(denoiser)
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            # past diffusers' own ``to``, which warns about float32 modules that there are none of
            torch.nn.Module.to(part, dtype).eval().requires_grad_(False)
    parts["scheduler"] = tiny.scheduler() if scheduler is None else scheduler
    pipe = getattr(diffusers, f"{tiny.stem}{_SUFFIX[task]}Pipeline")(**parts, **tiny.extra)
    if hasattr(pipe, "default_sample_size"):
        pipe.default_sample_size = LATENT_SIZE
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _first(pipe: Any, names: tuple[str, ...]) -> int:
    return next((int(getattr(pipe, name)) for name in names if hasattr(pipe, name)), 1)


def tiny_image(seed: int = 0) -> Image.Image:
    """Return a random 16 x 16 RGB image."""
    pixels = np.random.default_rng(seed).integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def tiny_mask() -> Image.Image:
    """Return a 16 x 16 mask whose left half is to be painted."""
    pixels = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
    pixels[:, : IMAGE_SIZE // 2] = 255
    return Image.fromarray(pixels)


def tiny_call(pipe: Any, steps: int = 4) -> dict[str, Any]:
    """Return what a tiny pipeline must be called with, besides prompt and generator, for a quick run.

    Args:
        pipe: what ``tiny_pipeline`` returned.
        steps: number of inference steps.

    Returns:
        keyword arguments: steps, size, image and mask as the pipeline's call takes them, ``output_type="np"``.
    """
    known = inspect.signature(pipe.__call__).parameters
    side, frames = LATENT_SIZE * _first(pipe, _SPATIAL), 1 + _first(pipe, _TEMPORAL)
    given: dict[str, Any] = {"height": side, "width": side, "num_frames": frames, "max_area": side**2}
    given |= {"strength": 0.8, "mask_image": tiny_mask(), "max_sequence_length": T5_LENGTH} | _AS_GIVEN
    if any(name in known for name in _NEED_AN_IMAGE):
        given["image"] = tiny_image()
    call: dict[str, Any] = {"num_inference_steps": steps, "output_type": "np"}
    return call | {name: value for name, value in given.items() if name in known}
