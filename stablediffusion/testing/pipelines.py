"""Whole pipelines of every family and task from tiny random components.

    pipe = tiny_pipeline("sd15", seed=0)
    image = pipe("a red circle", num_inference_steps=4, generator=torch.Generator().manual_seed(0)).images[0]

A tiny pipeline takes 16 x 16 images (8 x 8 latents) and prompts of lower-case text.
"""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

from stablediffusion.testing import networks, text

TASKS = ("text2img", "img2img", "inpaint", "inpaint9", "controlnet")
IMAGE_SIZE = 2 * networks.LATENT_SIZE

_STEM = {"sd15": "StableDiffusion", "sd21": "StableDiffusion", "sdxl": "StableDiffusionXL"}
_STEM |= {"sd3": "StableDiffusion3", "flux": "Flux"}
_SUFFIX = {"text2img": "", "img2img": "Img2Img", "inpaint": "Inpaint", "inpaint9": "Inpaint"}
_SUFFIX |= {"controlnet": "ControlNet"}


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
        family: "sd15", "sd21" (v-prediction), "sdxl", "sd3" or "flux".
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
    if family not in networks.FAMILIES:
        raise ValueError(f"family must be one of {', '.join(networks.FAMILIES)}, got {family!r}")
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    if family in ("sd3", "flux") and task in ("inpaint9", "controlnet"):
        raise ValueError(f"a tiny {family} pipeline has no task {task!r}; text2img, img2img and inpaint exist")
    with networks.seeded(seed):
        parts = _components(family, task)
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            # past diffusers' own ``to``, which warns about float32 modules that there are none of
            torch.nn.Module.to(part, dtype).eval().requires_grad_(False)
    parts["scheduler"] = scheduler if scheduler is not None else networks.scheduler(family)
    return _assemble(family, task, parts)


def sibling_pipeline(pipe: Any, task: str) -> Any:
    """Return a pipeline of another task over the same components (no copies).

    Args:
        pipe: what ``tiny_pipeline`` returned.
        task: "text2img", "img2img" or "inpaint".
    """
    stem = next(s for s in sorted(_STEM.values(), key=len, reverse=True) if type(pipe).__name__.startswith(s))
    family = next(name for name, value in _STEM.items() if value == stem)
    parts = {name: part for name, part in pipe.components.items() if name != "controlnet"}
    return _assemble(family, task, parts)


def tiny_image(seed: int = 0) -> Image.Image:
    """Return a random 16 x 16 RGB image."""
    pixels = np.random.default_rng(seed).integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def tiny_mask() -> Image.Image:
    """Return a 16 x 16 mask whose left half is to be painted."""
    pixels = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
    pixels[:, : IMAGE_SIZE // 2] = 255
    return Image.fromarray(pixels)


def _components(family: str, task: str) -> dict[str, Any]:
    parts: dict[str, Any] = {"vae": networks.autoencoder(family)}
    parts |= {"tokenizer": text.clip_tokenizer()}
    if family in ("sd15", "sd21"):
        parts["text_encoder"] = text.clip_encoder(activation="gelu" if family == "sd21" else "quick_gelu")
        parts |= {"safety_checker": None, "feature_extractor": None}
    elif family == "sdxl":
        parts["text_encoder"] = text.clip_encoder()
        parts |= {"tokenizer_2": text.clip_tokenizer(), "text_encoder_2": text.clip_encoder(projection=16)}
    elif family == "sd3":
        parts["text_encoder"] = text.clip_encoder(projection=16)
        parts |= {"tokenizer_2": text.clip_tokenizer(), "text_encoder_2": text.clip_encoder(projection=16)}
        parts |= {"tokenizer_3": text.t5_tokenizer(), "text_encoder_3": text.t5_encoder()}
    else:
        parts["text_encoder"] = text.clip_encoder()
        parts |= {"tokenizer_2": text.t5_tokenizer(), "text_encoder_2": text.t5_encoder()}
    if family in networks.DENOISERS:
        parts["transformer"] = networks.DENOISERS[family]()
    else:
        parts["unet"] = networks.unet(family, in_channels=9 if task == "inpaint9" else 4)
        if task == "controlnet":
            parts["controlnet"] = networks.controlnet(parts["unet"])
    return parts


def _assemble(family: str, task: str, parts: dict[str, Any]) -> Any:
    pipeline_class = getattr(diffusers, f"{_STEM[family]}{_SUFFIX[task]}Pipeline")
    extra = {"requires_safety_checker": False} if family in ("sd15", "sd21") else {}
    if family == "sdxl":
        # the watermarker needs a package of its own and would change the pixels
        extra["add_watermarker"] = False
    pipe = pipeline_class(**parts, **extra)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_call(pipe: Any, steps: int = 4) -> dict[str, Any]:
    """Return what a tiny pipeline must be called with, besides prompt and generator, for a quick run.

    Args:
        pipe: what ``tiny_pipeline`` returned.
        steps: number of inference steps.

    Returns:
        keyword arguments: steps, size, image and mask as the task needs them, ``output_type="np"``.
    """
    name = type(pipe).__name__
    call: dict[str, Any] = {"num_inference_steps": steps, "output_type": "np"}
    if name.startswith(("StableDiffusion3", "Flux")):
        call["max_sequence_length"] = text.T5_LENGTH
    if not name.startswith("StableDiffusion") or "Img2Img" not in name:
        call |= {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    if "Img2Img" in name or "Inpaint" in name:
        call |= {"image": tiny_image(), "strength": 0.8}
    if "Inpaint" in name:
        call["mask_image"] = tiny_mask()
    if "ControlNet" in name:
        call["image"] = tiny_image()
    return call
