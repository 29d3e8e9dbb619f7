"""Candidates of many captions, as latents with their rewards: what every member of the bundled model is tuned on.

The base was trained on drawings, and drawings cost nothing. Given a caption c with candidates z_1 .. z_J, drawn
independently from what c leaves open, the tilt p(z | c) exp(r(z) / kl_weight) / Z(c) is sampled by taking z_j with
probability w_j proportional to exp(r(z_j) / kl_weight). Take one so, noise it to x = a z + s eps, and forget which one
it was: given x and the candidates, z was z_j with probability

    pi_j proportional to w_j exp(-|x - a z_j|^2 / (2 s^2)).

So sum_j pi_j z_j has the same mean given x as z itself, by the tower rule, and less variance: much less where the noise
leaves many candidates possible, which is where a tilt differs from its base. It is what a member is regressed on.

Candidates are drawings, or the base's own samples (DDIM with eta 1, no guidance) for a reward that drawings leave
nothing to gain in, as ``align``: a drawing shows what its caption says, a sample not always.

Rewards are those of what is seen, the decoded latent. Every reward is divided by its standard deviation over the pool,
so that a kl_weight is in standard deviations and means the same for all.

Source: Andrieu et al. 2003 (importance resampling); Xu et al. 2302.00670 (targets averaged over a reference batch).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from sdeblend.io import write_atomically
from stablediffusion.rewards import REWARDS
from stablediffusion.rewards.scoring import Prompts
from stablediffusion.scenes.captions import Scene, caption, complete, held_out, mention, sample_scenes
from stablediffusion.scenes.drawing import draw

SCORED = ("compress", "vivid", "align")
CANDIDATES, SHARD = 256, 50
OWN, OWN_STEPS = 16, 25
# As often as in the base's training: guidance needs the tilt without a caption too.
EMPTY = 0.1


@dataclass(frozen=True)
class Pool:
    """Candidates of captions.

    Attributes:
        captions: (N,), "" among them.
        latents: of the candidates, scaled as the denoiser sees them, half precision (N, J, *event).
        rewards: name -> rewards of the decoded candidates, float32 (N, J), in units of their own.
    """

    captions: list[str]
    latents: Tensor
    rewards: Mapping[str, Tensor]

    def scale(self, reward: str) -> float:
        """Return the standard deviation of a reward over all candidates."""
        return float(self.rewards[reward].double().std())

    def log_weights(self, weights: Mapping[str, float], kl_weight: float) -> Tensor:
        """Return the logarithms of w_j for the reward sum_i weights_i r_i / sd_i, float64 (N, J), sums 1 over J."""
        total = torch.zeros_like(next(iter(self.rewards.values())), dtype=torch.float64)
        for name, weight in weights.items():
            total += weight / self.scale(name) * self.rewards[name].double()
        return (total / kl_weight).log_softmax(1)


def candidates(mentioned: Scene, count: int, generator: torch.Generator) -> list[Scene]:
    """Draw complete scenes that a caption leaves open, none of them held out."""
    scenes: list[Scene] = []
    while len(scenes) < count:
        draws = torch.rand((count, 24), generator=generator, dtype=torch.float64).tolist()
        drawn = [complete(mentioned, iter(row)) for row in draws]
        scenes += [scene for scene in drawn if not held_out(scene)]
    return scenes[:count]


def make_pool(
    pipe: Any,
    folder: Path,
    shards: Sequence[int],
    *,
    count: int = CANDIDATES,
    each: int = SHARD,
    own: bool = False,
) -> Pool:
    """Draw shards of the pool that are not in ``folder`` yet, and return them all.

    Each shard depends on its number alone, so that several processes can share the work.

    Args:
        pipe: the bundled pipeline, whose autoencoder is used.
        folder: where shards are kept.
        shards: numbers of the shards.
        count: J, candidates a caption.
        each: captions a shard.
        own: candidates are the base's own samples, not drawings.
    """
    for shard in tqdm(shards, desc="samples" if own else "drawings", unit="shard", disable=None):
        path = folder / f"shard-{shard:03d}.safetensors"
        if not path.exists():
            write_atomically(path, _written(_shard(pipe, shard, count, each, own)))
    parts = [_read(folder / f"shard-{shard:03d}.safetensors") for shard in shards]
    rewards = {name: torch.cat([part.rewards[name] for part in parts]) for name in SCORED}
    return Pool([c for part in parts for c in part.captions], torch.cat([part.latents for part in parts]), rewards)


def _shard(pipe: Any, shard: int, count: int, each: int, own: bool) -> Pool:
    generator = torch.Generator().manual_seed(1000 + shard)
    scenes = mention(sample_scenes(each, generator), generator)
    empty = (torch.rand(each, generator=generator) < EMPTY).tolist()
    mentioned = [Scene(()) if drop else scene for scene, drop in zip(scenes, empty, strict=True)]
    captions = ["" if drop else caption(scene) for scene, drop in zip(scenes, empty, strict=True)]
    if own:
        return _scored(captions, (_samples(pipe, text, count, generator) for text in captions), pipe)
    return draw_pool(pipe, mentioned, captions, count=count, generator=generator)


def draw_pool(
    pipe: Any,
    mentioned: Sequence[Scene],
    captions: Sequence[str],
    *,
    count: int = CANDIDATES,
    seed: int = 0,
    generator: torch.Generator | None = None,
) -> Pool:
    """Draw candidates of captions and score them.

    Args:
        pipe: the bundled pipeline, whose autoencoder is used.
        mentioned: what each caption says.
        captions: as many.
        count: J, candidates a caption.
        seed: of the draws, unless a generator is given.
        generator: of the draws.
    """
    source = generator or torch.Generator().manual_seed(seed)

    def latents(scene: Scene) -> Tensor:
        drawn = draw(candidates(scene, count, source), source)
        encoded: Tensor = pipe.vae.encode(drawn).latent_dist.sample(generator=source)
        return encoded * pipe.vae.config.scaling_factor

    return _scored(captions, map(latents, mentioned), pipe)


def _samples(pipe: Any, text: str, count: int, generator: torch.Generator) -> Tensor:
    out = pipe(
        text, num_images_per_prompt=count, num_inference_steps=OWN_STEPS, eta=1.0, guidance_scale=1.0,
        generator=generator, output_type="latent",
    )  # fmt: skip
    return out.images


@torch.no_grad()
def _scored(captions: Sequence[str], latents: Iterable[Tensor], pipe: Any) -> Pool:
    """Return the pool of captions and the latents of their candidates, an iterable of (J, *event)."""
    kept, rewards, scale = [], [], pipe.vae.config.scaling_factor
    for text, found in zip(captions, latents, strict=True):
        kept.append(found.half())
        seen = (pipe.vae.decode(kept[-1].float() / scale).sample / 2 + 0.5).clamp(0, 1)
        rewards.append(torch.stack([REWARDS[name](seen, Prompts((text,) * len(seen))) for name in SCORED]))
    return Pool(list(captions), torch.stack(kept), dict(zip(SCORED, torch.stack(rewards, 1), strict=True)))


def _written(pool: Pool) -> bytes:
    rewards = torch.stack([pool.rewards[name] for name in SCORED])
    return save({"latents": pool.latents, "rewards": rewards}, metadata={"captions": "\n".join(pool.captions)})


def _read(path: Path) -> Pool:
    with safe_open(path, "pt") as file:
        captions = file.metadata()["captions"].split("\n")
        rewards = dict(zip(SCORED, file.get_tensor("rewards"), strict=True))
        return Pool(captions, file.get_tensor("latents"), rewards)


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
