"""The families of text-to-image pipelines: the one place that looks at a pipeline's class.

A class is named by its family's stem, its tasks and "Pipeline", as StableDiffusionXL-Inpaint-Pipeline. Scores on
latents and tuning call the networks themselves, so they need what diffusers keeps inside each family's ``__call__``:
that is a row of ``FAMILIES``. An attached blend needs no row, it reads everything off the pipeline's own calls.

To add a family: a row here, and a row in ``stablediffusion.testing.families``, which brings it into the tests.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stablediffusion.pipelines.components import denoiser_of

# positive, negative, pooled positive, pooled negative; None where there is none
Embeddings = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
Size = tuple[int, int]

# What may stand between stem and "Pipeline"; any other word makes another family, which its own row must name.
_TASKS = re.compile("(PAG|Img2Img|Inpaint|ControlNet|Control|Union|XS|Adapter)*")


def _unchanged(pipe: Any, latents: Tensor, size: Size) -> Tensor:
    return latents


def _none(pipe: Any, pooled: Tensor | None, text: Tensor, size: Size, guidance: float) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Family:
    """How the networks of a family are called.

    Attributes:
        stem: what the names of its classes begin with.
        encode: (pipe, prompts, negatives, images a prompt, guided) -> ``Embeddings``.
        event: (pipe, height and width in pixels) -> shape of one image's state.
        conditions: (pipe, pooled embeddings, prompt embeddings, size, embedded guidance) -> the denoiser's arguments
            besides state, time and prompt embeddings; a row each.
        unpack: (pipe, latents, size) -> what the autoencoder decodes.
        time_scale: the denoiser's time is the scheduler's timestep times this.
    """

    stem: str
    encode: Callable[[Any, list[str], list[str], int, bool], Embeddings]
    event: Callable[[Any, Size], tuple[int, ...]]
    conditions: Callable[[Any, Tensor | None, Tensor, Size, float], dict[str, Any]]
    unpack: Callable[[Any, Tensor, Size], Tensor] = _unchanged
    time_scale: float = 1.0


def family_of(pipe: Any) -> Family:
    """Return the family of a pipeline, or of the pipeline that its class extends.

    Raises:
        ValueError: for another class.
    """
    return _row(pipe)[0]


def text_to_image(pipe: Any, what: str) -> Family:
    """Return the family of a text-to-image pipeline.

    Args:
        pipe: a pipeline.
        what: needs one, for messages.

    Raises:
        ValueError: another task, or another class.
    """
    family, tasks = _row(pipe)
    if tasks not in ("", "PAG"):
        raise ValueError(
            f"{what} needs a text-to-image pipeline, got {type(pipe).__name__}; attach a blend to it instead"
        )
    return family


def paints_over(pipe: Any) -> bool:
    """Return whether a pipeline replaces a part of the state after each step: inpainting by a plain denoiser."""
    return "Inpaint" in type(pipe).__name__ and denoiser_of(pipe)[1].config.in_channels == 4


def _row(pipe: Any) -> tuple[Family, str]:
    for name in (kind.__name__ for kind in type(pipe).__mro__):
        for stem, family in FAMILIES.items():
            tasks = name.removeprefix(stem).removesuffix("Pipeline")
            if name == f"{stem}{tasks}Pipeline" and _TASKS.fullmatch(tasks):
                return family, tasks
    raise ValueError(
        f"a score on latents or tuning needs a text-to-image pipeline of {', '.join(FAMILIES)}, got "
        f"{type(pipe).__name__}; attach a blend to it instead"
    )


def _plain_encode(
    pipe: Any, prompts: list[str], negatives: list[str], images: int, guided: bool, **more: Any
) -> Embeddings:
    out = pipe.encode_prompt(
        prompt=prompts,
        device=pipe._execution_device,
        num_images_per_prompt=images,
        do_classifier_free_guidance=guided,
        negative_prompt=negatives if guided else None,
        **more,
    )
    return out if len(out) == 4 else (*out, None, None)


def _sd3_encode(pipe: Any, prompts: list[str], negatives: list[str], images: int, guided: bool) -> Embeddings:
    length = 256 if pipe.tokenizer_3 is None else min(256, pipe.tokenizer_3.model_max_length)
    more = {"prompt_2": None, "prompt_3": None, "max_sequence_length": length}
    return _plain_encode(pipe, prompts, negatives, images, guided, **more)


def _flux_encode(pipe: Any, prompts: list[str], negatives: list[str], images: int, guided: bool) -> Embeddings:
    length = min(512, pipe.tokenizer_2.model_max_length)

    def of(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        device = pipe._execution_device
        return pipe.encode_prompt(list(texts), None, device, images, max_sequence_length=length)[:2]

    positive, negative = of(prompts), of(negatives) if guided else (None, None)
    return positive[0], negative[0], positive[1], negative[1]


def _latent_event(pipe: Any, size: Size) -> tuple[int, ...]:
    channels, scale = denoiser_of(pipe)[1].config.in_channels, pipe.vae_scale_factor
    return channels, size[0] // scale, size[1] // scale


def _flux_grid(pipe: Any, size: Size) -> Size:
    tall, wide = (length // (2 * pipe.vae_scale_factor) for length in size)
    return tall, wide


def _flux_event(pipe: Any, size: Size) -> tuple[int, ...]:
    tall, wide = _flux_grid(pipe, size)
    return tall * wide, denoiser_of(pipe)[1].config.in_channels


def _sdxl_conditions(pipe: Any, pooled: Tensor | None, text: Tensor, size: Size, guidance: float) -> dict[str, Any]:
    width, dtype = pipe.text_encoder_2.config.projection_dim, denoiser_of(pipe)[1].dtype
    ids = pipe._get_add_time_ids(size, (0, 0), size, dtype, text_encoder_projection_dim=width)
    added = {"text_embeds": pooled, "time_ids": ids.to(pipe._execution_device).repeat(len(text), 1)}
    return {"added_cond_kwargs": added}


def _sd3_conditions(pipe: Any, pooled: Tensor | None, text: Tensor, size: Size, guidance: float) -> dict[str, Any]:
    return {"pooled_projections": pooled}


def _flux_conditions(pipe: Any, pooled: Tensor | None, text: Tensor, size: Size, guidance: float) -> dict[str, Any]:
    network, device, rows = denoiser_of(pipe)[1], pipe._execution_device, len(text)
    found = {
        "pooled_projections": pooled,
        "img_ids": pipe._prepare_latent_image_ids(rows, *_flux_grid(pipe, size), device, network.dtype),
        "txt_ids": torch.zeros(text.shape[1], 3, device=device, dtype=network.dtype),
    }
    if network.config.guidance_embeds:
        found["guidance"] = torch.full((rows,), guidance, device=device, dtype=torch.float32)
    return found


def _flux_unpack(pipe: Any, latents: Tensor, size: Size) -> Tensor:
    return pipe._unpack_latents(latents, *size, pipe.vae_scale_factor)


FAMILIES = {
    family.stem: family
    for family in (
        Family("StableDiffusion", _plain_encode, _latent_event, _none),
        Family("StableDiffusionXL", _plain_encode, _latent_event, _sdxl_conditions),
        Family("StableDiffusion3", _sd3_encode, _latent_event, _sd3_conditions),
        Family("Flux", _flux_encode, _flux_event, _flux_conditions, _flux_unpack, time_scale=1e-3),
    )
}
