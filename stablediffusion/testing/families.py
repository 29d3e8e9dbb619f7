"""Tiny pipelines, one row a family: which networks it has, and what its classes are called.

A tiny UNet has two levels, one layer a block and attention at the lower level; a tiny transformer has two blocks of
each kind. Random weights make predictions of order one, so that members really differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import nn

from stablediffusion.testing import text

LATENT_SIZE = 8
_TEXT_WIDTH = 16
_T5_WIDTH = 32
_FLOW_TASKS = ("text2img", "img2img", "inpaint")
TASKS = (*_FLOW_TASKS, "inpaint9", "controlnet")


@dataclass(frozen=True)
class Tiny:
    """A tiny pipeline.

    Attributes:
        stem: what the names of its classes begin with.
        text: makes tokenizers and text encoders, by component.
        denoiser: (channels of the state and of what else goes in with it, 0 if nothing) -> the network.
        scheduler: makes the family's sampler.
        vae: settings of the autoencoder.
        tasks: those it has, of ``TASKS``.
        extra: further components, and arguments of its classes.
    """

    stem: str
    text: Callable[[], dict[str, Any]]
    denoiser: Callable[[int], nn.Module]
    scheduler: Callable[[], Any]
    vae: Mapping[str, Any] = field(default_factory=dict)
    tasks: tuple[str, ...] = TASKS
    extra: Mapping[str, Any] = field(default_factory=dict)

    def autoencoder(self) -> AutoencoderKL:
        """Return the tiny autoencoder: latents at half the image size."""
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        sizes = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
        return AutoencoderKL(sample_size=2 * LATENT_SIZE, **blocks, **(sizes | dict(self.vae)))


def _unet(**options: Any) -> Callable[[int], UNet2DConditionModel]:
    def made(more: int) -> UNet2DConditionModel:
        sizes = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 2}
        return UNet2DConditionModel(
            sample_size=LATENT_SIZE,
            in_channels=4 + more,
            out_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            **(sizes | {"cross_attention_dim": _TEXT_WIDTH} | options),
        )

    return made


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
        joint_attention_dim=_T5_WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * _TEXT_WIDTH,
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
        joint_attention_dim=_T5_WIDTH,
        pooled_projection_dim=_TEXT_WIDTH,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=False,
    )


def _ddim(prediction: str = "epsilon") -> DDIMScheduler:
    """Return DDIM on Stable Diffusion's table."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
    )


def _clip(place: str = "", **options: Any) -> dict[str, Any]:
    return {f"tokenizer{place}": text.clip_tokenizer(), f"text_encoder{place}": text.clip_encoder(**options)}


def _t5(place: str) -> dict[str, Any]:
    return {f"tokenizer{place}": text.t5_tokenizer(), f"text_encoder{place}": text.t5_encoder()}


_WIDE = {"attention_head_dim": (2, 4), "use_linear_projection": True}
_SD_EXTRA = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
_FLOW_VAE = {"shift_factor": 0.06, "scaling_factor": 1.5}

FAMILIES = {
    "sd15": Tiny("StableDiffusion", _clip, _unet(), _ddim, extra=_SD_EXTRA),
    "sd21": Tiny(
        "StableDiffusion",
        lambda: _clip(activation="gelu"),
        _unet(**_WIDE),
        lambda: _ddim("v_prediction"),
        extra=_SD_EXTRA,
    ),
    "sdxl": Tiny(
        "StableDiffusionXL",
        lambda: _clip() | _clip("_2", projection=16),
        _unet(
            **_WIDE,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            transformer_layers_per_block=(1, 2),
            projection_class_embeddings_input_dim=_TEXT_WIDTH + 6 * 8,
            cross_attention_dim=2 * _TEXT_WIDTH,
        ),
        _ddim,
        # the watermarker needs a package of its own and would change the pixels
        extra={"add_watermarker": False},
    ),
    "sd3": Tiny(
        "StableDiffusion3",
        lambda: _clip(projection=16) | _clip("_2", projection=16) | _t5("_3"),
        _sd3_transformer,
        lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_FLOW_VAE | {"latent_channels": 16},
        tasks=_FLOW_TASKS,
    ),
    "flux": Tiny(
        "Flux",
        lambda: _clip() | _t5("_2"),
        _flux_transformer,
        lambda: FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=_FLOW_VAE,
        tasks=_FLOW_TASKS,
    ),
}
