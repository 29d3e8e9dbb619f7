"""What a pipeline's networks take and give besides the state: prompt embeddings, times, sizes, guidance, images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdeblend.schedule import NoiseSchedule
from stablediffusion.pipelines.components import denoiser_of
from stablediffusion.pipelines.families import Embeddings, Size, family_of
from stablediffusion.pipelines.schedulers import timestep_of


def encode_prompts(
    pipe: Any, prompts: Sequence[str], negatives: Sequence[str], images: int, guided: bool
) -> Embeddings:
    """Encode prompts as a pipeline does.

    Args:
        pipe: a text-to-image pipeline.
        prompts, negatives: as many of each; negatives count only if ``guided``.
        images: rows a prompt.
        guided: whether negative prompts are wanted.

    Returns:
        (positive, negative, pooled positive, pooled negative) embeddings, None where there is none.
    """
    return family_of(pipe).encode(pipe, list(prompts), list(negatives), images, guided)


def denoiser_arguments(
    pipe: Any, embeddings: tuple[Tensor | None, ...], size: Size, branches: int, embedded_guidance: float
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Return the shape of one image's state, and the denoiser's arguments that do not change over a run.

    Args:
        pipe: a text-to-image pipeline.
        embeddings: from ``encode_prompts``.
        size: height and width in pixels.
        branches: 2 with classifier-free guidance (negative prompts first), else 1.
        embedded_guidance: input of a guidance-distilled Flux.
    """
    positive, negative, pooled, negative_pooled = embeddings
    family = family_of(pipe)

    def both(minus: Tensor | None, plus: Tensor | None) -> Tensor | None:
        return plus if branches == 1 or minus is None or plus is None else torch.cat([minus, plus])

    text = both(negative, positive)
    assert text is not None  # every family has prompt embeddings
    conditions = family.conditions(pipe, both(negative_pooled, pooled), text, size, embedded_guidance)
    return family.event(pipe, size), {"encoder_hidden_states": text, **conditions}


def network_time(pipe: Any, schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """Return what a pipeline calls its denoiser with at time t, float64."""
    return timestep_of(schedule, t, pipe.scheduler) * family_of(pipe).time_scale


def guided(branches: Tensor, guidance_scale: float, dim: int) -> Tensor:
    """Return what classifier-free guidance makes of its branches: negative + g (positive - negative).

    Args:
        branches: predictions; along ``dim`` the negative prompt's and the positive's, or one without guidance.
        guidance_scale: g.
        dim: which dimension goes.

    Source: Ho and Salimans 2207.12598.
    """
    if branches.shape[dim] == 1:
        return branches.squeeze(dim)
    negative, positive = branches.unbind(dim)
    return negative + guidance_scale * (positive - negative)


def image_size(pipe: Any, height: int | None, width: int | None) -> Size:
    """Return height and width in pixels, the model's own where None."""
    side = getattr(pipe, "default_sample_size", None) or denoiser_of(pipe)[1].config.sample_size
    return height or side * pipe.vae_scale_factor, width or side * pipe.vae_scale_factor


def images_of(pipe: Any, latents: Tensor, size: Size) -> Tensor:
    """Return the images of clean latents, (B, 3, H, W) in [0, 1], differentiable.

    Args:
        pipe: its autoencoder decodes, in the autoencoder's dtype.
        latents: (B, *event) at t = 0; Flux's packed.
        size: height and width in pixels.
    """
    vae = pipe.vae
    latents = family_of(pipe).unpack(pipe, latents, size)
    mean, std = (vae.config.get(f"latents_{what}") for what in ("mean", "std"))
    if mean is not None and std is not None:
        shape = (1, -1, 1, 1)
        latents = latents * latents.new_tensor(std).view(shape) / vae.config.scaling_factor
        latents = latents + latents.new_tensor(mean).view(shape)
    else:
        latents = latents / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
    return (vae.decode(latents.to(vae.dtype), return_dict=False)[0] / 2 + 0.5).clamp(0, 1)
