"""What a row of the table of tiny pipelines says, and the parts that many rows share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from torch import nn

from stablediffusion.testing import text

LATENT_SIZE = 8
TEXT_WIDTH = 16
T5_WIDTH = 32
FLOW_TASKS = ("text2img", "img2img", "inpaint")
TASKS = (*FLOW_TASKS, "inpaint9", "controlnet")


def autoencoder(levels: int = 2, **options: Any) -> AutoencoderKL:
    """Return the tiny autoencoder, 4 channels by default: latents at 2^(1 - levels) of the image size."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    sizes = {"block_out_channels": (8,) * levels, "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
    return AutoencoderKL(sample_size=2 * LATENT_SIZE, **blocks, **(sizes | options))


def flow_autoencoder(**options: Any) -> AutoencoderKL:
    """Return the tiny autoencoder with a shift, as flow models have it."""
    return autoencoder(shift_factor=0.06, scaling_factor=1.5, **options)


def flow_sampler(**options: Any) -> Callable[[], FlowMatchEulerDiscreteScheduler]:
    """Return what makes the usual sampler of flow models; by default its grid is not shifted."""
    return lambda: FlowMatchEulerDiscreteScheduler(**options)


def lively(network: nn.Module) -> nn.Module:
    """Return the network with linear layers that keep the size of what they are given.

    Initial weights are smaller, and what goes through three of them (times, which open the gates of all attention) has
    next to no effect on what comes out.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            torch.nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    return network


@dataclass(frozen=True)
class Tiny:
    """A tiny pipeline.

    Attributes:
        stem: what the names of its classes begin with.
        text: makes tokenizers and text encoders, by component.
        denoiser: (channels of the state and of what else goes in with it, 0 if nothing) -> the network.
        scheduler: makes the family's sampler.
        vae: makes the autoencoder.
        tasks: those it has, of ``TASKS``.
        second: whether another denoiser, made likewise, serves the low noise levels.
        extra: further components, and arguments of its classes.
    """

    stem: str
    text: Callable[[], dict[str, Any]]
    denoiser: Callable[[int], nn.Module]
    scheduler: Callable[[], Any] = FlowMatchEulerDiscreteScheduler
    vae: Callable[[], nn.Module] = flow_autoencoder
    tasks: tuple[str, ...] = ("text2img",)
    second: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)


def clip(place: str = "", **options: Any) -> dict[str, Any]:
    """Return a CLIP tokenizer and text encoder, for the place "", "_2", ... among a pipeline's."""
    return {f"tokenizer{place}": text.clip_tokenizer(), f"text_encoder{place}": text.clip_encoder(**options)}


def t5(place: str = "") -> dict[str, Any]:
    """Return a T5 tokenizer and encoder for a place."""
    return {f"tokenizer{place}": text.t5_tokenizer(), f"text_encoder{place}": text.t5_encoder()}


def decoder(place: str = "", layers: int = 2, opened: bool = False) -> dict[str, Any]:
    """Return the tokenizer and the network of a language model for a place.

    Args:
        place: "", "_2", ...
        layers: of the network.
        opened: whether every text begins with a token for its beginning, so that none is empty.
    """
    tokenizer = text.chat_tokenizer(opened=opened)
    return {f"tokenizer{place}": tokenizer, f"text_encoder{place}": text.decoder(TEXT_WIDTH, layers)}
