"""Tune the bundled model's members, at a KL weight that is known because their targets are sampled exactly.

    python -m stablediffusion.making.members [--only NAME ...] [--work DIR] [--measure]

A member is a LoRA regressed on drawings tilted by exp(r / kl_weight) given the caption (``pool``), ``align`` on tilted
samples of the base: no trainer's bias or noise stands between it and the KL weight (those of the trainers of
``sdeblend.finetune`` are measured on mixtures).
At times t above ``RESOLVED`` the target is the average over the candidates that a state may have come from; below it
candidates are told apart, so that the tilt and its base agree to 1e-4 of the variance of v, and the target is the
base's own prediction, without noise. Most steps are taken where the noise is large, for there a tilt differs from its
base. What is left is that the base is not the drawings' law itself; ``--only control`` trains alike on drawings that
are not tilted, and shows what training longer does by itself (it is not shipped).

Rewards are standardised, r = sum_i w_i r_i / sd_i with sd_i the standard deviation over drawings, so that kl_weight is
in standard deviations and the same for all but one:

    compress, vivid, align   one reward each
    compress-half            compress at twice the kl_weight: half its strength
    morl-25, -50, -75        r(w) = (1 - w) compress + w vivid itself; morl-50 is also the pair of second order
                             (r_1 + r_2 at twice the kl_weight), named compress+vivid too

Shards of drawings and the state of each member are kept in DIR: a run that was stopped goes on there.

Source: Andrieu et al. 2003 (importance resampling); Rame et al. 2306.04488 (weights between rewards).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdeblend.finetune.model import noised, per_row
from sdeblend.io import write_atomically
from stablediffusion.finetune.tunable import Layers, PipelineTunable
from stablediffusion.making.loop import Budget, Loop, Rate
from stablediffusion.small import load_small
from stablediffusion.small.candidates import OWN, SCORED, Pool, averaged, make_pool, tilt_kl
from stablediffusion.small.files import MEMBERS

KL_WEIGHT = 0.125
RANK = 6
LAYERS: tuple[Layers, ...] = ("attention", "feed-forward", "convolutions")
SHARDS, OWN_SHARDS, STEPS, BATCH = 40, 20, 700, 32
RATE = Rate({"lora": 3e-3}, warm_up=50, decay=0.5, average=0.995)
RESOLVED = 0.3
# Of the steps, how many are below RESOLVED, and how many above t = 1/2.
ANCHORED, NOISY = 0.15, 0.7


@dataclass(frozen=True)
class Recipe:
    """What a member is tuned for.

    Attributes:
        weights: of the standardised rewards.
        kl_weight: in standard deviations; infinity for no tilt.
        own: whether it is tuned on the base's own samples, not on drawings.
    """

    weights: Mapping[str, float]
    kl_weight: float = KL_WEIGHT
    own: bool = False


RECIPES: Mapping[str, Recipe] = {
    "compress": Recipe({"compress": 1.0}),
    "vivid": Recipe({"vivid": 1.0}),
    "morl-50": Recipe({"compress": 0.5, "vivid": 0.5}),
    "compress-half": Recipe({"compress": 1.0}, 2 * KL_WEIGHT),
    "morl-25": Recipe({"compress": 0.75, "vivid": 0.25}),
    "morl-75": Recipe({"compress": 0.25, "vivid": 0.75}),
    "align": Recipe({"align": 1.0}, own=True),
    "control": Recipe({"compress": 0.0}, float("inf")),
}

SHIPPED = tuple(name for name in RECIPES if name != "control")


def recipe_of(name: str) -> Recipe:
    """Return a recipe by its name; ``NAME@ALPHA`` is that of NAME at another kl_weight.

    Raises:
        ValueError: for another name.
    """
    known, at, alpha = name.partition("@")
    try:
        return replace(RECIPES[known], kl_weight=float(alpha)) if at else RECIPES[name]
    except (KeyError, ValueError):
        raise ValueError(f"a member must be one of {', '.join(RECIPES)}, or one of them @ALPHA, got {name!r}") from None


def tunable(pipe: Any, seed: int = 0) -> PipelineTunable:
    """Return the bundled pipeline, without guidance, as what is tuned."""
    return PipelineTunable(
        pipe, [""], rank=RANK, layers=LAYERS, batch=64, decode_batch=64, save_dtype=torch.float16, seed=seed
    )


def tune(name: str, pool: Pool, work: Path, file: Path, *, steps: int = STEPS, seed: int = 3) -> dict[str, Any]:
    """Train a member, or go on training it, and write its file.

    Args:
        name: of the recipe.
        pool: what it is trained on.
        work: folder of its state.
        file: of the member.
        steps: of the optimiser.
        seed: of batches, times and noise.

    Returns:
        facts about it, as JSON has them.
    """
    recipe, model = recipe_of(name), tunable(load_small())
    log_weights = pool.log_weights(recipe.weights, recipe.kl_weight)
    parameters = nn.ParameterList(model.trainable().values())
    loop = Loop(work / f"{name}.safetensors", {"lora": parameters}, RATE, seed=seed)
    loop.run(lambda generator: tilted_loss(model, pool, log_weights, generator), Budget(steps=steps))
    loop.use_averages()
    about = {
        "sdeblend.reward": json.dumps(dict(recipe.weights)),
        "sdeblend.scales": json.dumps({reward: pool.scale(reward) for reward in recipe.weights}),
        "sdeblend.base": model.identity(),
        "sdeblend.trainer": "tilted drawings",
    }
    if recipe.kl_weight < float("inf"):
        about["sdeblend.kl_weight"] = repr(recipe.kl_weight)
    model.save(file, about)
    total = log_weights.new_zeros(log_weights.shape)
    for reward, weight in recipe.weights.items():
        total += weight / pool.scale(reward) * pool.rewards[reward].double()
    gained = (log_weights.exp() * total).sum(1) - total.mean(1)
    return {
        "kl_of_target": round(tilt_kl(log_weights), 3),
        "gain_of_target": round(float(gained.mean()), 3),
        "within_of_captions": round(float(total.var(1).mean().sqrt()), 3),
        "steps": loop.step,
        "seconds": round(loop.seconds),
    }


def tilted_loss(
    model: PipelineTunable, pool: Pool, log_weights: Tensor, generator: torch.Generator, batch: int = BATCH
) -> Tensor:
    """Return the mean of |target - v(x, t, caption)|^2 over states noised from the tilt.

    Args:
        model: base and LoRA.
        pool: captions and candidates.
        log_weights: of the candidates, (N, J).
        generator: of captions, candidates, times and noise.
        batch: states.
    """
    schedule = model.schedule
    row = torch.randint(len(pool.captions), (batch,), generator=generator)
    chosen = torch.multinomial(log_weights[row].exp(), 1, generator=generator)[:, 0]
    clean = pool.latents[row, chosen].float()
    times = _times(batch, generator)
    eps = torch.randn(clean.shape, generator=generator)
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    x = noised(schedule, clean, times, eps)
    condition = model.condition([pool.captions[i] for i in row.tolist()])
    with torch.no_grad():
        mean = averaged(pool.latents[row], log_weights[row], x, alpha, sigma)
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
    pool = make_pool(load_small(), arguments.work / "drawings", range(SHARDS))
    for name in arguments.only if not arguments.measure else ():
        folder, chosen = MEMBERS if name in SHIPPED else arguments.work, pool
        if recipe_of(name).own:
            chosen = make_pool(load_small(), arguments.work / "samples", range(OWN_SHARDS), count=OWN, own=True)
        facts = tune(name, chosen, arguments.work / "states", folder / f"{name}.safetensors")
        write_atomically(arguments.work / f"{name}.json", json.dumps(facts) + "\n")
        print(name, facts)
    if shipped := [name for name in arguments.only if name in SHIPPED]:
        # late: it reads this module's recipes
        from stablediffusion.making.measure_members import measure

        measure(shipped, {reward: pool.scale(reward) for reward in SCORED}, arguments.work)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
