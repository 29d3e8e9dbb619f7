"""Tiny transformers of further flow models of images, on latents of 4 channels."""

from __future__ import annotations

import diffusers
from torch import nn

from stablediffusion.testing.families.tiny import (
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


def _chroma(more: int) -> nn.Module:
    return lively(
        diffusers.ChromaTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=T5_WIDTH,
            axes_dims_rope=(4, 4, 8),
            approximator_num_channels=16,
            approximator_hidden_dim=32,
            approximator_layers=1,
        )
    )


def _sana(more: int) -> nn.Module:
    return lively(
        diffusers.SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=TEXT_WIDTH,
            sample_size=LATENT_SIZE,
        )
    )


def _sana_autoencoder() -> nn.Module:
    """Return an autoencoder with latents at a quarter of the size, which must be a multiple of 32."""
    return diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_out_channels=(8,) * 3,
        decoder_block_out_channels=(8,) * 3,
        encoder_layers_per_block=(1,) * 3,
        decoder_layers_per_block=(1,) * 3,
        encoder_qkv_multiscales=((),) * 3,
        decoder_qkv_multiscales=((),) * 3,
        scaling_factor=0.4,
    )


def _aura_flow(more: int) -> nn.Module:
    return lively(
        diffusers.AuraFlowTransformer2DModel(
            sample_size=LATENT_SIZE,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=T5_WIDTH,
            caption_projection_dim=16,
            pos_embed_max_size=64,
        )
    )


def _lumina2(more: int) -> nn.Module:
    return lively(
        diffusers.Lumina2Transformer2DModel(
            sample_size=LATENT_SIZE,
            in_channels=4,
            hidden_size=32,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=(8, 4, 4),
            axes_lens=(32, 16, 16),
            cap_feat_dim=TEXT_WIDTH,
        )
    )


def _cogview4(more: int) -> nn.Module:
    return lively(
        diffusers.CogView4Transformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            text_embed_dim=TEXT_WIDTH,
            time_embed_dim=16,
            condition_dim=8,
        )
    )


def _hidream(more: int) -> nn.Module:
    return lively(
        diffusers.HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_channels=[T5_WIDTH, TEXT_WIDTH],
            text_emb_dim=2 * TEXT_WIDTH,
            axes_dims_rope=(4, 2, 2),
            max_resolution=(16, 16),
            llama_layers=[0, 1],
        )
    )


FAMILIES = {
    "chroma": Tiny("Chroma", t5, _chroma),
    "sana": Tiny(
        "Sana",
        lambda: decoder(opened=True),
        _sana,
        lambda: diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        _sana_autoencoder,
    ),
    "aura-flow": Tiny("AuraFlow", t5, _aura_flow, flow_sampler(shift=1.73)),
    # its pipeline takes latents for an eighth of the size whatever the autoencoder is
    "lumina2": Tiny(
        "Lumina2", lambda: decoder(opened=True), _lumina2, flow_sampler(shift=6.0), lambda: flow_autoencoder(levels=4)
    ),
    "cogview4": Tiny("CogView4", lambda: decoder(opened=True), _cogview4, flow_sampler(use_dynamic_shifting=True)),
    "hidream": Tiny(
        "HiDreamImage",
        lambda: clip(projection=TEXT_WIDTH) | clip("_2", projection=TEXT_WIDTH) | t5("_3") | decoder("_4", opened=True),
        _hidream,
        flow_sampler(shift=3.0),
    ),
}
