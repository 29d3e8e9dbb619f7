"""Train the denoiser, and the text encoder with it, on drawings made on the fly.

For latents x0 of unit scale, x = a x0 + s eps and the loss is the mean of |v - v(x, t, caption)|^2 with
v = a eps - s x0 and t uniform; a tenth of the captions is empty, for classifier-free guidance.

Source: Salimans & Ho 2022 (v-prediction); Ho & Salimans 2022 (classifier-free guidance).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from stablediffusion.making.loop import Budget, Loop, Rate, seeded
from stablediffusion.making.networks import scheduler, unet
from stablediffusion.making.tokenizer import tokenizer
from stablediffusion.making.train_text import tokens
from stablediffusion.scenes.captions import caption, mention, sample_scenes
from stablediffusion.scenes.drawing import draw

BATCH = 32
LEARNING_RATES = {"unet": 2e-3, "text": 3e-4}
EMPTY = 0.1


def unet_loss(
    denoiser: UNet2DConditionModel,
    text: CLIPTextModel,
    vae: AutoencoderKL,
    words: CLIPTokenizer,
    table: Tensor,
    generator: torch.Generator,
    batch: int = BATCH,
) -> Tensor:
    """Return the loss on freshly drawn training scenes.

    Args:
        denoiser, text, vae, words: the model's parts, on one device.
        table: a^2 at each time, on the CPU, [time].
        generator: source of scenes, captions, times and noise.
        batch: number of scenes.
    """
    device = denoiser.device
    scenes = sample_scenes(batch, generator)
    with torch.no_grad():
        latents = vae.encode(draw(scenes, generator).to(device)).latent_dist.mode() * vae.config.scaling_factor
    empty = torch.rand(batch, generator=generator) < EMPTY
    mentioned = mention(scenes, generator)
    captions = ["" if drop else caption(scene) for drop, scene in zip(empty.tolist(), mentioned, strict=True)]
    t = torch.randint(len(table), (batch,), generator=generator)
    noise = torch.randn(latents.shape, generator=generator).to(device)
    a, s = (x.sqrt()[:, None, None, None].to(device) for x in (table[t], 1 - table[t]))
    states = text(tokens(words, captions).to(device))[0]
    prediction = denoiser(a * latents + s * noise, t.to(device), states).sample
    return (prediction - (a * noise - s * latents)).square().mean()


def train_unet(
    folder: Path,
    budget: Budget,
    vae: AutoencoderKL,
    text: CLIPTextModel,
    batch: int = BATCH,
    check: Callable[[UNet2DConditionModel, CLIPTextModel], dict[str, float]] | None = None,
    device: torch.device | str = "cpu",
) -> tuple[UNet2DConditionModel, CLIPTextModel, list[dict[str, float]]]:
    """Train, or go on training, the denoiser and the text encoder.

    Args:
        folder: of the run; the state is kept in ``unet.safetensors``.
        budget: of the stage.
        vae: trained autoencoder; moved to ``device``.
        text: pre-trained text encoder; moved too.
        batch: drawings a step.
        check: measured on the averaged networks now and then.
        device: of all of them.

    Returns:
        denoiser and text encoder with averaged weights, and the stage's log.
    """
    words, table = tokenizer(), scheduler().alphas_cumprod
    with seeded(3):
        denoiser = unet().to(device)
    vae, text = vae.to(device), text.to(device)
    loop = Loop(folder / "unet.safetensors", {"unet": denoiser, "text": text}, Rate(LEARNING_RATES), seed=3)
    measure = None if check is None else lambda: check(denoiser, text)
    loop.run(lambda g: unet_loss(denoiser, text, vae, words, table, g, batch), budget, measure)
    loop.use_averages()
    return denoiser, text, loop.log
