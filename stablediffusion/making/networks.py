"""The model's parts, of Stable Diffusion's classes at a thousandth of its size.

An autoencoder of factor 4 (32 x 32 pixels to 8 x 8 x 4 latents), a text encoder of two layers, a UNet of two
levels with cross-attention at both, and DDIM on Stable Diffusion's table with v-prediction,
v = a eps - s x0 for x = a x0 + s eps.

Source: Rombach et al. 2022 (latent diffusion); Salimans & Ho 2022 (v-prediction).
"""

from __future__ import annotations

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from stablediffusion.making.tokenizer import BOS, EOS, MAX_LENGTH, vocabulary
from stablediffusion.scenes.drawing import IMAGE_SIZE

TEXT_WIDTH = 64
LATENT_SIZE = IMAGE_SIZE // 4
_LOG_VARIANCE = -6.0


def autoencoder() -> AutoencoderKL:
    """Build the autoencoder; its latents begin almost noiseless, since a noisy beginning loses the picture."""
    channels = (16, 32, 48)
    vae = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        mid_block_add_attention=False,
        sample_size=IMAGE_SIZE,
    )
    vae.encoder.conv_out.bias.data[4:] = _LOG_VARIANCE
    vae.quant_conv.bias.data[4:] = _LOG_VARIANCE
    vae.encoder.conv_out.weight.data[4:] *= 0.1
    return vae


def text_encoder() -> CLIPTextModel:
    """Build the text encoder."""
    vocab, _ = vocabulary()
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocab),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            bos_token_id=vocab[BOS],
            eos_token_id=vocab[EOS],
            pad_token_id=vocab[EOS],
        )
    )


def unet() -> UNet2DConditionModel:
    """Build the denoiser."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        block_out_channels=(64, 128),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(2, 4),
    )


def scheduler() -> DDIMScheduler:
    """Build the sampler."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )
