"""From stored cells to numbers: what tables and figures tell, as one object that JSON can hold.

Nothing here samples. Cells of one group of variants, preference and strength are compared method by method, on the
seeds that all of them have. A hypervolume needs two rewards and two preferences.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from sdeblend.evaluate.fronts import fronts
from sdeblend.evaluate.groups import Cells, Group, method_of
from sdeblend.evaluate.measures import Resampled
from sdeblend.evaluate.rows import Folder, Row

_OPTIONS = "options."


@dataclass(frozen=True)
class Stored:
    """Results of one configuration, from one folder or several.

    Attributes:
        manifest: of the first folder.
        cells: each once, its method by the name it has in ``options``.
        folders: where each cell lies.
        options: method -> its settings; one with other settings than in the first folder has these in its name.
    """

    manifest: Mapping[str, Any]
    cells: Cells
    folders: Sequence[Path] = ()
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def load(folders: Sequence[Folder]) -> list[Stored]:
    """Read results; folders that sampled the same problems and prompts with the same seed are told together.

    Raises:
        ValueError: for a folder without results or with a damaged cell, or for folders whose blocks of seeds differ.
    """
    found: dict[str, tuple[Mapping[str, Any], dict[str, dict[str, Any]], dict[str, _Found]]] = {}
    for folder in folders:
        manifest = folder.manifest()
        keys = folder.stored()
        if manifest is None or not keys:
            raise ValueError(f"{folder.path}: holds no results; name a folder that 'sdeblend evaluate' wrote")
        fixed = manifest["fixed"]
        same = {k: v for k, v in fixed.items() if k in ("kind", "seed") or k.startswith(("backend.", "identity."))}
        same["prompts"] = manifest["prompts"]
        _, options, cells = found.setdefault(repr(sorted(same.items())), (manifest, {}, {}))
        names = _names({k.removeprefix(_OPTIONS): v for k, v in fixed.items() if k.startswith(_OPTIONS)}, options)
        for key in keys:
            if key not in cells:
                head, rows = folder.read(key)
                cells[key] = _Found({**head, "method": names[head["method"]]}, rows, folder.path)
    out = []
    for pinned, options, own in found.values():
        ordered = sorted(own.values(), key=lambda cell: cell.head["index"])
        _check_blocks(ordered)
        cells_of = [(cell.head, cell.rows) for cell in ordered]
        out.append(Stored(pinned, cells_of, [cell.folder for cell in ordered], options))
    return out


@dataclass(frozen=True)
class _Found:
    """A cell and the folder it was read from."""

    head: dict[str, Any]
    rows: list[Row]
    folder: Path


def _names(own: Mapping[str, dict[str, Any]], known: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Return what a folder's methods are called beside those that are known, and add them to these."""
    names = {}
    for method, settings in own.items():
        first = known.setdefault(method, settings)
        other = ", ".join(f"{key} {value}" for key, value in settings.items() if value != first.get(key))
        names[method] = f"{method} ({other})" if other else method
        known[names[method]] = settings
    return names


def _check_blocks(cells: Iterable[_Found]) -> None:
    """Check that methods can be paired block by block, and that no sample counts twice."""
    blocks: dict[tuple[int, int], Path] = {}
    seen: set[tuple[Any, ...]] = set()
    for cell in cells:
        head, rows = cell.head, cell.rows
        first, count = head["first_seed"], head["count"]
        blocks.setdefault((first, count), cell.folder)
        what = head["method"], head["variant"], head["prompt"], *head["weights"].items(), head["strength"], first
        if what in seen or (rows and [row["seed"] for row in rows] != list(range(first, first + count))):
            raise ValueError(
                f"{cell.folder}: needs one row a seed of every method, got seeds {first} to {first + count - 1} of "
                f"{head['method']!r} twice or in part; sample it again into another folder"
            )
        seen.add(what)
    for (low, size), (high, other) in pairwise(sorted(blocks)):
        if low + size > high:
            raise ValueError(
                f"{blocks[high, other]}: needs the blocks of seeds of {blocks[low, size]} to be told with it, got "
                f"{high} to {high + other - 1} beside {low} to {low + size - 1}; compare them apart"
            )


def summarise(stored: Stored) -> dict[str, Any]:
    """Return all numbers of one configuration.

    Args:
        stored: what ``load`` read.

    Returns:
        title, note, confidence, reference, rewards (their scales and units, None if not known), options (of each method
        those that are not its defaults), groups (one a group of variants, preference and strength), fronts, published.
    """
    manifest, report = stored.manifest, stored.manifest["report"]
    together = {v["name"]: v for v in manifest["variants"]}
    grouped: dict[tuple[str, tuple[tuple[str, float], ...], float], Cells] = {}
    for head, rows in stored.cells:
        key = together[head["variant"]]["group"], tuple(head["weights"].items()), head["strength"]
        grouped.setdefault(key, []).append((head, rows))
    counts: dict[tuple[int, int, int], Resampled] = {}
    rewards = manifest.get("rewards")
    groups, curves = [], {}
    for (name, weights, strength), cells in grouped.items():
        group = Group(cells, report, counts)
        values = next(v["values"] for v in manifest["variants"] if v["group"] == name)
        members = {v["name"] for v in manifest["variants"] if v["group"] == name}
        groups.append(
            {
                "group": name,
                "values": values,
                "preference": dict(weights),
                "strength": strength,
                "scales": {r["name"]: r["scale"] for r in rewards or () if members & set(r["variants"])},
                **group.numbers(),
            }
        )
        curves[name, weights, strength] = group
    return {
        "title": manifest["title"],
        "note": report.get("note", ""),
        "confidence": report["confidence"],
        "reference": report["reference"],
        "rewards": rewards,
        "options": {name: _chosen(name, settings) for name, settings in stored.options.items()},
        "groups": groups,
        "fronts": fronts(curves, report),
        "published": manifest.get("published", []),
    }


def _chosen(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a method that are not its defaults."""
    method = method_of(name)
    defaults = {} if method is None else method.options().model_dump()
    return {key: value for key, value in settings.items() if key not in defaults or defaults[key] != value}


def exact_reward(group: Mapping[str, Any]) -> float | None:
    """Return r(w) of a group's exact target, None if a mean that it needs is unknown."""
    found = [(w, group["target"].get(name)) for name, w in group["preference"].items() if w]
    return None if any(value is None for _, value in found) else sum(w * value for w, value in found)


def label(name: str) -> str:
    """Return what people call a method."""
    method = method_of(name)
    return name if method is None else method.label + name.removeprefix(name.partition(" (")[0])
