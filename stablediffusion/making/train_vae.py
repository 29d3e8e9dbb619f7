"""Train the autoencoder on drawings: |x - x'| + 2 (x - x')^2 + 1e-4 KL, means over pixels and latents.

The first term keeps flat colours flat, the second punishes lost edges; the KL term is small, as in latent
diffusion, and only keeps the latents' size in bounds.

Source: Rombach et al. 2022, section 3.1.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from stablediffusion.making.loop import Budget, Loop, Rate, seeded
from stablediffusion.making.networks import autoencoder
from stablediffusion.scenes.captions import sample_scenes
from stablediffusion.scenes.drawing import draw

BATCH = 32
LEARNING_RATE = 2e-3
KL_WEIGHT = 1e-4


def vae_loss(vae: AutoencoderKL, generator: torch.Generator, batch: int = BATCH) -> Tensor:
    """Return the loss on freshly drawn training scenes."""
    images = draw(sample_scenes(batch, generator), generator).to(vae.device)
    posterior = vae.encode(images).latent_dist
    decoded = vae.decode(posterior.sample(generator=generator)).sample
    error = decoded - images
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    return error.abs().mean() + 2 * error.square().mean() + KL_WEIGHT * kl


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: Tensor) -> float:
    """Return the mean peak signal-to-noise ratio of reconstructions in decibels; the peak is 2 (from -1 to 1)."""
    decoded = vae.decode(vae.encode(images).latent_dist.mode()).sample.clamp(-1, 1)
    return float((10 * torch.log10(4 / (decoded - images).square().mean((1, 2, 3)).clamp_min(1e-9))).mean())


@torch.no_grad()
def whiten(vae: AutoencoderKL, images: Tensor) -> None:
    """Give the latent channels mean 0 and covariance 1 by z -> C^(-1/2) (z - mean); reconstructions stay the same.

    The map goes into the last 1 x 1 convolution of the encoder and its inverse into the first of the decoder. One
    scaling factor for all channels, as usual, would leave them off centre and, here, with a correlation of -0.9
    between two of them. The posterior's noise becomes constant in each channel, at its mean variance.
    """
    posterior = vae.encode(images).latent_dist
    latents = posterior.mean.transpose(0, 1).flatten(1)
    values, basis = torch.linalg.eigh(torch.cov(latents))
    whitening, colouring = (basis * values.pow(power) @ basis.mT for power in (-0.5, 0.5))
    mean, noise = latents.mean(1), posterior.var.mean((0, 2, 3))
    into, out = vae.quant_conv, vae.post_quant_conv
    into.weight[:4] = torch.einsum("ij,jkhw->ikhw", whitening, into.weight[:4])
    into.bias[:4] = whitening @ (into.bias[:4] - mean)
    into.weight[4:] = 0
    into.bias[4:] = (whitening.square() @ noise).log()
    out.bias += out.weight[:, :, 0, 0] @ mean
    out.weight.copy_(torch.einsum("ijhw,jk->ikhw", out.weight, colouring))
    vae.register_to_config(scaling_factor=1.0)


def train_vae(
    folder: Path, budget: Budget, batch: int = BATCH, device: torch.device | str = "cpu"
) -> tuple[AutoencoderKL, list[dict[str, float]]]:
    """Train, or go on training, the autoencoder.

    Args:
        folder: of the run; the state is kept in ``vae.safetensors``.
        budget: of the stage.
        batch: drawings a step.
        device: of the autoencoder.

    Returns:
        the autoencoder, frozen, with averaged weights, and the stage's log.
    """
    with seeded(0):
        vae = autoencoder().to(device)
    generator = torch.Generator().manual_seed(1)
    images = draw(sample_scenes(256, generator), generator).to(device)
    loop = Loop(folder / "vae.safetensors", {"vae": vae}, Rate({"vae": LEARNING_RATE}, average=0.995))
    loop.run(lambda g: vae_loss(vae, g, batch), budget, lambda: {"psnr": round(psnr(vae, images), 2)})
    loop.use_averages()
    whiten(vae, images)
    return vae.eval().requires_grad_(False), loop.log
