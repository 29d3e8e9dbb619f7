"""What a pipeline's networks take and give besides state and time: prompt embeddings, sizes, decoded images.

One place for what differs between Stable Diffusion, SDXL, SD 3 and Flux; diffusers keeps it inside each ``__call__``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stablediffusion.pipelines.components import denoiser_of


def encode_prompts(
    pipe: Any, prompts: Sequence[str], negatives: Sequence[str], images: int, guided: bool
) -> tuple[Tensor | None, ...]:
    """Encode prompts as a pipeline does.

    Args:
        pipe: a text-to-image pipeline.
        prompts, negatives: as many of each; negatives count only if ``guided``.
        images: rows a prompt.
        guided: whether negative prompts are wanted.

    Returns:
        (positive, negative, pooled positive, pooled negative) embeddings, None where there is none.
    """
    name, device = type(pipe).__name__, pipe._execution_device
    if name.startswith("Flux"):
        length = min(512, pipe.tokenizer_2.model_max_length)
        both = [
            pipe.encode_prompt(list(texts), None, device, images, max_sequence_length=length)
            for texts in ((prompts, negatives) if guided else (prompts,))
        ]
        positive, negative = both[0], both[-1] if guided else (None, None)
        return positive[0], negative[0], positive[1], negative[1]
    arguments = {
        "prompt": list(prompts),
        "device": device,
        "num_images_per_prompt": images,
        "do_classifier_free_guidance": guided,
        "negative_prompt": list(negatives) if guided else None,
    }
    if name.startswith("StableDiffusion3"):
        length = 256 if pipe.tokenizer_3 is None else min(256, pipe.tokenizer_3.model_max_length)
        return pipe.encode_prompt(prompt_2=None, prompt_3=None, max_sequence_length=length, **arguments)
    out = pipe.encode_prompt(**arguments)
    return out if len(out) == 4 else (*out, None, None)


def denoiser_arguments(
    pipe: Any,
    embeddings: tuple[Tensor | None, ...],
    size: tuple[int, int],
    branches: int,
    embedded_guidance: float,
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
    (network_name, network), scale = denoiser_of(pipe), pipe.vae_scale_factor

    def both(minus: Tensor | None, plus: Tensor | None) -> Tensor:
        return torch.cat([part for part in (minus if branches == 2 else None, plus) if part is not None])

    fixed: dict[str, Any] = {"encoder_hidden_states": both(negative, positive)}
    rows, device, dtype = len(fixed["encoder_hidden_states"]), pipe._execution_device, network.dtype
    if type(pipe).__name__.startswith("Flux"):
        tall, wide = (2 * (length // (scale * 2)) for length in size)
        fixed["pooled_projections"] = both(negative_pooled, pooled)
        fixed["img_ids"] = pipe._prepare_latent_image_ids(rows, tall // 2, wide // 2, device, dtype)
        fixed["txt_ids"] = torch.zeros(fixed["encoder_hidden_states"].shape[1], 3, device=device, dtype=dtype)
        if network.config.guidance_embeds:
            fixed["guidance"] = torch.full((rows,), embedded_guidance, device=device, dtype=torch.float32)
        return (tall * wide // 4, network.config.in_channels), fixed
    if network_name == "transformer":
        fixed["pooled_projections"] = both(negative_pooled, pooled)
    elif pooled is not None:
        width = pipe.text_encoder_2.config.projection_dim
        ids = pipe._get_add_time_ids(size, (0, 0), size, dtype, text_encoder_projection_dim=width)
        added = {"text_embeds": both(negative_pooled, pooled), "time_ids": ids.to(device).repeat(rows, 1)}
        fixed["added_cond_kwargs"] = added
    return (network.config.in_channels, size[0] // scale, size[1] // scale), fixed


def image_size(pipe: Any, height: int | None, width: int | None) -> tuple[int, int]:
    """Return height and width in pixels, the model's own where None."""
    side = getattr(pipe, "default_sample_size", None) or denoiser_of(pipe)[1].config.sample_size
    return height or side * pipe.vae_scale_factor, width or side * pipe.vae_scale_factor


def decode_latents(pipe: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the images of clean latents, (B, 3, H, W) around -1..1, differentiable.

    Args:
        pipe: its autoencoder decodes, in the autoencoder's dtype.
        latents: (B, *event) at t = 0; Flux's packed.
        size: height and width in pixels.
    """
    vae = pipe.vae
    if type(pipe).__name__.startswith("Flux"):
        latents = pipe._unpack_latents(latents, *size, pipe.vae_scale_factor)
    mean, std = (vae.config.get(f"latents_{what}") for what in ("mean", "std"))
    if mean is not None and std is not None:
        shape = (1, -1, 1, 1)
        latents = latents * latents.new_tensor(std).view(shape) / vae.config.scaling_factor
        latents = latents + latents.new_tensor(mean).view(shape)
    else:
        latents = latents / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
    return vae.decode(latents.to(vae.dtype), return_dict=False)[0]
