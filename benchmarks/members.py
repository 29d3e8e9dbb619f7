"""Every trainer on mixtures, against the closed-form tilt; a cell is kept as soon as it is measured.

``python -m benchmarks.members [--only TRAINER]`` continues where it was stopped; without results/members.json it starts
anew. Recipes are what reaches the tilt in minutes of one CPU thread, not what is fastest:

* policy gradients take 100 steps, since their ancestral chain is right to first order only: with 50, strengths on
  ``left`` are .90 to .96 however long they are trained;
* adjoint matching regresses on a quarter of the steps of four times the paths;
* "dpok, published" is at its own settings, KL weight and reward weight, which state no KL weight of the theory, and
  hardly moves in 150 iterations; "dpok, published loss" trains the same loss as long and as fast as the exact mode;
* "backprop, last 5" has uniform steps, for the last steps of others move next to nothing.

"there" is the first of ``PROBES`` looks at the member during its tuning, from which on the slope stays within 0.1 of 1.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import RESULTS
from sdeblend import BackwardSDE, Blend, Preference, VPLinear, solve, time_grid
from sdeblend.finetune.trainers import TRAINERS
from sdeblend.reward import WeightedReward
from sdeblend.score import Stack
from sdeblend.shell.console import markdown
from sdeblend.shell.files import write_atomically
from toy import metrics
from toy.networks.network import for_mixture, load_network, pretrain, save_network
from toy.networks.tunable import MixtureTunable, TunedScore, reward_of
from toy.problems import PROBLEMS, Problem
from toy.scores.stack import mixture_score
from toy.statements.recovery import recovered

SAMPLES, STEPS = 8000, 100
# Looks at a member while it is tuned, each at as many states; how near to 1 the slope is to count as there.
PROBES, PROBE_STATES, NEAR = 20, 4000, 0.1
SEEDS = (0, 1, 2)
SCHEDULE = VPLinear()
KL_WEIGHTS = (1.0, 0.5, 0.25)
REWARDS = {("line2", "right"): "linear", ("line2", "left"): "quadratic", ("ring8", "right"): "linear"}
# Problem, and the two rewards that are blended half and half.
BLENDS = (("line2", ("right", "left")), ("ring8", ("right", "up")))
Cell = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """How a trainer is run: phases of (iterations, learning rate), and its settings."""

    trainer: str
    phases: tuple[tuple[int, float], ...]
    settings: dict[str, Any] = field(default_factory=dict)


ADJOINT = {"group_size": 1024, "share": 0.25}
POLICY = ((40, 3e-3), (20, 1e-3))
RECIPES = {
    "regression": Recipe("regression", ((60, 2e-3), (60, 5e-4))),
    "adjoint": Recipe("adjoint", ((200, 3e-3), (50, 1e-3)), ADJOINT),
    "backprop": Recipe("backprop", ((500, 1.5e-3), (100, 5e-4))),
    "dpok": Recipe("dpok", POLICY, {"steps": 100, "buffer": 80_000, "ema_decay": 0.96}),
    "ddpo": Recipe("ddpo", POLICY, {"steps": 100, "ema_decay": 0.96}),
    "backprop, last 5": Recipe("backprop", ((150, 1.5e-3), (30, 5e-4)), {"last": 5, "spacing": "uniform"}),
    "dpok, published": Recipe("dpok", ((150, 1e-5),), {"mode": "published"}),
    "dpok, published loss": Recipe(
        "dpok", POLICY, {"mode": "published", "groups": 1, "group_size": 256, "buffer": 40_000, "batch": 4096}
    ),
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


def tuned(
    recipe: Recipe, model: MixtureTunable, problem: Problem, reward: str, kl_weight: float, seed: int = 0
) -> Cell:
    """Tune a model in place and return what it cost, and what it cost to get there."""
    kind = TRAINERS[recipe.trainer]
    common = {"kl_weight": kl_weight, "group_size": 256, "ema_decay": 0.98, "learning_rate": recipe.phases[0][1],
              "seed": seed}  # fmt: skip
    presets = kind.settings_class.preset(recipe.settings)
    settings = kind.settings_class(**{**common, **presets, **recipe.settings})
    trainer = kind(model, WeightedReward({reward: reward_of(problem.rewards[reward])}), settings)
    target, every = problem.member(reward), sum(n for n, _ in recipe.phases) // PROBES
    spent, done, log, there = 0.0, 0, dict[str, Any](), dict[str, Any]()
    for iterations, rate in recipe.phases:
        for group in trainer.optimizer.param_groups:
            group["lr"] = rate
        for _ in range(iterations):
            start = time.process_time()
            log = trainer.iterate()
            spent, done = spent + time.process_time() - start, done + 1
            if done % every == 0:
                with trainer.averaged():
                    slope = recovered(model, target, count=PROBE_STATES).slope
                near = abs(slope - 1) <= NEAR
                here = {"there_calls": trainer.reward_calls, "there_seconds": spent}
                there = (there or here) if near else {}
    trainer.set_parameters(trainer.average or trainer.parameters)
    return {"seconds": spent, "reward_calls": trainer.reward_calls, "kl": log["kl"]} | there


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


def blended(name: str, rewards: tuple[str, str], kl_weight: float, recipe: Recipe) -> Cell:
    """Blend two learned members, and two exact ones, half and half, against the exact target of the blend.

    Every seed of ``SEEDS`` tunes members of its own; start and noise of the samples are the same for all.
    """
    problem = PROBLEMS[name]().with_kl_weight(kl_weight)
    preference = Preference(dict.fromkeys(rewards, 0.5))
    target, generator = problem.target(preference), torch.Generator().manual_seed(12)
    floors = metrics.mode_weight_tv_floor, metrics.sliced_w2_floor
    cell: Cell = {"rewards": rewards} | {
        f"floor_{kind}": float(floor(target, SAMPLES, generator=generator).value)
        for kind, floor in zip(("tv", "w2"), floors, strict=True)
    }
    cell["exact_tv"], cell["exact_w2"] = distances(Blend(problem.stack(SCHEDULE), preference), target)
    found: dict[str, list[float]] = {}
    for seed in SEEDS:
        models = []
        for reward in rewards:
            models.append(base_model(name, problem))
            tuned(recipe, models[-1], problem, reward, kl_weight, seed)
        learned = Stack([TunedScore(models[0], base=True), *(TunedScore(model) for model in models)])
        scores: dict[str, tuple[Any, Any]] = {"learned": (Blend(learned, preference), target)}
        scores |= {r: (s, problem.member(r)) for r, s in zip(rewards, learned.functions[1:], strict=True)}
        for kind, (score, aim) in scores.items():
            for distance, value in zip(("tv", "w2"), distances(score, aim), strict=True):
                found.setdefault(f"{kind}_{distance}", []).append(value)
    return cell | found


def jobs(chosen: list[str]) -> dict[str, tuple[Any, ...]]:
    """Return what is to be measured, by the name of its cell: a function and its arguments."""
    out: dict[str, tuple[Any, ...]] = {}
    for name, reward in REWARDS:
        for alpha in KL_WEIGHTS:
            out[f"{name}|{reward}|{alpha}|floor"] = (floor, name, reward, alpha)
    for trainer in chosen:
        recipe = RECIPES[trainer]
        for name, reward in REWARDS:
            for alpha in KL_WEIGHTS:
                out[f"{name}|{reward}|{alpha}|{trainer}"] = (measure, name, reward, alpha, recipe)
        if trainer == "regression":
            for name, rewards in BLENDS:
                for alpha in KL_WEIGHTS:
                    out[f"blend|{name}|{alpha}"] = (blended, name, rewards, alpha, recipe)
    return out


def main() -> None:
    """Measure every cell that is not in ``results/members.json`` yet and write it and the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.members", description=__doc__)
    parser.add_argument("--only", action="append", choices=list(RECIPES), help="these trainers")
    chosen = parser.parse_args().only or list(RECIPES)
    torch.set_num_threads(1)
    path = RESULTS / "members.json"
    cells: dict[str, Cell] = json.loads(path.read_text()) if path.exists() else {}
    for key, (function, *arguments) in jobs(chosen).items():
        if key not in cells:
            try:
                cells[key] = function(*arguments)
            except FloatingPointError as error:
                cells[key] = {"failed": str(error)}
            write_atomically(path, json.dumps(cells, indent=1) + "\n")
            print(key, json.dumps(cells[key]), flush=True)
    write_atomically(path.with_suffix(".md"), table(cells))


def table(cells: dict[str, Cell]) -> str:
    """Return the results as markdown."""
    lines = [
        "# members", "",
        "Measured by `python -m benchmarks.members`: every trainer on a network pre-trained on the mixture (three "
        f"layers of 128, LoRA of rank 8), against the closed-form tilt. {SAMPLES} samples, {STEPS} steps of "
        "DPM-Solver++ 2M (SDE). Slope: the strength that was reached (1: the KL weight is the one stated); residual: "
        "square error of the control over its square; TV of the mode weights and sliced W2, beside those of as many "
        "exact samples (floor). Processor seconds of one thread, other programs beside it; \"there\": reward calls and "
        f"seconds until the slope stays within {NEAR:g} of 1.", "",
        "All cells, by the recipes in benchmarks/members.py. \"dpok, published\", the same loss trained longer and "
        "\"backprop, last 5\" state no KL weight: their slopes are what they happen to reach.", "",
        _summary(cells), "",
    ]  # fmt: skip
    for (name, reward), kind in REWARDS.items():
        for alpha in KL_WEIGHTS:
            head = f"{name}|{reward}|{alpha}|"
            own = {key.removeprefix(head): cell for key, cell in cells.items() if key.startswith(head)}
            if own:
                lines += [f"## {name}, {reward} ({kind}), KL weight {alpha:g}", "", _details(own), ""]
    blends = {tuple(key.split("|")[1:]): cell for key, cell in cells.items() if key.startswith("blend|")}
    if blends:
        lines += ["## Blends", "",
                  f"Of two members, half and half, learned by regression (mean of {len(SEEDS)} tunings ± standard "
                  "error) or exact, against the exact target; what learned members add to the blend's own error is "
                  "the difference:", ""]  # fmt: skip
        header = ("problem", "members", "KL weight", "TV, learned", "TV, exact", "floor", "W2, learned", "W2, exact",
                  "floor", "TV of each learned member")  # fmt: skip
        rows = []
        for (name, alpha), cell in blends.items():
            values = []
            for kind in ("tv", "w2"):
                values += [_mean(cell[f"learned_{kind}"]), *(f"{cell[f'{w}_{kind}']:.3f}" for w in ("exact", "floor"))]
            members = ", ".join(_mean(cell[reward + "_tv"]) for reward in cell["rewards"])
            rows.append((name, ", ".join(cell["rewards"]), f"{float(alpha):g}", *values, members))
        lines.append(markdown(header, rows))
    return "\n".join(lines).rstrip() + "\n"


def _mean(values: list[float]) -> str:
    found = torch.tensor(values, dtype=torch.float64)
    return f"{float(found.mean()):.3f} ± {float(found.std()) / len(values) ** 0.5:.3f}"


def _there(cells: list[Cell]) -> list[str]:
    """Return how many cells got there, and the ranges of reward calls and seconds until then."""
    arrived = [cell for cell in cells if "there_calls" in cell]
    spans = [_span([cell[f"there_{name}"] for cell in arrived], 0) if arrived else "-" for name in ("calls", "seconds")]
    return [f"{len(arrived)} of {len(cells)}", *spans]


def _summary(cells: dict[str, Cell]) -> str:
    """Return a table with one row a trainer: the range of what it reached over all cells."""
    header = ("trainer", "cells", "slope", "residual", "TV", "W2", "reward calls", "seconds", "there", "calls to there",
              "seconds to there")  # fmt: skip
    rows = []
    floors = [cell for key, cell in cells.items() if key.endswith("|floor")]
    if floors:
        spans = [_span([cell[f"floor_{name}"] for cell in floors], 3) for name in ("tv", "w2")]
        rows.append(["exact samples", str(len(floors)), "1", "0", *spans, *[""] * 5])
    for trainer in RECIPES:
        own = [cell for key, cell in cells.items() if key.endswith(f"|{trainer}")]
        done = [cell for cell in own if "failed" not in cell]
        if done:
            parts = [_span([cell[name] for cell in done], digits) for name, digits in
                     (("slope", 2), ("residual", 3), ("tv", 3), ("w2", 3), ("reward_calls", 0), ("seconds", 0))]
            failed = f" ({len(own) - len(done)} failed)" if len(done) < len(own) else ""
            rows.append([trainer, f"{len(own)}{failed}", *parts, *_there(done)])
    return markdown(header, rows)


def _span(values: list[float], digits: int) -> str:
    low, high = (f"{value:.{digits}f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _details(cells: dict[str, Cell]) -> str:
    """Return the table of one problem, reward and KL weight; cells by trainer."""
    header = ("trainer", "slope", "residual (of the base network)", "TV", "W2", "reward calls", "seconds")
    rows = []
    if "floor" in cells:
        for key, words, slope, residual in (("floor", "exact samples", "1", "0"), ("exact", "exact score", "1", "0"),
                                            ("base", "base network, to the base", "", "")):  # fmt: skip
            measured = [f"{cells['floor'][f'{key}_{distance}']:.3f}" for distance in ("tv", "w2")]
            rows.append([words, slope, residual, *measured, "", ""])
    for trainer in RECIPES:
        cell = cells.get(trainer, {})
        if "failed" in cell:
            rows.append([trainer, cell["failed"], *[""] * 5])
        elif cell:
            numbers = [f"{cell['tv']:.3f}", f"{cell['w2']:.3f}", str(cell["reward_calls"]), f"{cell['seconds']:.0f}"]
            residual = f"{cell['residual']:.3f} ({cell['base_residual']:.3f})"
            rows.append([trainer, f"{cell['slope']:.2f}", residual, *numbers])
    return markdown(header, rows)


if __name__ == "__main__":
    main()
