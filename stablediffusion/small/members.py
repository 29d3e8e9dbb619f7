"""Tune the bundled model's members, and measure them.

    python -m stablediffusion.small.members [--only NAME ...] [--out DIR] [--resume] [--measure]

Each member is the tilt p_base exp(r / kl_weight) / Z, found by the regression trainer on captions as the base was
trained on. Rewards are standardised: r = sum_i w_i r_i / sd_i, sd_i the base's
standard deviation over such captions, so that kl_weight is in standard deviations and the same for all but one:

    compress, vivid, align     one reward each
    compress-half              compress at twice the kl_weight: half its strength
    compress+vivid             their sum at twice the kl_weight, which is r(1/2) at kl_weight: the pair of second order
    compress25-vivid75, ...    r(w) = w compress + (1 - w) vivid itself: what a blend is compared with

``compress50-vivid50`` has the target of ``compress+vivid`` and another seed: how far two runs of the trainer differ.

Tuning is without guidance: the regression needs a base whose prediction is the score of its own samples, noised. One
group in eight has an empty caption, for which the alignment is 0. With guidance g, p(x|c)^g p(x)^(1-g), the factor
exp(r / kl_weight) of both branches appears to the power g + 1 - g = 1, so that the guided member is the guided base's
tilt at the same kl_weight, as far as guidance is such a product at all (for align: at kl_weight / g).

A run's folder under DIR holds its checkpoints. Measured on other captions and noise, 50 ancestral steps, at guidance 1
and at ``GUIDANCE``: rewards before and after in sd, KL of the chain from the base's in nats, the scorer's accuracies.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdeblend.finetune.chain import Chain, draw_noise
from sdeblend.finetune.regression import RegressionSettings, RewardRegression
from sdeblend.finetune.reward import WeightedReward
from sdeblend.finetune.run import METRICS, train
from sdeblend.grid import time_grid
from sdeblend.io import write_atomically
from stablediffusion.bundled import GUIDANCE, MEMBERS, SMALL
from stablediffusion.finetune import training_captions
from stablediffusion.lora import load_lora, remove_adapter
from stablediffusion.prompts import Draw, PromptCondition
from stablediffusion.rewards import find_reward
from stablediffusion.small import load_small
from stablediffusion.small.evaluate import accuracies
from stablediffusion.small.scenes import parse
from stablediffusion.tunable import ADAPTER, Layers, PipelineTunable

RESULTS = SMALL / "members.json"
REWARDS = ("compress", "vivid", "align")
KL_WEIGHT = 0.5
RANK = 8
LAYERS: tuple[Layers, ...] = ("attention", "feed-forward", "convolutions")
ITERATIONS = 12
EMPTY = 1 / 8
_STEPS = 50
_IMAGES = 256
_BATCH = 64


@dataclass(frozen=True)
class Recipe:
    """What a member is tuned for.

    Attributes:
        weights: of the standardised rewards.
        kl_weight: in standard deviations.
        seed: of the run.
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    kl_weight: float = KL_WEIGHT
    seed: int = 0


RECIPES: Mapping[str, Recipe] = {
    "compress": Recipe({"compress": 1.0}),
    "vivid": Recipe({"vivid": 1.0}),
    "align": Recipe({"align": 1.0}),
    "compress-half": Recipe({"compress": 1.0}, 2 * KL_WEIGHT),
    "compress+vivid": Recipe({"compress": 1.0, "vivid": 1.0}, 2 * KL_WEIGHT),
    "compress25-vivid75": Recipe({"compress": 0.25, "vivid": 0.75}),
    "compress50-vivid50": Recipe({"compress": 0.5, "vivid": 0.5}, seed=1),
    "compress75-vivid25": Recipe({"compress": 0.75, "vivid": 0.25}),
}


def settings(recipe: Recipe) -> RegressionSettings:
    """Return the trainer's settings: what differs between members is target and seed."""
    return RegressionSettings(
        kl_weight=recipe.kl_weight,
        groups=8,
        group_size=8,
        steps=16,
        learning_rate=2e-3,
        ema_decay=0.9,
        micro_batch=128,
        copies=4,
        epochs=3,
        seed=recipe.seed,
    )


def tune(name: str, scales: Mapping[str, float], out: Path, *, resume: bool, iterations: int = ITERATIONS) -> Path:
    """Tune a member and copy it to the package.

    Args:
        name: of the recipe.
        scales: reward -> standard deviation of the base.
        out: folder of the runs.
        resume: go on with the run that is there.
        iterations: of the trainer.

    Returns:
        the member's file.
    """
    recipe = RECIPES[name]
    model = tunable(load_small(), recipe.seed)
    weights = {reward: weight / scales[reward] for reward, weight in recipe.weights.items()}
    reward = WeightedReward({key: find_reward(key) for key in weights}, weights)
    trainer = RewardRegression(model, reward, settings(recipe))
    member = train(trainer, out / name, iterations=iterations, checkpoint_every=1, resume=resume)
    target = MEMBERS / f"{name}.safetensors"
    write_atomically(target, member.read_bytes())
    return target


def captions(count: int, generator: torch.Generator) -> list[str]:
    """Draw captions to tune on; one in eight is empty."""
    drawn = training_captions(count, generator)
    empty = torch.rand(count, generator=generator) < EMPTY
    return ["" if e else caption for e, caption in zip(empty.tolist(), drawn, strict=True)]


def tunable(pipe: Any, seed: int = 0, guidance: float = 1.0, prompts: Draw = captions) -> PipelineTunable:
    """Return the bundled pipeline as what is tuned."""
    return PipelineTunable(
        pipe, prompts, rank=RANK, layers=LAYERS, guidance=guidance, batch=_BATCH, decode_batch=_BATCH,
        save_dtype=torch.float16, seed=seed,
    )  # fmt: skip


@torch.no_grad()
def measure(
    name: str | None, guidance: float = 1.0, images: int = _IMAGES, seed: int = 1
) -> tuple[dict[str, Any], Tensor]:
    """Draw images of a member, or of the base, on captions and noise that depend on the seed alone.

    Args:
        name: of a member in the package; None for the base.
        guidance: of member and base.
        images: how many, one a caption.
        seed: of captions and noise.

    Returns:
        means and standard deviations of the rewards, KL of the chain, accuracies; and the images, (B, 3, H, W).
    """
    pipe = load_small()
    model = tunable(pipe, guidance=guidance, prompts=training_captions)
    if name is not None:
        remove_adapter(pipe, ADAPTER)
        load_lora(pipe, MEMBERS / f"{name}.safetensors", ADAPTER)
    generator = torch.Generator().manual_seed(seed)
    chain = Chain.of(model, time_grid(model.schedule, _STEPS, "uniform"))
    condition = model.conditions(images, 1, generator)
    parts, sums = [], []
    for rows in torch.arange(images).split(_BATCH):
        noise = draw_noise(model, chain, slice(0, len(rows)), len(rows), generator)
        samples, kl = _follow(model, chain, noise, condition.rows(rows), tuned=name is not None)
        parts.append(model.decode(samples))
        sums.append(kl)
    drawn = torch.cat(parts)
    return {"images": images, "kl": _mean(torch.cat(sums))} | scores(drawn, condition), drawn


def _follow(
    model: PipelineTunable, chain: Chain, noise: Tensor, condition: PromptCondition, *, tuned: bool
) -> tuple[Tensor, Tensor]:
    """Return samples of the tuned chain or the base's, and the KL of their steps from the base's, nats (B,)."""
    x = noise[0] * model.schedule.prior_std()
    kl = x.new_zeros(len(x))
    for k in range(len(chain)):
        index = torch.full((len(x),), k)
        base = model.base(x, chain.times(index), condition)
        out = model.tuned(x, chain.times(index), condition) if tuned else base
        last = k == chain.noisy
        kl += 0 if last else chain.kl(out, base, index)
        x = chain.mean(x, out, index) + (0 if last else float(chain.g[k]) * noise[k + 1])
    return x, kl


def scores(images: Tensor, condition: PromptCondition) -> dict[str, Any]:
    """Return the rewards (mean, standard error, standard deviation) and the accuracies of images in [0, 1]."""
    rewards = {}
    for name in REWARDS:
        values = find_reward(name)(images, condition).double()
        rewards[name] = _mean(values) | {"sd": round(float(values.std()), 5)}
    found = accuracies(2 * images - 1, [parse(prompt) for prompt in condition.prompts])
    return {"rewards": rewards, "accuracy": {k: v for k, v in found.items() if v["n"]}}


def _mean(values: Tensor) -> dict[str, float]:
    error = float(values.double().std()) / math.sqrt(len(values))
    return {"mean": round(float(values.double().mean()), 5), "error": round(error, 5)}


def in_sd(base: Mapping[str, Any], member: Mapping[str, Any]) -> dict[str, float]:
    """Return how far each reward moved, in standard deviations of the base."""
    before, after = base["rewards"], member["rewards"]
    return {name: round((after[name]["mean"] - before[name]["mean"]) / before[name]["sd"], 3) for name in REWARDS}


def main(argv: Sequence[str] | None = None) -> int:
    """Tune and measure; return 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=tuple(RECIPES), default=tuple(RECIPES), metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("out/small-members"), help="folder of the runs")
    parser.add_argument("--resume", action="store_true", help="go on with the runs in --out")
    parser.add_argument("--measure", action="store_true", help="measure the members that exist, tune none")
    arguments = parser.parse_args(argv)
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    identity = tunable(load_small()).identity()
    if results.get("identity") != identity:
        # another base: what was measured on the last one is void
        results = {"identity": identity, "base": measured(None), "members": {}}
        write_atomically(RESULTS, json.dumps(results, indent=1) + "\n")
    base = results["base"]
    scales = {name: value["sd"] for name, value in base["guidance 1"]["rewards"].items()}
    for name in arguments.only:
        recipe = RECIPES[name]
        if not arguments.measure:
            tune(name, scales, arguments.out, resume=arguments.resume)
        entry: dict[str, Any] = {"weights": recipe.weights, "kl_weight": recipe.kl_weight}
        if (arguments.out / name / METRICS).exists():
            rounds = [json.loads(line) for line in (arguments.out / name / METRICS).read_text().splitlines()]
            entry |= {"iterations": len(rounds), "seconds": round(sum(part["seconds"] for part in rounds), 1)}
        found = measured(name)
        for key, part in found.items():
            part["moved"] = in_sd(base[key], part)
            print(name, key, part["moved"], f"KL {part['kl']['mean']:.2f} nats")
        results["members"][name] = entry | found
        write_atomically(RESULTS, json.dumps(results, indent=1) + "\n")
    return 0


def measured(name: str | None) -> dict[str, Any]:
    """Return what ``measure`` finds without guidance and with the usual one."""
    return {f"guidance {guidance:g}": measure(name, guidance)[0] for guidance in (1.0, GUIDANCE)}


if __name__ == "__main__":
    raise SystemExit(main())
