"""What every member of the bundled model is tuned on: candidates of many captions, in files, and averages over them.

Take candidate z_j of a caption with probability w_j (``small.candidates``), noise it to x = a z + s eps, and forget
which one it was: given x and the candidates, z was z_j with probability

    pi_j proportional to w_j exp(-|x - a z_j|^2 / (2 s^2)).

So sum_j pi_j z_j has the same mean given x as z itself, by the tower rule, and less variance: much less where the noise
leaves many candidates possible, which is where a tilt differs from its base. It is what a member is regressed on.

Candidates are drawings, or the base's own samples (DDIM with eta 1, no guidance) for a reward that drawings leave
nothing to gain in, as ``align``: a drawing shows what its caption says, a sample not always.

Source: Xu et al. 2302.00670 (targets averaged over a reference batch).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from sdeblend.shell.console import track
from sdeblend.shell.files import write_atomically
from stablediffusion.scenes.captions import training_captions
from stablediffusion.small.candidates import COUNT, SCORED, Candidates, draw_candidates, scored

SHARD = 50
OWN, OWN_STEPS = 16, 25
# As often as in the base's training: guidance needs the tilt without a caption too.
EMPTY = 0.1


def draw_shards(
    pipe: Any, folder: Path, shards: Sequence[int], *, count: int = COUNT, each: int = SHARD, own: bool = False
) -> Candidates:
    """Draw the shards that are not in ``folder`` yet, and return them all.

    Each shard depends on its number alone, so that several processes can share the work.

    Args:
        pipe: the bundled pipeline, whose autoencoder is used.
        folder: where shards are kept.
        shards: numbers of the shards.
        count: J, candidates a caption.
        each: captions a shard.
        own: candidates are the base's own samples, not drawings.
    """
    for shard in track(shards, "samples" if own else "drawings", unit="shards"):
        path = folder / f"shard-{shard:03d}.safetensors"
        if not path.exists():
            write_atomically(path, _written(_shard(pipe, shard, count, each, own)))
    parts = [_read(folder / f"shard-{shard:03d}.safetensors") for shard in shards]
    rewards = {name: torch.cat([part.rewards[name] for part in parts]) for name in SCORED}
    captions = [text for part in parts for text in part.captions]
    return Candidates(captions, torch.cat([part.latents for part in parts]), rewards)


def _shard(pipe: Any, shard: int, count: int, each: int, own: bool) -> Candidates:
    generator = torch.Generator().manual_seed(1000 + shard)
    captions = training_captions(each, generator)
    empty = (torch.rand(each, generator=generator) < EMPTY).tolist()
    captions = ["" if drop else text for text, drop in zip(captions, empty, strict=True)]
    if own:
        return scored(pipe, captions, (_samples(pipe, text, count, generator) for text in captions))
    return draw_candidates(pipe, captions, count=count, generator=generator)


def _samples(pipe: Any, text: str, count: int, generator: torch.Generator) -> Tensor:
    out = pipe(
        text, num_images_per_prompt=count, num_inference_steps=OWN_STEPS, eta=1.0, guidance_scale=1.0,
        generator=generator, output_type="latent",
    )  # fmt: skip
    return out.images


def _written(drawn: Candidates) -> bytes:
    rewards = torch.stack([drawn.rewards[name] for name in SCORED])
    return save({"latents": drawn.latents, "rewards": rewards}, metadata={"captions": "\n".join(drawn.captions)})


def _read(path: Path) -> Candidates:
    with safe_open(path, "pt") as file:
        captions = file.metadata()["captions"].split("\n")
        rewards = dict(zip(SCORED, file.get_tensor("rewards"), strict=True))
        return Candidates(captions, file.get_tensor("latents"), rewards)


def averaged(latents: Tensor, log_weights: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return sum_j pi_j z_j, (B, *event).

    Args:
        latents: candidates of each row's caption, (B, J, *event).
        log_weights: log w_j, (B, J).
        x: noised states, (B, *event).
        alpha, sigma: a and s of each row, (B,).
    """
    z = latents.flatten(2).to(x.dtype)
    gap = x.flatten(1)[:, None] - alpha.to(x)[:, None, None] * z
    logits = log_weights - gap.square().sum(2).double() / (2 * sigma.double().square())[:, None]
    return (logits.softmax(1).to(x.dtype)[:, None] @ z)[:, 0].reshape(x.shape)


def tilt_kl(log_weights: Tensor) -> float:
    """Return the mean over captions of KL(tilt || drawings), nats."""
    return float((log_weights.exp() * (log_weights + math.log(log_weights.shape[1]))).sum(1).mean())
