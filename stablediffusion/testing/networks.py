"""Networks with random weights: a ControlNet for tests, larger UNets for benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import ControlNetModel, UNet2DConditionModel


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw initial weights from ``seed``; networks take them from the global generator, restored after."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def controlnet(base: UNet2DConditionModel) -> ControlNetModel:
    """Return a ControlNet of ``base`` whose zero convolutions are random, so that it has an effect."""
    network = ControlNetModel.from_unet(base, conditioning_channels=3, conditioning_embedding_out_channels=(4, 8))
    for name, parameter in network.named_parameters():
        if "controlnet_" in name and "cond_embedding.conv_in" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return network


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
