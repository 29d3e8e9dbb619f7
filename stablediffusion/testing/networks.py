"""Denoisers, autoencoders and schedulers: tiny ones for tests, larger ones for benchmarks.

A tiny UNet has two levels, one layer a block and attention at the lower level; a tiny transformer has two
blocks of each kind. Random weights make predictions of order one, so that members really differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)

FAMILIES = ("sd15", "sd21", "sdxl", "sd3", "flux")
LATENT_SIZE = 8
_TEXT_WIDTH = 16
_T5_WIDTH = 32


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw initial weights from ``seed``; networks take them from the global generator, restored after."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def unet(family: str, in_channels: int = 4) -> UNet2DConditionModel:
    """Return the tiny UNet of "sd15", "sd21" or "sdxl", 8 x 8 latents."""
    extra: dict[str, Any] = {}
    if family == "sd21":
        extra = {"attention_head_dim": (2, 4), "use_linear_projection": True}
    elif family == "sdxl":
        extra = {
            "attention_head_dim": (2, 4),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "transformer_layers_per_block": (1, 2),
            "projection_class_embeddings_input_dim": _TEXT_WIDTH + 6 * 8,
        }
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=in_channels,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=2 * _TEXT_WIDTH if family == "sdxl" else _TEXT_WIDTH,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **({"attention_head_dim": 2} | extra),
    )


def sd3_transformer() -> SD3Transformer2DModel:
    """Return the tiny SD 3 transformer, 8 x 8 latents of 16 channels (its inpainting accepts no other)."""
    return SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=_T5_WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * _TEXT_WIDTH,
        pos_embed_max_size=16,
    )


def flux_transformer(guidance_embeds: bool = False) -> FluxTransformer2DModel:
    """Return the tiny Flux transformer on packed latents of 16 channels."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=_T5_WIDTH,
        pooled_projection_dim=_TEXT_WIDTH,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance_embeds,
    )


def autoencoder(family: str) -> AutoencoderKL:
    """Return the tiny autoencoder of a family: latents at half the image size."""
    flow = family in ("sd3", "flux")
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=16 if family == "sd3" else 4,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        sample_size=2 * LATENT_SIZE,
        **({"shift_factor": 0.06, "scaling_factor": 1.5} if flow else {}),
    )


def controlnet(base: UNet2DConditionModel) -> ControlNetModel:
    """Return a ControlNet of ``base`` whose zero convolutions are random, so that it has an effect."""
    network = ControlNetModel.from_unet(base, conditioning_channels=3, conditioning_embedding_out_channels=(4, 8))
    for name, parameter in network.named_parameters():
        if "controlnet_" in name and "cond_embedding.conv_in" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return network


def scheduler(family: str) -> Any:
    """Return the family's sampler: DDIM on Stable Diffusion's table (v for SD 2.1), or flow matching."""
    if family in ("sd3", "flux"):
        return FlowMatchEulerDiscreteScheduler(shift=3.0 if family == "sd3" else 1.0)
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction" if family == "sd21" else "epsilon",
    )


def mid_size_unet(seed: int = 0) -> UNet2DConditionModel:
    """Return a UNet of about 13M parameters on 32 x 32 latents, for benchmarks on a CPU."""
    with seeded(seed):
        return _unet((64, 128, 256), 32, 256, 8, ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"))


def sd15_size_unet(seed: int = 0) -> UNet2DConditionModel:
    """Return a UNet of Stable Diffusion 1.5's architecture (860M parameters) with random weights."""
    with seeded(seed):
        return _unet((320, 640, 1280, 1280), 64, 768, 8, ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), 2)


def _unet(
    channels: tuple[int, ...], size: int, text_width: int, heads: int, down: tuple[str, ...], layers: int = 1
) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=size,
        block_out_channels=channels,
        layers_per_block=layers,
        cross_attention_dim=text_width,
        attention_head_dim=heads,
        down_block_types=down,
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)),
    ).eval()


DENOISERS: dict[str, Callable[[], torch.nn.Module]] = {"sd3": sd3_transformer, "flux": flux_transformer}
