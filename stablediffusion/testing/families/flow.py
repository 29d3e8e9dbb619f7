"""Tiny transformers of flow models of images: two blocks of a kind, or one of each of two kinds.

Families whose text encoder is a large language model have one of two layers in its place: pipelines read hidden states
and nothing else of it. FLUX.2 reads three layers, the last of them the 27th or the 30th.
"""

from __future__ import annotations

from collections.abc import Callable

import diffusers
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from torch import nn

from stablediffusion.testing.families.tiny import (
    FLOW_TASKS,
    LATENT_SIZE,
    T5_WIDTH,
    TEXT_WIDTH,
    Tiny,
    clip,
    decoder,
    flow_autoencoder,
    flow_sampler,
    lively,
    t5,
)


def _sd3_transformer(more: int) -> SD3Transformer2DModel:
    """Return the tiny SD 3 transformer, on latents of 16 channels (its inpainting accepts no other)."""
    return SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=16,
    )


def _flux_transformer(more: int) -> FluxTransformer2DModel:
    """Return the tiny Flux transformer on packed latents of 16 channels."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=False,
    )


def _flux2_transformer(guidance: bool) -> Callable[[int], nn.Module]:
    """Return what makes the tiny FLUX.2 transformer on latents of 4 channels in patches of 2 x 2.

    Args:
        guidance: whether it is distilled, and takes the strength of guidance as an input.
    """
    return lambda more: lively(
        diffusers.Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=3 * TEXT_WIDTH,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=guidance,
        )
    )


def _flux2_autoencoder() -> nn.Module:
    vae = diffusers.AutoencoderKLFlux2(
        sample_size=2 * LATENT_SIZE,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
    )
    # of packed latents: what makes them of unit size
    torch.nn.init.normal_(vae.bn.running_mean, std=0.1)
    torch.nn.init.uniform_(vae.bn.running_var, 0.5, 2.0)
    return vae


def _qwen_transformer(more: int) -> nn.Module:
    """Return the tiny Qwen-Image transformer on latents of 4 channels in patches of 2 x 2."""
    return lively(
        diffusers.QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=TEXT_WIDTH,
            axes_dims_rope=(8, 4, 4),
        )
    )


def _qwen_autoencoder() -> nn.Module:
    return diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 2.0, 1.0, 0.8],
    )


def _z_image_transformer(more: int) -> nn.Module:
    """Return the tiny Z-Image transformer on latents of 4 channels."""
    network = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=TEXT_WIDTH,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    for token in (network.x_pad_token, network.cap_pad_token):
        torch.nn.init.normal_(token)
    return lively(network)


# a shift that depends on the size of the image
_dynamic = flow_sampler(shift=3.0, use_dynamic_shifting=True)

FAMILIES = {
    "sd3": Tiny(
        "StableDiffusion3",
        lambda: clip(projection=16) | clip("_2", projection=16) | t5("_3"),
        _sd3_transformer,
        flow_sampler(shift=3.0),
        lambda: flow_autoencoder(latent_channels=16),
        FLOW_TASKS,
    ),
    "flux": Tiny("Flux", lambda: clip() | t5("_2"), _flux_transformer, tasks=FLOW_TASKS),
    "flux-kontext": Tiny("FluxKontext", lambda: clip() | t5("_2"), _flux_transformer, _dynamic),
    "flux2": Tiny("Flux2", lambda: decoder(layers=31), _flux2_transformer(True), _dynamic, _flux2_autoencoder),
    "flux2-klein": Tiny(
        "Flux2Klein", lambda: decoder(layers=28), _flux2_transformer(False), _dynamic, _flux2_autoencoder
    ),
    "qwen-image": Tiny("QwenImage", decoder, _qwen_transformer, _dynamic, _qwen_autoencoder),
    "z-image": Tiny("ZImage", decoder, _z_image_transformer, flow_sampler(shift=3.0)),
}
