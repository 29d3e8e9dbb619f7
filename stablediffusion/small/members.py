"""Tune the bundled model's members, at a KL weight that is known because their targets are sampled exactly.

    python -m stablediffusion.small.members [--only NAME ...] [--out DIR] [--measure]

The base was trained on drawings, and drawings cost nothing. So the tilt given a caption c,

    p(x | c) exp(r(x) / kl_weight) / Z(c),

can be sampled: draw many scenes that the caption leaves open, score them, keep one with probability proportional to
exp(r / kl_weight). A member is a LoRA trained on such drawings by the base's own loss: no trainer's bias or noise
stands between it and the KL weight (those of the trainers of ``sdeblend.finetune`` are measured on mixtures). What is
left is that the base is not the drawings' law itself; ``--only control`` trains alike on drawings that are not tilted,
and shows what training longer does by itself (it is not shipped).

Rewards are standardised, r = sum_i w_i r_i / sd_i with sd_i the standard deviation over drawings, so that kl_weight is
in standard deviations and the same for all but one:

    compress, vivid          one reward each
    compress-half            compress at twice the kl_weight: half its strength
    morl-25, ...           r(w) = (1 - w) compress + w vivid itself: what a blend is compared with

``morl-50`` is also the pair of second order (``sdeblend.baselines.interpolation``): compress + vivid at twice the
kl_weight is r(1/2) at kl_weight.

Source: Andrieu et al. 2003 (importance resampling); Rame et al. 2306.04488 (weights between rewards).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sdeblend.finetune.model import noised, per_row
from sdeblend.io import write_atomically
from stablediffusion.bundled import MEMBERS
from stablediffusion.prompts import PromptCondition
from stablediffusion.rewards import colourfulness, jpeg_size
from stablediffusion.small import load_small
from stablediffusion.small.drawing import draw
from stablediffusion.small.scenes import Scene, caption, complete, held_out, mention, sample_scenes
from stablediffusion.tunable import Layers, PipelineTunable

KL_WEIGHT = 0.125
RANK = 6
LAYERS: tuple[Layers, ...] = ("attention", "feed-forward", "convolutions")
CAPTIONS, CANDIDATES, KEPT = 1600, 384, 6
STEPS, BATCH, LEARNING_RATE, WARM_UP, AVERAGE = 450, 32, 1e-3, 30, 0.98
# As often as in the base's training: guidance needs the tilt without a caption too.
EMPTY = 0.1


@dataclass(frozen=True)
class Recipe:
    """What a member is tuned for.

    Attributes:
        weights: of the standardised rewards.
        kl_weight: in standard deviations; infinity for no tilt.
    """

    weights: Mapping[str, float]
    kl_weight: float = KL_WEIGHT


RECIPES: Mapping[str, Recipe] = {
    "compress": Recipe({"compress": 1.0}),
    "vivid": Recipe({"vivid": 1.0}),
    "morl-50": Recipe({"compress": 0.5, "vivid": 0.5}),
    "compress-half": Recipe({"compress": 1.0}, 2 * KL_WEIGHT),
    "morl-25": Recipe({"compress": 0.75, "vivid": 0.25}),
    "morl-75": Recipe({"compress": 0.25, "vivid": 0.75}),
    "control": Recipe({"compress": 0.0}, float("inf")),
}

SHIPPED = tuple(name for name in RECIPES if name != "control")


def rewards_of(images: Tensor) -> dict[str, Tensor]:
    """Return the rewards of images (B, 3, H, W) in [0, 1]: minus the JPEG size in kB, and colourfulness."""
    return {"compress": -jpeg_size(images), "vivid": colourfulness(images)}


def scales(count: int = 4096, seed: int = 1) -> dict[str, float]:
    """Return the standard deviation of each reward over drawings of the training's scenes."""
    generator = torch.Generator().manual_seed(seed)
    images = (draw(sample_scenes(count, generator), generator) + 1) / 2
    return {name: float(values.std()) for name, values in rewards_of(images).items()}


def candidates(mentioned: Scene, count: int, generator: torch.Generator) -> list[Scene]:
    """Draw complete scenes that a caption leaves open, none of them held out."""
    scenes: list[Scene] = []
    while len(scenes) < count:
        draws = torch.rand((count, 24), generator=generator, dtype=torch.float64).tolist()
        drawn = [complete(mentioned, iter(row)) for row in draws]
        scenes += [scene for scene in drawn if not held_out(scene)]
    return scenes[:count]


def tilted_drawings(names: Sequence[str], seed: int = 2) -> tuple[list[str], dict[str, Tensor], dict[str, float]]:
    """Draw the members' training pictures: of each caption ``KEPT`` of ``CANDIDATES`` drawings, kept by their weights.

    Args:
        names: of the recipes.
        seed: of everything drawn.

    Returns:
        the captions; recipe -> pictures, uint8 (captions, KEPT, 3, H, W); recipe -> KL of the tilt, nats a caption.
    """
    generator, spread = torch.Generator().manual_seed(seed), scales()
    captions: list[str] = []
    kept: dict[str, list[Tensor]] = {name: [] for name in names}
    nats = dict.fromkeys(names, 0.0)
    scenes = mention(sample_scenes(CAPTIONS, generator), generator)
    empty = (torch.rand(CAPTIONS, generator=generator) < EMPTY).tolist()
    for scene, drop in zip(tqdm(scenes, desc="tilted drawings", disable=None), empty, strict=True):
        mentioned = Scene(()) if drop else scene
        captions.append("" if drop else caption(scene))
        images = (draw(candidates(mentioned, CANDIDATES, generator), generator) + 1) / 2
        values = rewards_of(images)
        for name in names:
            recipe = RECIPES[name]
            total = torch.stack([w / spread[k] * values[k] for k, w in recipe.weights.items()]).sum(0)
            probabilities = (total.double() / recipe.kl_weight).softmax(0)
            chosen = torch.multinomial(probabilities, KEPT, replacement=True, generator=generator)
            kept[name].append((255 * images[chosen]).round().to(torch.uint8))
            nats[name] += float((probabilities * (probabilities.clamp_min(1e-300) * CANDIDATES).log()).sum())
    return captions, {k: torch.stack(v) for k, v in kept.items()}, {k: v / CAPTIONS for k, v in nats.items()}


def tunable(pipe: Any, seed: int = 0) -> PipelineTunable:
    """Return the bundled pipeline, without guidance, as what is tuned."""
    return PipelineTunable(
        pipe, [""], rank=RANK, layers=LAYERS, batch=64, decode_batch=64, save_dtype=torch.float16, seed=seed
    )


def tune(name: str, captions: Sequence[str], pictures: Tensor, seed: int = 3) -> Path:
    """Train a member on its pictures and write it into the package.

    Args:
        name: of the recipe.
        captions: (N,).
        pictures: uint8 (N, KEPT, 3, H, W).
        seed: of batches, times and noise.

    Returns:
        the member's file.
    """
    generator = torch.Generator().manual_seed(seed)
    pipe = load_small()
    model = tunable(pipe)
    parameters = list(model.trainable().values())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, betas=(0.9, 0.99), fused=True)
    for step in tqdm(range(STEPS), desc=name, disable=None):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARM_UP, 2 * (1 - step / STEPS))
        row = torch.randint(len(captions), (BATCH,), generator=generator)
        images = pictures[row, torch.randint(KEPT, (BATCH,), generator=generator)]
        condition = model.condition([captions[i] for i in row.tolist()])
        loss = denoising_loss(model, images.float() / 127.5 - 1, condition, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - AVERAGE)
    with torch.no_grad():
        for parameter, mean in zip(parameters, average, strict=True):
            parameter.copy_(mean)
    recipe = RECIPES[name]
    about = {
        "sdeblend.reward": json.dumps(dict(recipe.weights)),
        "sdeblend.base": model.identity(),
        "sdeblend.trainer": "tilted drawings",
    }
    if recipe.kl_weight < float("inf"):
        about["sdeblend.kl_weight"] = repr(recipe.kl_weight)
    MEMBERS.mkdir(exist_ok=True)
    return model.save(MEMBERS / f"{name}.safetensors", about)


def denoising_loss(
    model: PipelineTunable, images: Tensor, condition: PromptCondition, generator: torch.Generator
) -> Tensor:
    """Return the base's own loss, the mean of |v - v(x, t, caption)|^2 with t uniform on the table.

    Args:
        model: base and LoRA.
        images: (B, 3, H, W) in [-1, 1].
        condition: of the B images.
        generator: of latents, times and noise.
    """
    vae, schedule = model.pipe.vae, model.schedule
    with torch.no_grad():
        clean = vae.encode(images).latent_dist.sample(generator=generator) * vae.config.scaling_factor
    times = (torch.randint(1000, (len(images),), generator=generator).double() + 1) / 1000
    eps = torch.randn(clean.shape, generator=generator)
    v = per_row(schedule.alpha(times), eps) * eps - per_row(schedule.sigma(times), eps) * clean
    return (model.tuned(noised(schedule, clean, times, eps), times, condition) - v).square().mean()


def main(argv: Sequence[str] | None = None) -> int:
    """Tune and measure; return 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=tuple(RECIPES), default=SHIPPED, metavar="NAME")
    parser.add_argument("--measure", action="store_true", help="measure the members that exist, tune none")
    arguments = parser.parse_args(argv)
    if not arguments.measure:
        captions, pictures, nats = tilted_drawings(tuple(RECIPES))
        for name in arguments.only:
            start = time.perf_counter()
            tune(name, captions, pictures[name])
            facts = {"kl_of_target": round(nats[name], 3), "seconds": round(time.perf_counter() - start)}
            write_atomically(MEMBERS / f"{name}.json", json.dumps(facts) + "\n")
    # late: it is not needed to tune
    from stablediffusion.small.measure_members import measure

    measure(arguments.only)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
