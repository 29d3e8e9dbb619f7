"""Tiny models of video, on latents of 4 channels and two frames."""

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
    flow_sampler,
    lively,
    t5,
)


def _wan(more: int) -> nn.Module:
    return lively(
        diffusers.WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=T5_WIDTH,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
        )
    )


def _wan_autoencoder() -> nn.Module:
    return diffusers.AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 2.0, 1.0, 0.8],
        scale_factor_temporal=2,
        scale_factor_spatial=2,
    )


def _wan_sampler() -> diffusers.UniPCMultistepScheduler:
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def _ltx(more: int) -> nn.Module:
    return lively(
        diffusers.LTXVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            num_layers=2,
            caption_channels=T5_WIDTH,
        )
    )


def _ltx_autoencoder() -> nn.Module:
    return diffusers.AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        down_block_types=("LTXVideoDownBlock3D",) * 2,
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, False),
        decoder_spatio_temporal_scaling=(True, False),
        decoder_inject_noise=(False,) * 3,
        downsample_type=("conv",) * 2,
        upsample_residual=(False,) * 2,
        upsample_factor=(1,) * 2,
        patch_size=2,
    )


def _hunyuan(more: int) -> nn.Module:
    return lively(
        diffusers.HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            text_embed_dim=TEXT_WIDTH,
            pooled_projection_dim=TEXT_WIDTH,
            rope_axes_dim=(4, 6, 6),
        )
    )


def _hunyuan_autoencoder() -> nn.Module:
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        norm_num_groups=4,
    )


def _cogvideox(more: int) -> nn.Module:
    return lively(
        diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            time_embed_dim=16,
            text_embed_dim=T5_WIDTH,
            num_layers=2,
            sample_width=LATENT_SIZE,
            sample_height=LATENT_SIZE,
            sample_frames=3,
            temporal_compression_ratio=2,
            max_text_seq_length=16,
        )
    )


def _cogvideox_autoencoder() -> nn.Module:
    return diffusers.AutoencoderKLCogVideoX(
        latent_channels=4,
        down_block_types=("CogVideoXDownBlock3D",) * 2,
        up_block_types=("CogVideoXUpBlock3D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        temporal_compression_ratio=2,
        sample_height=2 * LATENT_SIZE,
        sample_width=2 * LATENT_SIZE,
    )


FAMILIES = {
    "wan2.1": Tiny("Wan", t5, _wan, _wan_sampler, _wan_autoencoder),
    # the first of three steps is the first transformer's, the others are the second's
    "wan2.2": Tiny("Wan", t5, _wan, _wan_sampler, _wan_autoencoder, second=True, extra={"boundary_ratio": 0.9}),
    "ltx": Tiny("LTX", t5, _ltx, vae=_ltx_autoencoder),
    "hunyuan-video": Tiny(
        "HunyuanVideo",
        lambda: decoder(opened=True) | clip("_2"),
        _hunyuan,
        flow_sampler(shift=7.0),
        _hunyuan_autoencoder,
    ),
    "cogvideox": Tiny(
        "CogVideoX",
        t5,
        _cogvideox,
        lambda: diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
        _cogvideox_autoencoder,
    ),
}
