"""What the bundled members do to pictures, against what their targets would do.

Everything is drawn on the same captions and the same noise as the base's pictures, DDIM with eta 1, several pictures a
caption. ``moved`` is the mean difference from the base's pictures over the base's standard deviation *within* a
caption, the only spread that a tilt given the caption can use, with a standard error over captions. ``target`` is what
the member is tuned for: how far the tilt of drawings, decoded, lies from the drawings of the same captions, in the
standard deviation of those within a caption. Accuracies are the scorer's, of what captions mention.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdeblend.blend import Preference
from sdeblend.shell.console import markdown, track
from sdeblend.shell.files import write_atomically
from stablediffusion.adapters.members import load_members
from stablediffusion.making.recipes import recipe_of
from stablediffusion.rewards.formulas import FORMULAS
from stablediffusion.scenes.captions import different_captions, parse
from stablediffusion.scenes.scorer import accuracies
from stablediffusion.small import load_small
from stablediffusion.small.candidates import SCORED, Candidates, draw_candidates
from stablediffusion.small.cells import Cell, draw_cell, mean_and_error
from stablediffusion.small.files import GUIDANCE, SMALL, bundled_member

RESULTS = SMALL / "members.json"
CAPTIONS, EACH, STEPS = 64, 4, 25
GUIDANCES = (1.0, GUIDANCE)


def measure(names: Sequence[str], scales: Mapping[str, float], work: Path) -> None:
    """Measure the base and these members; write ``members.json``.

    Args:
        names: of members in the package.
        scales: standard deviation of each reward over the drawings that the members were tuned on.
        work: folder with the facts of each member's tuning, NAME.json; what is missing is left out.
    """
    record: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    pipe, prompts = load_small(), different_captions(CAPTIONS, torch.Generator().manual_seed(11), combination=True)
    drawn = draw_candidates(pipe, prompts, generator=torch.Generator().manual_seed(13))
    record |= {"captions": CAPTIONS, "pictures a caption": EACH, "steps": STEPS, "scales": dict(scales)}
    bases = {guidance: _cell(pipe, None, prompts, guidance) for guidance in GUIDANCES}
    record["base"] = {f"guidance {g:g}": _facts(cell, cell, prompts) for g, cell in bases.items()}
    found = record.setdefault("members", {})
    for name in track(names, "measured", unit="members"):
        facts = work / f"{name}.json"
        own: dict[str, Any] = json.loads(facts.read_text(encoding="utf-8")) if facts.exists() else {}
        # What is tuned on the base's own samples knows its target from them alone.
        own["target"] = _own_target(own) if recipe_of(name).own else _target(drawn, name, scales)
        for guidance, base in bases.items():
            own[f"guidance {guidance:g}"] = _facts(_cell(pipe, name, prompts, guidance), base, prompts)
        found[name] = own
        write_atomically(RESULTS, json.dumps(record, indent=1) + "\n")
    print(table(record))


def table(record: Mapping[str, Any]) -> str:
    """Return the model card's table of members, in Markdown."""
    columns = [(g, reward) for g in GUIDANCES for reward in SCORED]
    header = ["member", "KL of the target, nats", "target: compress, vivid, align",
              *(f"{reward}, guidance {g:g}" for g, reward in columns), "colour, shape right, %"]  # fmt: skip
    rows = []
    for name, member in record["members"].items():
        target = ", ".join(f"{v:+.2f}" if (v := member["target"].get(r)) is not None else "-" for r in SCORED)
        moved = [member[f"guidance {g:g}"]["moved"][reward] for g, reward in columns]
        right = member[f"guidance {GUIDANCE:g}"]["accuracy"]
        cells = [f"`{name}`", f"{member.get('kl_of_target', math.nan):.2f}", target]
        cells += [f"{value:+.2f} ± {error:.2f}" for value, error in moved]
        rows.append([*cells, f"{100 * right['colour']:.0f}, {100 * right['shape']:.0f}"])
    return markdown(header, rows)


def _cell(pipe: Any, name: str | None, prompts: Sequence[str], guidance: float) -> Cell:
    # The base is any member at strength zero.
    member = name or "compress"
    members = load_members(pipe, {member: bundled_member(member)})
    try:
        return draw_cell(
            pipe, members, Preference({member: 1.0 if name else 0.0}), prompts=prompts, each=EACH, steps=STEPS,
            guidance=guidance, rewards={reward: FORMULAS[reward] for reward in SCORED},
        )  # fmt: skip
    finally:
        members.remove()


def _facts(cell: Cell, base: Cell, prompts: Sequence[str]) -> dict[str, Any]:
    """Return means, how far they moved from the base's, and accuracies."""
    mentioned = [parse(prompt) for prompt in prompts for _ in range(EACH)]
    right = accuracies(2 * cell.images - 1, mentioned)
    return {
        "mean": {name: _pair(cell.rewards[name]) for name in SCORED},
        "within": {name: round(_within(cell.rewards[name]), 4) for name in SCORED},
        "moved": {
            name: _pair((cell.rewards[name] - base.rewards[name]).reshape(-1, EACH).mean(1)
                        / _within(base.rewards[name]))
            for name in SCORED
        },
        "accuracy": {name: round(value["accuracy"], 4) for name, value in right.items() if value["n"]},
    }  # fmt: skip


def _within(values: Tensor) -> float:
    """Return the standard deviation within a caption, pooled over captions."""
    return float(values.reshape(-1, EACH).var(1).mean().sqrt())


def _target(drawn: Candidates, name: str, scales: Mapping[str, float]) -> dict[str, float]:
    recipe = recipe_of(name)
    weights = (drawn.total(recipe.weights, scales) / recipe.kl_weight).softmax(1)
    out = {"effective candidates": round(float((1 / weights.square().sum(1)).median()), 1)}
    for reward in SCORED:
        values = drawn.rewards[reward].double()
        gained = ((weights * values).sum(1) - values.mean(1)).mean()
        out[reward] = round(float(gained / values.var(1).mean().sqrt()), 3)
    return out


def _own_target(facts: Mapping[str, Any]) -> dict[str, float]:
    return {"align": round(facts["gain_of_target"] / facts["within_of_captions"], 3)} if facts else {}


def _pair(values: Tensor) -> list[float]:
    """Return mean and standard error, rounded."""
    mean, error = mean_and_error(values.double())
    digits = 6 if not math.isfinite(mean) or abs(mean) < 1e-2 else 4
    return [round(mean, digits), round(error, digits)]
