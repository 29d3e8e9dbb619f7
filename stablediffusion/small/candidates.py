"""Candidates of captions, as latents with their rewards: the exact target of a member, and of a blend of members.

The base was trained on drawings, and drawings cost nothing. Given a caption c with candidates z_1 .. z_J, drawn
independently from what c leaves open, the tilt p(z | c) exp(r(z) / kl_weight) / Z(c) is sampled by taking z_j with
probability w_j proportional to exp(r(z_j) / kl_weight).

Rewards are those of what is seen, the decoded latent. Every reward is divided by its standard deviation over all
candidates, so that a kl_weight is in standard deviations and means the same for all.

Source: Andrieu et al. 2003 (importance resampling).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stablediffusion.rewards.formulas import FORMULAS
from stablediffusion.rewards.scoring import Prompts
from stablediffusion.scenes.captions import Scene, complete, held_out, parse
from stablediffusion.scenes.drawing import draw

SCORED = ("compress", "vivid", "align")
COUNT = 256


@dataclass(frozen=True)
class Candidates:
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

    def total(self, weights: Mapping[str, float], scales: Mapping[str, float] | None = None) -> Tensor:
        """Return sum_i weights_i r_i / sd_i, float64 (N, J).

        Args:
            weights: of rewards, by name.
            scales: in place of the standard deviations over these candidates.
        """
        scales = {name: self.scale(name) for name in weights} if scales is None else scales
        parts = [weight / scales[name] * self.rewards[name].double() for name, weight in weights.items()]
        return torch.stack(parts).sum(0)

    def log_weights(self, weights: Mapping[str, float], kl_weight: float) -> Tensor:
        """Return the logarithms of w_j for the reward ``total(weights)``, float64 (N, J), sums 1 over J."""
        return (self.total(weights) / kl_weight).log_softmax(1)


def scenes_of(text: str, count: int, generator: torch.Generator) -> list[Scene]:
    """Draw complete scenes that a caption leaves open, none of them held out; an empty one leaves all open."""
    mentioned = parse(text) if text else Scene(())
    scenes: list[Scene] = []
    while len(scenes) < count:
        draws = torch.rand((count, 24), generator=generator, dtype=torch.float64).tolist()
        drawn = [complete(mentioned, iter(row)) for row in draws]
        scenes += [scene for scene in drawn if not held_out(scene)]
    return scenes[:count]


def draw_candidates(
    pipe: Any, captions: Sequence[str], *, count: int = COUNT, generator: torch.Generator
) -> Candidates:
    """Draw candidates of captions and score them.

    Args:
        pipe: the bundled pipeline, whose autoencoder is used.
        captions: of the grammar in ``scenes``, or empty.
        count: J, candidates a caption.
        generator: of the draws.
    """

    def latents(text: str) -> Tensor:
        drawn = draw(scenes_of(text, count, generator), generator).to(pipe.vae.device, pipe.vae.dtype)
        encoded: Tensor = pipe.vae.encode(drawn).latent_dist.sample(generator=generator)
        return encoded * pipe.vae.config.scaling_factor

    return scored(pipe, captions, map(latents, captions))


@torch.no_grad()
def scored(pipe: Any, captions: Sequence[str], latents: Iterable[Tensor]) -> Candidates:
    """Return captions and the latents of their candidates, an iterable of (J, *event), with their rewards."""
    kept, rewards, scale = [], [], pipe.vae.config.scaling_factor
    for text, found in zip(captions, latents, strict=True):
        kept.append(found.half().cpu())
        seen = pipe.vae.decode(kept[-1].to(pipe.vae.device, pipe.vae.dtype) / scale).sample.float()
        seen, asked = (seen / 2 + 0.5).clamp(0, 1), Prompts((text,) * len(seen))
        rewards.append(torch.stack([FORMULAS[name](seen, asked).cpu() for name in SCORED]))
    return Candidates(list(captions), torch.stack(kept), dict(zip(SCORED, torch.stack(rewards, 1), strict=True)))
