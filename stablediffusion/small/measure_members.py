"""What the bundled members do to pictures, and how blend, soup and a member of the preference itself differ.

Everything is drawn on the same captions and the same noise as the base's pictures, DDIM with eta 1 and the usual
guidance, so that differences are paired. ``moved`` is in standard deviations of the base's pictures, with its standard
error; accuracies are the scorer's, of what captions mention.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sdeblend.blend import Preference
from sdeblend.io import write_atomically
from stablediffusion.bundled import GUIDANCE, MEMBERS, SMALL, bundled_member, bundled_names
from stablediffusion.knobs import Mode
from stablediffusion.members import load_members
from stablediffusion.rewards import REWARDS
from stablediffusion.small import load_small
from stablediffusion.small.cells import Cell, draw_cell, mean_and_error
from stablediffusion.small.evaluate import accuracies
from stablediffusion.small.scenes import caption, mention, parse, sample_scenes

RESULTS = SMALL / "members.json"
SCORED = ("compress", "vivid", "align")
IMAGES, STEPS = 64, 25
MODES: tuple[Mode, ...] = ("mpa", "soup")
WEIGHTS = {0.25: "morl-25", 0.5: "morl-50", 0.75: "morl-75"}


def measure(names: Sequence[str]) -> None:
    """Measure the base, these members and, once all are there, blends; write ``members.json``.

    Args:
        names: of members in the package.
    """
    record: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    pipe, prompts = load_small(), captions()
    base = _cell(pipe, {}, None, "mpa", prompts)
    record |= {"images": IMAGES, "steps": STEPS, "guidance": GUIDANCE, "base": _facts(base, base, prompts)}
    found = record.setdefault("members", {})
    for name in names:
        cell = _cell(pipe, {name: 1.0}, {name: str(bundled_member(name))}, "mpa", prompts)
        facts = MEMBERS / f"{name}.json"
        tuned = json.loads(facts.read_text(encoding="utf-8")) if facts.exists() else {}
        found[name] = tuned | _facts(cell, base, prompts)
        print(name, found[name]["moved"])
        write_atomically(RESULTS, json.dumps(record, indent=1) + "\n")
    if {"compress", "vivid", *WEIGHTS.values()} <= {*bundled_names()}:
        record["blends"] = {str(w): _compared(pipe, w, tuned, base, prompts) for w, tuned in WEIGHTS.items()}
        write_atomically(RESULTS, json.dumps(record, indent=1) + "\n")


def captions(count: int = IMAGES, seed: int = 11) -> list[str]:
    """Draw captions with colours, shapes and background mentioned, of the training's combinations."""
    generator = torch.Generator().manual_seed(seed)
    return [caption(scene) for scene in mention(sample_scenes(count, generator), generator, combination=True)]


def _cell(
    pipe: Any, weights: Mapping[str, float], files: Mapping[str, str] | None, mode: Mode, prompts: Sequence[str]
) -> Cell:
    rewards = {name: REWARDS[name] for name in SCORED}
    # The base is any member at strength zero.
    members = load_members(pipe, dict(files) if files else {"compress": bundled_member("compress")})
    preference = Preference(weights) if weights else Preference({"compress": 0.0})
    cell = draw_cell(pipe, members, preference, mode=mode, prompts=prompts, each=1, steps=STEPS, rewards=rewards)
    members.remove()
    return cell


def _facts(cell: Cell, base: Cell, prompts: Sequence[str]) -> dict[str, Any]:
    """Return means, how far they moved from the base's, and accuracies."""
    right = accuracies(2 * cell.images - 1, [parse(prompt) for prompt in prompts])
    return {
        "mean": {name: _pair(cell.rewards[name]) for name in SCORED},
        "moved": {
            name: _pair((cell.rewards[name] - base.rewards[name]) / float(base.rewards[name].std())) for name in SCORED
        },
        "accuracy": {name: round(value["accuracy"], 4) for name, value in right.items() if value["n"]},
    }


def _compared(pipe: Any, weight: float, tuned: str, base: Cell, prompts: Sequence[str]) -> dict[str, Any]:
    """Return what blend, soup and the member of the preference itself do, and the blend's advantage over the soup."""
    weights = {"compress": 1 - weight, "vivid": weight}
    files = {name: str(bundled_member(name)) for name in weights}
    cells: dict[str, Cell] = {mode: _cell(pipe, weights, files, mode, prompts) for mode in MODES}
    cells["morl"] = _cell(pipe, {tuned: 1.0}, {tuned: str(bundled_member(tuned))}, "mpa", prompts)
    spread = {name: float(base.rewards[name].std()) for name in weights}

    def weighted(cell: Cell) -> Tensor:
        return sum((w / spread[name] * cell.rewards[name] for name, w in weights.items()), torch.zeros(len(prompts)))

    out: dict[str, Any] = {mode: _facts(cell, base, prompts)["moved"] for mode, cell in cells.items()}
    nats = cells["mpa"].nats
    pixels = (cells["mpa"].images - cells["soup"].images).square().flatten(1).mean(1).sqrt()
    return out | {
        "certificate": None if nats is None else _pair(nats),
        "blend minus soup, weighted reward in sd": _pair(weighted(cells["mpa"]) - weighted(cells["soup"])),
        "blend minus morl, weighted reward in sd": _pair(weighted(cells["mpa"]) - weighted(cells["morl"])),
        "distance of pixels, blend to soup": _pair(pixels),
    }


def _pair(values: Tensor) -> list[float]:
    """Return mean and standard error, rounded."""
    mean, error = mean_and_error(values.double())
    digits = 6 if not math.isfinite(mean) or abs(mean) < 1e-2 else 4
    return [round(mean, digits), round(error, digits)]
