"""Tune the bundled model's members, at a KL weight that is known because their targets are sampled exactly.

    python -m stablediffusion.making.tune_members [--only NAME ...] [--work DIR] [--measure]

A member is a LoRA regressed on drawings tilted by exp(r / kl_weight) given the caption (``shards``), ``align`` on
tilted samples of the base: no trainer's bias or noise stands between it and the KL weight (those of the trainers of
``sdeblend.finetune`` are measured on mixtures).
At times t above ``RESOLVED`` the target is the average over the candidates that a state may have come from; below it
candidates are told apart, so that the tilt and its base agree to 1e-4 of the variance of v, and the target is the
base's own prediction, without noise. Most steps are taken where the noise is large, for there a tilt differs from its
base. What is left is that the base is not the drawings' law itself; ``--only control`` trains alike on drawings that
are not tilted, and shows what training longer does by itself (it is not shipped).

Shards of drawings and the state of each member are kept in DIR: a run that was stopped goes on there.

Source: Andrieu et al. 2003 (importance resampling).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdeblend.finetune.model import noised, per_row
from sdeblend.shell.files import write_atomically
from stablediffusion.finetune.tunable import Layers, PipelineTunable
from stablediffusion.making.loop import Budget, Loop, Rate
from stablediffusion.making.measure_members import measure
from stablediffusion.making.recipes import SHIPPED, recipe_of
from stablediffusion.making.shards import OWN, averaged, draw_shards, tilt_kl
from stablediffusion.small import load_small
from stablediffusion.small.candidates import SCORED, Candidates
from stablediffusion.small.files import MEMBERS

RANK = 6
LAYERS: tuple[Layers, ...] = ("attention", "feed-forward", "convolutions")
SHARDS, OWN_SHARDS, STEPS, BATCH = 40, 20, 700, 32
RATE = Rate({"lora": 3e-3}, warm_up=50, decay=0.5, average=0.995)
RESOLVED = 0.3
# Of the steps, how many are below RESOLVED, and how many above t = 1/2.
ANCHORED, NOISY = 0.15, 0.7


def tunable(pipe: Any, seed: int = 0) -> PipelineTunable:
    """Return the bundled pipeline, without guidance, as what is tuned."""
    return PipelineTunable(
        pipe, [""], rank=RANK, layers=LAYERS, batch=64, decode_batch=64, save_dtype=torch.float16, seed=seed
    )


def tune(name: str, drawn: Candidates, work: Path, file: Path, *, steps: int = STEPS, seed: int = 3) -> dict[str, Any]:
    """Train a member, or go on training it, and write its file.

    Args:
        name: of the recipe.
        drawn: what it is trained on.
        work: folder of its state.
        file: of the member.
        steps: of the optimiser.
        seed: of batches, times and noise.

    Returns:
        facts about it, as JSON has them.
    """
    recipe, model = recipe_of(name), tunable(load_small())
    log_weights = drawn.log_weights(recipe.weights, recipe.kl_weight)
    parameters = nn.ParameterList(model.trainable().values())
    loop = Loop(work / f"{name}.safetensors", {"lora": parameters}, RATE, seed=seed)
    loop.run(lambda generator: tilted_loss(model, drawn, log_weights, generator), Budget(steps=steps))
    loop.use_averages()
    about = {
        "sdeblend.reward": json.dumps(dict(recipe.weights)),
        "sdeblend.scales": json.dumps({reward: drawn.scale(reward) for reward in recipe.weights}),
        "sdeblend.base": model.identity(),
        "sdeblend.trainer": "tilted drawings",
    }
    if recipe.kl_weight < float("inf"):
        about["sdeblend.kl_weight"] = repr(recipe.kl_weight)
    model.save(file, about)
    total = drawn.total(recipe.weights)
    gained = (log_weights.exp() * total).sum(1) - total.mean(1)
    return {
        "kl_of_target": round(tilt_kl(log_weights), 3),
        "gain_of_target": round(float(gained.mean()), 3),
        "within_of_captions": round(float(total.var(1).mean().sqrt()), 3),
        "steps": loop.step,
        "seconds": round(loop.seconds),
    }


def tilted_loss(
    model: PipelineTunable, drawn: Candidates, log_weights: Tensor, generator: torch.Generator, batch: int = BATCH
) -> Tensor:
    """Return the mean of |target - v(x, t, caption)|^2 over states noised from the tilt.

    Args:
        model: base and LoRA.
        drawn: captions and candidates.
        log_weights: of the candidates, (N, J).
        generator: of captions, candidates, times and noise.
        batch: states.
    """
    schedule = model.schedule
    row = torch.randint(len(drawn.captions), (batch,), generator=generator)
    chosen = torch.multinomial(log_weights[row].exp(), 1, generator=generator)[:, 0]
    clean = drawn.latents[row, chosen].float()
    times = _times(batch, generator)
    eps = torch.randn(clean.shape, generator=generator)
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    x = noised(schedule, clean, times, eps)
    condition = model.condition([drawn.captions[i] for i in row.tolist()])
    with torch.no_grad():
        mean = averaged(drawn.latents[row], log_weights[row], x, alpha, sigma)
        # v = a eps - s x0 with eps = (x - a x0) / s and a^2 + s^2 = 1
        target = per_row(alpha / sigma, x) * x - per_row(1 / sigma, x) * mean
        resolved = (times <= RESOLVED).nonzero()[:, 0]
        if len(resolved):
            target[resolved] = model.base(x[resolved], times[resolved], condition.rows(resolved))
    return (model.tuned(x, times, condition) - target).square().mean()


def _times(batch: int, generator: torch.Generator) -> Tensor:
    """Draw times of the table, (batch,) float64, more of them where tilt and base differ."""
    kind = torch.rand(batch, generator=generator, dtype=torch.float64)
    place = torch.rand(batch, generator=generator, dtype=torch.float64)
    low, middle, high = place * RESOLVED, RESOLVED + place * (0.5 - RESOLVED), 0.5 + place / 2
    t = torch.where(kind < ANCHORED, low, torch.where(kind < 1 - NOISY, middle, high))
    return (t * 1000).floor().add(1).clamp(max=1000) / 1000


def main(argv: Sequence[str] | None = None) -> int:
    """Tune and measure; return 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", default=SHIPPED, metavar="NAME", help="or NAME@ALPHA, another KL weight")
    parser.add_argument("--work", type=Path, default=Path("out/small-members"), help="folder of drawings and states")
    parser.add_argument("--measure", action="store_true", help="measure the members that exist, tune none")
    arguments = parser.parse_args(argv)
    drawn = draw_shards(load_small(), arguments.work / "drawings", range(SHARDS))
    for name in arguments.only if not arguments.measure else ():
        folder, chosen = MEMBERS if name in SHIPPED else arguments.work, drawn
        if recipe_of(name).own:
            chosen = draw_shards(load_small(), arguments.work / "samples", range(OWN_SHARDS), count=OWN, own=True)
        facts = tune(name, chosen, arguments.work / "states", folder / f"{name}.safetensors")
        write_atomically(arguments.work / f"{name}.json", json.dumps(facts) + "\n")
        print(name, facts)
    if shipped := [name for name in arguments.only if name in SHIPPED]:
        measure(shipped, {reward: drawn.scale(reward) for reward in SCORED}, arguments.work)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
