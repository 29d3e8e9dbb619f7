"""Images of the bundled model for one preference and method, with what was measured on them.

Every cell of a comparison has the same prompts and the same noise, so that neighbours differ by the setting alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdeblend.blend import Preference
from sdeblend.reward import Reward
from stablediffusion.adapters.members import Members
from stablediffusion.blending.attach import blend
from stablediffusion.blending.engine import Mode
from stablediffusion.rewards.formulas import FORMULAS
from stablediffusion.rewards.scoring import Prompts
from stablediffusion.small.files import GUIDANCE

PROMPTS = (
    "a large red circle on a striped blue background",
    "a small yellow square on a green background",
    "a white cross on a purple background",
    "a ring on a checkered background",
)


@dataclass(frozen=True)
class Cell:
    """The images of one method and preference.

    Attributes:
        mode: "mpa", "ls", "soup" or "soup-factors".
        preference: what was asked for.
        images: (N, 3, H, W) in [0, 1], prompt by prompt.
        rewards: reward -> one value an image, (N,).
        nats: -log W of each image, (N,), whose mean bounds KL(blend || target); None where there is no certificate.
        evaluations: network evaluations an image, guidance branches counted.
    """

    mode: Mode
    preference: Preference
    images: Tensor
    rewards: Mapping[str, Tensor]
    nats: Tensor | None
    evaluations: float

    def mean(self, reward: str) -> tuple[float, float]:
        """Return the mean of a reward and its standard error."""
        return mean_and_error(self.rewards[reward])


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Return the mean of values (N,) and its standard error."""
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


def draw_cell(
    pipe: Any,
    members: Members,
    preference: Preference,
    *,
    mode: Mode = "mpa",
    prompts: Sequence[str] = PROMPTS,
    each: int = 2,
    steps: int = 50,
    seed: int = 0,
    guidance: float = GUIDANCE,
    rewards: Mapping[str, Reward] | None = None,
) -> Cell:
    """Draw ``each`` images a prompt, DDIM with eta 1, and score them.

    Args:
        pipe: from ``load_small``.
        members: loaded on it.
        preference: weights and strength.
        mode: how the members are used, see ``stablediffusion.blend``.
        prompts: captions of the model's grammar.
        each: images a prompt.
        steps: DDIM steps.
        seed: of the noise; image k of the cell starts from seed + k.
        guidance: guidance scale.
        rewards: by name; JPEG size saved and colourfulness by default.
    """
    scored = {name: FORMULAS[name] for name in ("compress", "vivid")} if rewards is None else rewards
    generators = [torch.Generator().manual_seed(seed + k) for k in range(len(prompts) * each)]
    correct = "certify" if mode == "mpa" else None
    with blend(pipe, members, preference, mode=mode, correct=correct) as knobs:  # type: ignore[arg-type]
        images = pipe(
            list(prompts),
            num_images_per_prompt=each,
            num_inference_steps=steps,
            guidance_scale=guidance,
            eta=1.0,
            generator=generators,
            output_type="pt",
        ).images
        nats, evaluations = knobs.nats, knobs.evaluations
    images = images.float().cpu()
    condition = Prompts(tuple(prompt for prompt in prompts for _ in range(each)))
    values = {name: reward(images, condition) for name, reward in scored.items()}
    return Cell(mode, preference, images, values, nats, evaluations * (1 if guidance == 1 else 2) / len(images))
