"""What a pipeline's networks take and give besides the state: prompts, times, sizes, guidance, images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sdeblend.schedule import NoiseSchedule
from stablediffusion.pipelines.components import denoiser_of
from stablediffusion.pipelines.families import Arguments, Size, Text, call_parameters, family_of, unguided
from stablediffusion.pipelines.schedulers import timestep_of


def encode_prompts(pipe: Any, prompts: Sequence[str]) -> list[Text]:
    """Encode prompts as a pipeline does.

    Args:
        pipe: a text-to-image pipeline.
        prompts: at least one.
    """
    return family_of(pipe).encode(pipe, list(prompts))


def encode_negatives(pipe: Any, negatives: Sequence[str] | None, positive: Sequence[Text]) -> list[Text]:
    """Encode negative prompts as a pipeline does.

    Args:
        pipe: a text-to-image pipeline.
        negatives: as many as prompts; None for what the pipeline has in their place: zeros (SDXL), or an empty prompt.
        positive: the encoded prompts.
    """
    if negatives is None and pipe.config.get("force_zeros_for_empty_prompt"):
        return [{name: part.new_zeros(part.shape) for name, part in text.items()} for text in positive]
    return encode_prompts(pipe, [""] * len(positive) if negatives is None else negatives)


def denoiser_arguments(
    pipe: Any, positive: Sequence[Text], negative: Sequence[Text], size: Size, embedded_guidance: float | None
) -> Arguments:
    """Return the denoiser's arguments besides state and time, which do not change over a run.

    Args:
        pipe: a text-to-image pipeline.
        positive, negative: from ``encode_prompts``, one a row; negatives, which come first, as many or none.
        size: height and width in pixels.
        embedded_guidance: input of a guidance-distilled network; the pipeline's own if None.
    """
    if embedded_guidance is None:
        embedded_guidance = own_guidance(pipe)[1]
    return family_of(pipe).arguments(pipe, [*negative, *positive], size, embedded_guidance)


def network_time(pipe: Any, schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """Return what a pipeline calls its denoiser with at time t, float64."""
    return family_of(pipe).time(timestep_of(schedule, t, pipe.scheduler))


def guidance_names(pipe: Any) -> tuple[str | None, str | None]:
    """Return the arguments of a pipeline's call by which it guides, None where it does not.

    Returns:
        that of classifier-free guidance, and that of the guidance that a distilled denoiser takes as input.
    """
    known = call_parameters(pipe)
    if "true_cfg_scale" in known:
        return "true_cfg_scale", "guidance_scale"
    if "guidance_scale" not in known:
        return None, None
    embedded = bool(denoiser_of(pipe)[1].config.get("guidance_embeds"))
    return (None, "guidance_scale") if embedded else ("guidance_scale", None)


def own_guidance(pipe: Any) -> tuple[float, float | None]:
    """Return a pipeline's own guidance: its call's defaults, none for step-distilled models.

    Returns:
        scale of classifier-free guidance, as the pipeline counts it, and what a distilled denoiser takes as input.
    """
    free, embedded = guidance_names(pipe)
    known, none = call_parameters(pipe), unguided(pipe)
    # a model's card says Turbo, nothing else does: class and configuration are those of the model it was distilled from
    distilled = pipe.config.get("is_distilled") or "turbo" in Path(pipe.name_or_path or "").name.lower()
    scale = none if free is None or distilled else float(known[free])
    return scale, None if embedded is None else known[embedded]


def guidance_weight(pipe: Any, scale: float | None) -> float:
    """Return g of classifier-free guidance, 1 for none; see ``guided``.

    Args:
        pipe: a text-to-image pipeline.
        scale: as the pipeline counts it (Z-Image: g - 1); its own if None.

    Raises:
        ValueError: guidance for a model that was distilled to take none.
    """
    none = unguided(pipe)
    if scale is not None and scale != none and pipe.config.get("is_distilled"):
        raise ValueError(
            f"a step-distilled {type(pipe).__name__} takes no guidance, got a scale of {scale:g}; leave it out"
        )
    return (own_guidance(pipe)[0] if scale is None else float(scale)) - none + 1


def call_guidance(pipe: Any, scale: float | None) -> tuple[dict[str, float], bool]:
    """Return what a pipeline is to be called with for a guidance scale, and whether negative prompts count then.

    Args:
        pipe: a pipeline.
        scale: input of a denoiser that takes one, else of classifier-free guidance; the pipeline's own if None.

    Raises:
        ValueError: a scale for a pipeline that takes none.
    """
    free, embedded = guidance_names(pipe)
    own = own_guidance(pipe)[1]
    if embedded is not None and denoiser_of(pipe)[1].config.get("guidance_embeds"):
        value = own if scale is None else scale
        return ({} if value is None else {embedded: value}), False
    if free is None:
        if scale is None:
            return {}, False
        raise ValueError(f"{type(pipe).__name__} takes no guidance, got a scale of {scale:g}; leave it out")
    value = guidance_weight(pipe, scale) - 1 + unguided(pipe)
    return {free: value}, value != unguided(pipe)


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
    """Return height and width in pixels, the model's own where None.

    Raises:
        ValueError: if the denoiser's tokens do not fill them.
    """
    family, scale = family_of(pipe), pipe.vae_scale_factor
    own = family.side
    if own is None:
        own = scale * (getattr(pipe, "default_sample_size", None) or denoiser_of(pipe)[1].config.sample_size)
    size, unit = (height or own, width or own), scale * family.patch
    if any(length % unit for length in size):
        raise ValueError(
            f"height and width of {type(pipe).__name__} must be multiples of {unit} pixels, got {size[0]} x {size[1]}; "
            "round them"
        )
    return size


def images_of(pipe: Any, latents: Tensor, size: Size) -> Tensor:
    """Return the images of clean latents, (B, 3, H, W) in [0, 1], differentiable.

    Args:
        pipe: its autoencoder decodes, in the autoencoder's dtype.
        latents: (B, *event) at t = 0; packed where the pipeline packs them.
        size: height and width in pixels.
    """
    vae = pipe.vae
    decoded = vae.decode(family_of(pipe).latents(pipe, latents.to(vae.dtype), size), return_dict=False)[0]
    # an autoencoder of videos gives one frame
    return ((decoded[:, :, 0] if decoded.ndim == 5 else decoded) / 2 + 0.5).clamp(0, 1)
