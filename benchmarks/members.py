"""Every trainer on mixtures, against the closed-form tilt; a cell is kept as soon as it is measured.

``python -m benchmarks.members [--only TRAINER]`` continues where it was stopped; without results/members.json it starts
anew.
"""

from __future__ import annotations

import argparse
import importlib
import json
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import RESULTS
from sdeblend import BackwardSDE, Blend, Preference, VPLinear, solve, time_grid
from sdeblend.finetune.config import TRAINERS
from sdeblend.finetune.reward import WeightedReward
from sdeblend.io import write_atomically
from sdeblend.score import Stack
from toy import metrics
from toy.finetune import MixtureTunable, TunedScore, reward_of
from toy.network import for_mixture, load_network, pretrain, save_network
from toy.problems import PROBLEMS, Problem
from toy.recovery import recovered
from toy.stack import mixture_score

SAMPLES, STEPS = 8000, 100
SCHEDULE = VPLinear()
KL_WEIGHTS = (1.0, 0.5, 0.25)
REWARDS = (("line2", "right"), ("line2", "left"), ("ring8", "right"))
BLEND = ("line2", ("right", "left"))
Cell = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """How a trainer is run: phases of (iterations, learning rate), and its settings."""

    trainer: str
    phases: tuple[tuple[int, float], ...]
    settings: dict[str, Any] = field(default_factory=dict)


RECIPES = {
    "regression": Recipe("regression", ((50, 3e-3), (25, 1e-3))),
    "adjoint": Recipe("adjoint", ((40, 3e-3), (20, 1e-3))),
    "backprop": Recipe("backprop", ((40, 3e-3), (20, 1e-3)), {"group_size": 128}),
    "dpok": Recipe("dpok", ((40, 3e-3), (20, 1e-3))),
    "ddpo": Recipe("ddpo", ((40, 3e-3), (20, 1e-3))),
    "backprop, last 5": Recipe("backprop", ((40, 3e-3), (20, 1e-3)), {"last": 5}),
    "dpok, published": Recipe("dpok", ((150, 1e-5),), {"mode": "published"}),
}


def base_model(name: str, problem: Problem) -> MixtureTunable:
    """Return the pre-trained network of a problem, pre-trained once a machine."""
    place = Path(tempfile.gettempdir()) / f"sdeblend-members-{name}.safetensors"
    network = for_mixture(problem.base, SCHEDULE, seed=0)
    if place.exists():
        load_network(network, place)
    else:
        pretrain(network, problem.base, steps=4000)
        save_network(network, place)
    return MixtureTunable(problem.base, SCHEDULE, network)


def tuned(recipe: Recipe, model: MixtureTunable, problem: Problem, reward: str, kl_weight: float) -> Cell:
    """Tune a model in place and return what it cost."""
    module, trainer_name, settings_name = TRAINERS[recipe.trainer]
    loaded = importlib.import_module(f"sdeblend.finetune.{module}")
    kind = getattr(loaded, settings_name)
    presets = getattr(kind, "presets", {}).get(recipe.settings.get("mode", ""), {})
    common = {"kl_weight": kl_weight, "group_size": 256, "ema_decay": 0.96, "learning_rate": recipe.phases[0][1]}
    settings = kind(**(common | presets | recipe.settings))
    weighted = WeightedReward({reward: reward_of(problem.rewards[reward])})
    trainer = getattr(loaded, trainer_name)(model, weighted, settings)
    start, log = time.process_time(), {}
    for iterations, rate in recipe.phases:
        for group in trainer.optimizer.param_groups:
            group["lr"] = rate
        for _ in range(iterations):
            log = trainer.iterate()
    with torch.no_grad():
        for value, mean in zip(trainer.parameters, trainer.average or trainer.parameters, strict=True):
            value.copy_(mean)
    return {"seconds": time.process_time() - start, "reward_calls": trainer.reward_calls, "kl": log["kl"]}


def distances(score: Any, target: Any) -> tuple[float, float]:
    """Return mode-weight total variation and sliced W2 of what a score samples, to the exact target."""
    generator = torch.Generator().manual_seed(11)
    start = SCHEDULE.prior((SAMPLES, target.dim), generator=generator)
    run = solve(BackwardSDE(SCHEDULE, score), start, time_grid(SCHEDULE, STEPS, "log-snr"), noise=generator,
                step=solver())  # fmt: skip
    samples, exact = run.samples.double(), target.sample(SAMPLES, generator=generator)
    return float(metrics.mode_weight_tv(samples, target).value), metrics.sliced_w2(samples, exact, generator=generator)


def solver() -> Any:
    """Return the step everything is sampled with."""
    from sdeblend.steps import ExponentialMultistep

    return ExponentialMultistep()


def measure(name: str, reward: str, kl_weight: float, recipe: Recipe) -> Cell:
    """Tune one member and measure it."""
    problem = PROBLEMS[name]().with_kl_weight(kl_weight)
    model, target = base_model(name, problem), problem.member(reward)
    cell = tuned(recipe, model, problem, reward, kl_weight)
    found, (tv, w2) = recovered(model, target), distances(TunedScore(model), target)
    exact_kl = problem.base.tilt_kl(problem.rewards[reward], kl_weight=kl_weight)
    return cell | vars(found) | {"tv": tv, "w2": w2, "exact_kl": exact_kl}


def floor(name: str, reward: str, kl_weight: float) -> Cell:
    """Measure exact samples, the exact score and the pre-trained network itself (against its own law)."""
    problem = PROBLEMS[name]().with_kl_weight(kl_weight)
    target, generator = problem.member(reward), torch.Generator().manual_seed(12)
    tv, w2 = distances(mixture_score(target, SCHEDULE), target)
    base_tv, base_w2 = distances(TunedScore(base_model(name, problem), base=True), problem.base)
    return {
        "floor_tv": float(metrics.mode_weight_tv_floor(target, SAMPLES, generator=generator).value),
        "floor_w2": float(metrics.sliced_w2_floor(target, SAMPLES, generator=generator).value),
        "exact_tv": tv, "exact_w2": w2, "base_tv": base_tv, "base_w2": base_w2,
    }  # fmt: skip


def blended(kl_weight: float, recipe: Recipe) -> Cell:
    """Blend two learned members, and two exact ones, half and half, against the exact target of the blend."""
    name, rewards = BLEND
    problem = PROBLEMS[name]().with_kl_weight(kl_weight)
    preference = Preference(dict.fromkeys(rewards, 0.5))
    target = problem.target(preference)
    models = []
    for reward in rewards:
        models.append(base_model(name, problem))
        tuned(recipe, models[-1], problem, reward, kl_weight)
    learned = Stack([TunedScore(models[0], base=True), *(TunedScore(model) for model in models)])
    cell: Cell = {}
    for kind, stack in (("learned", learned), ("exact", problem.stack(SCHEDULE))):
        cell[f"{kind}_tv"], cell[f"{kind}_w2"] = distances(Blend(stack, preference), target)
        for reward, score in zip(rewards, [*learned.functions[1:]] if kind == "learned" else [], strict=False):
            cell[f"{reward}_tv"], cell[f"{reward}_w2"] = distances(score, problem.member(reward))
    return cell


def main() -> None:
    """Measure every cell that is not in ``results/members.json`` yet and write it and the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.members", description=__doc__)
    parser.add_argument("--only", action="append", choices=list(RECIPES), help="these trainers")
    chosen = parser.parse_args().only or list(RECIPES)
    torch.set_num_threads(1)
    path = RESULTS / "members.json"
    cells: dict[str, Cell] = json.loads(path.read_text()) if path.exists() else {}
    jobs: dict[str, Any] = {}
    for name, reward in REWARDS:
        for alpha in KL_WEIGHTS:
            jobs[f"{name}|{reward}|{alpha}|floor"] = (floor, (name, reward, alpha))
    for trainer in chosen:
        for name, reward in REWARDS:
            for alpha in KL_WEIGHTS:
                jobs[f"{name}|{reward}|{alpha}|{trainer}"] = (measure, (name, reward, alpha, RECIPES[trainer]))
        if trainer == "regression":
            for alpha in KL_WEIGHTS:
                jobs[f"blend|{alpha}"] = (blended, (alpha, RECIPES[trainer]))
    for key, (function, arguments) in jobs.items():
        if key in cells:
            continue
        try:
            cells[key] = function(*arguments)
        except FloatingPointError as error:
            cells[key] = {"failed": str(error)}
        write_atomically(path, json.dumps(cells, indent=1) + "\n")
        write_atomically(path.with_suffix(".md"), table(cells))
        print(key, json.dumps(cells[key]), flush=True)


def table(cells: dict[str, Cell]) -> str:
    """Return the results as markdown."""
    lines = [
        "# members", "",
        "Measured by `python -m benchmarks.members`: every trainer on a network pre-trained on the mixture (three "
        f"layers of 128, LoRA of rank 8), against the closed-form tilt. {SAMPLES} samples, {STEPS} steps of "
        "DPM-Solver++ 2M (SDE). Slope: the strength that was reached (1: the KL weight is the one stated); residual: "
        "square error of the control over its square; TV of the mode weights and sliced W2, with the floor of exact "
        "samples. Seconds of one CPU thread.", "",
        "| problem | reward | KL weight | trainer | slope | residual | TV | W2 | reward calls | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for key, cell in sorted(cells.items(), key=_order):
        if key.startswith("blend"):
            continue
        name, reward, alpha, what = key.split("|")
        head = f"| {name} | {reward} | {alpha}"
        if what == "floor":
            lines += [
                f"{head} | exact samples | 1 | 0 | {cell['floor_tv']:.3f} | {cell['floor_w2']:.3f} | | |",
                f"{head} | exact score | 1 | 0 | {cell['exact_tv']:.3f} | {cell['exact_w2']:.3f} | | |",
                f"{head} | base network, to the base | | | {cell['base_tv']:.3f} | {cell['base_w2']:.3f} | | |",
            ]
        elif "failed" in cell:
            lines.append(f"{head} | {what} | {cell['failed']} | | | | | |")
        else:
            lines.append(
                f"{head} | {what} | {cell['slope']:.2f} | {cell['residual']:.3f} ({cell['base_residual']:.3f} base) | "
                f"{cell['tv']:.3f} | {cell['w2']:.3f} | {cell['reward_calls']} | {cell['seconds']:.0f} |"
            )
    blends = {key.split("|")[1]: cell for key, cell in cells.items() if key.startswith("blend")}
    if blends:
        lines += ["", "Blend of the two members of line2, half and half (regression), against the exact target:", "",
                  "| KL weight | TV, learned members | TV, exact members | W2, learned | W2, exact | TV of members |",
                  "| --- | --- | --- | --- | --- | --- |"]  # fmt: skip
        lines += [
            f"| {alpha} | {c['learned_tv']:.3f} | {c['exact_tv']:.3f} | {c['learned_w2']:.3f} | {c['exact_w2']:.3f} | "
            f"{c['right_tv']:.3f}, {c['left_tv']:.3f} |"
            for alpha, c in blends.items()
        ]
    return "\n".join(lines) + "\n"


def _order(item: tuple[str, Cell]) -> tuple[Any, ...]:
    name, *rest = item[0].split("|")
    if len(rest) < 3:
        return (name,)
    place = -1 if rest[2] == "floor" else list(RECIPES).index(rest[2])
    return name, rest[0], -float(rest[1]), place


if __name__ == "__main__":
    main()
