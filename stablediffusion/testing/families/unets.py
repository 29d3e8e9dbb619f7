"""Tiny UNets: two levels, one layer a block, attention at the lower level."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from diffusers import DDIMScheduler, UNet2DConditionModel

from stablediffusion.testing.families.tiny import LATENT_SIZE, TASKS, TEXT_WIDTH, Tiny, autoencoder, clip


def _unet(**options: Any) -> Callable[[int], UNet2DConditionModel]:
    def made(more: int) -> UNet2DConditionModel:
        sizes = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 2}
        return UNet2DConditionModel(
            sample_size=LATENT_SIZE,
            in_channels=4 + more,
            out_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            **(sizes | {"cross_attention_dim": TEXT_WIDTH} | options),
        )

    return made


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


_WIDE = {"attention_head_dim": (2, 4), "use_linear_projection": True}
_SD_EXTRA = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}

_SD15 = Tiny("StableDiffusion", clip, _unet(), _ddim, autoencoder, TASKS, extra=_SD_EXTRA)
_SDXL = Tiny(
    "StableDiffusionXL",
    lambda: clip() | clip("_2", projection=TEXT_WIDTH),
    _unet(
        **_WIDE,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=TEXT_WIDTH + 6 * 8,
        cross_attention_dim=2 * TEXT_WIDTH,
    ),
    _ddim,
    autoencoder,
    TASKS,
    # the watermarker needs a package of its own and would change the pixels
    extra={"add_watermarker": False},
)


def _perturbed(tiny: Tiny) -> Tiny:
    """Return the family's pipeline with perturbed attention: a third row an image."""
    return replace(tiny, stem=f"{tiny.stem}PAG", tasks=("text2img",))


FAMILIES = {
    "sd15": _SD15,
    "sd21": replace(
        _SD15,
        text=lambda: clip(activation="gelu"),
        denoiser=_unet(**_WIDE),
        scheduler=lambda: _ddim("v_prediction"),
    ),
    "sdxl": _SDXL,
    "sd15-pag": _perturbed(_SD15),
    "sdxl-pag": _perturbed(_SDXL),
}
