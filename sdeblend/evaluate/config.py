"""The file that says what to compare: CONFIG.toml, and the grid of cells that it stands for.

    title = "Two rewards on a ring"
    [backend]                   # what is sampled: `kind` names a backend, the other keys are the backend's own
    kind = "mixture"
    [grid]                      # every method with every preference, strength, prompt and seed
    methods = ["exact", "mpa", "mpa-corrected", "code"]
    preferences = ["equal", [0.2, 0.8]]     # "equal", or a weight for each reward
    strengths = [1.0]
    seeds = 4096                # samples a preference, method and prompt
    block = 2048                # sampled at once: the particles of a correction, and the replicates of a distance
    first_seed = 0
    seed = 0                    # of all random numbers, together with prompt, seed and step
    [methods.code]              # settings of a method
    candidates = 20
    [report]                    # how results are told, see ``sdeblend.evaluate.report``
    reference = "mpa"           # what the others are compared with
    [[published]]               # printed numbers to stand beside: label, group, reward, value, source

A cell is one method, variant, preference, strength, prompt and block of seeds; it is the unit of work and of storage.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, Final

import torch

from sdeblend.config import REQUIRED, Spec, check_keys, load_toml
from sdeblend.evaluate.backend import Backend, Variant, build
from sdeblend.evaluate.report import report_settings
from sdeblend.methods.draws import MAX_SEED
from sdeblend.methods.registry import METHODS
from sdeblend.preference import Preference
from sdeblend.shell.settings import Settings, parse

FORMAT: Final = 1
CONFIGS: Final = Path(__file__).parent / "configs"
EQUAL: Final = "equal"

_TOP: Spec = {
    "title": (str, ""),
    "backend": (dict, REQUIRED),
    "grid": (dict, REQUIRED),
    "methods": (dict, {}),
    "report": (dict, {}),
    "published": (list[dict], []),
}
_GRID: Spec = {
    "methods": (list[str], REQUIRED),
    "preferences": (list[str | list[float]], [EQUAL]),
    "strengths": (list[float], [1.0]),
    "seeds": (int, REQUIRED),
    "block": (int, 0),
    "first_seed": (int, 0),
    "seed": (int, 0),
}
_PUBLISHED: Spec = {
    "label": (str, REQUIRED),
    "group": (str, ""),
    "reward": (str, REQUIRED),
    "value": (float, REQUIRED),
    "source": (str, REQUIRED),
}


@dataclass(frozen=True)
class Cell:
    """The unit of work: one method on one variant, preference, strength, prompt and block of seeds.

    Attributes:
        method, variant, prompt: by name.
        weights: w by reward.
        strength: lambda.
        first_seed, count: the block of seeds.
    """

    method: str
    variant: str
    prompt: str
    weights: tuple[tuple[str, float], ...]
    strength: float
    first_seed: int
    count: int

    @property
    def wanted(self) -> Preference:
        """What is asked for."""
        return Preference(dict(self.weights), self.strength)

    @property
    def seeds(self) -> range:
        """The seeds of the block."""
        return range(self.first_seed, self.first_seed + self.count)

    def spec(self) -> dict[str, Any]:
        """Return the cell as JSON has it."""
        return {
            "method": self.method, "variant": self.variant, "prompt": self.prompt, "weights": dict(self.weights),
            "strength": self.strength, "first_seed": self.first_seed, "count": self.count,
        }  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """One settings file, checked.

    Attributes:
        file: where it came from.
        title: for tables.
        kind, table: the backend's.
        methods: names, each once.
        options: method -> its settings, defaults filled in.
        preferences: "equal" or weights in the order of the rewards.
        strengths: lambda.
        seeds, block, first_seed, seed: see the module.
        report: how results are told; may change without sampling anew.
        published: printed numbers.
    """

    file: str
    title: str
    kind: str
    table: Mapping[str, Any]
    methods: tuple[str, ...]
    options: Mapping[str, Settings]
    preferences: tuple[str | tuple[float, ...], ...]
    strengths: tuple[float, ...]
    seeds: int
    block: int
    first_seed: int
    seed: int
    report: Mapping[str, Any]
    published: tuple[Mapping[str, Any], ...]

    # What decides the samples; all else only decides how they are told.
    deciding: ClassVar[tuple[str, ...]] = (
        "kind", "table", "methods", "options", "preferences", "strengths", "seeds", "block", "first_seed", "seed",
    )  # fmt: skip

    def fixed(self) -> dict[str, Any]:
        """Return what decides the samples, flat and as JSON has it."""
        flat = {name: getattr(self, name) for name in self.deciding}
        for name in ("table", "options"):
            flat |= {f"{name}.{key}": value for key, value in flat.pop(name).items()}
        return {name.replace("table.", "backend."): _plain(value) for name, value in sorted(flat.items())}

    def backend(self, device: torch.device | str = "cpu") -> Backend:
        """Build the backend that the plan names, and check that the grid fits it.

        Raises:
            ValueError: for what the backend cannot use, or a preference that does not fit a variant's rewards.
        """
        backend = build(self.kind, self.table, file=self.file, seed=self.seed, device=torch.device(device))
        for variant in backend.variants:
            for preference in self.preferences:
                self._weights(variant, preference)
        return backend

    def cells(self, backend: Backend) -> list[Cell]:
        """Return the grid, the same list in every process."""
        return list(self._cells(backend))

    def key(self, cell: Cell, backend: Backend) -> str:
        """Return the name of a cell's files: a hash of all that decides its content."""
        decides = {
            "format": FORMAT,
            "cell": cell.spec(),
            "options": self.options[cell.method].model_dump(),
            "backend": {"kind": self.kind, **dict(self.table)},
            "identity": dict(backend.identity),
            "seed": self.seed,
        }
        return hashlib.sha256(json.dumps(_plain(decides), sort_keys=True).encode()).hexdigest()[:20]

    def _cells(self, backend: Backend) -> Iterator[Cell]:
        # Methods innermost: a run that was stopped has whole comparisons.
        for variant in backend.variants:
            for strength in self.strengths:
                for preference in self.preferences:
                    weights = self._weights(variant, preference)
                    for prompt in backend.prompts:
                        for start in range(0, self.seeds, self.block):
                            count, first = min(self.block, self.seeds - start), self.first_seed + start
                            for method in self.methods:
                                yield Cell(method, variant.name, prompt, weights, strength, first, count)

    def _weights(self, variant: Variant, preference: str | tuple[float, ...]) -> tuple[tuple[str, float], ...]:
        names = variant.rewards
        values = [1 / len(names)] * len(names) if isinstance(preference, str) else list(preference)
        if len(values) != len(names):
            raise ValueError(
                f"{self.file}: [grid] preferences must have one weight for each reward of {variant.name!r} "
                f"({', '.join(names)}), got {len(values)}; make them fit, or write {EQUAL!r}"
            )
        return tuple(zip(names, values, strict=True))


def find(name: str) -> Path:
    """Return the file of a configuration: a path, or the name of a bundled one.

    Raises:
        ValueError: if there is neither.
    """
    path, bundled = Path(name), CONFIGS / f"{name}.toml"
    if path.is_file() or path.suffix:
        return path
    if not bundled.exists():
        known = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.toml")))
        raise ValueError(f"a configuration must be a file or one of {known}, got {name!r}")
    return bundled


def load_plan(path: Path) -> Plan:
    """Read and check a settings file; see the module's docstring.

    Raises:
        ValueError: for what cannot be used: file, table, key, and what is allowed.
        OSError: if it cannot be read.
    """
    top = check_keys(load_toml(path), _TOP, file=path)
    kind = top["backend"].get("kind")
    if not isinstance(kind, str):
        raise ValueError(f"{path}: [backend] kind is missing; give the name of a backend, as \"mixture\"")
    grid = check_keys(top["grid"], _GRID, file=path, section="[grid]")
    methods = _methods(grid["methods"], path)
    stray = [name for name in top["methods"] if name not in methods]
    if stray:
        raise ValueError(
            f"{path}: [methods.{stray[0]}] must be for one of [grid] methods ({', '.join(methods)}); add it there"
        )
    preferences: list[str | tuple[float, ...]] = []
    for preference in grid["preferences"]:
        if isinstance(preference, str) and preference != EQUAL:
            raise ValueError(f"{path}: [grid] a preference must be {EQUAL!r} or a list of weights, got {preference!r}")
        preferences.append(preference if isinstance(preference, str) else tuple(preference))
    _check_grid(grid, preferences, path)
    return Plan(
        file=str(path),
        title=top["title"] or path.stem,
        kind=kind,
        table={key: value for key, value in top["backend"].items() if key != "kind"},
        methods=methods,
        options={name: _options(top["methods"], name, path) for name in methods},
        preferences=tuple(preferences),
        strengths=tuple(grid["strengths"]),
        seeds=grid["seeds"],
        block=min(grid["block"] or grid["seeds"], grid["seeds"]),
        first_seed=grid["first_seed"],
        seed=grid["seed"],
        report=report_settings(top["report"], methods, str(path)),
        published=tuple(
            check_keys(row, _PUBLISHED, file=path, section=f"[[published]] {i}")
            for i, row in enumerate(top["published"], start=1)
        ),
    )


def _methods(names: list[str], path: Path) -> tuple[str, ...]:
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        nearest = ", ".join(get_close_matches(unknown[0], METHODS, n=4, cutoff=0))
        raise ValueError(
            f"{path}: [grid] methods must be of those in sdeblend.methods, got {unknown[0]!r}; nearest are "
            f"{nearest}"
        )
    if not 0 < len(set(names)) == len(names):
        raise ValueError(f"{path}: [grid] methods must name at least one and none twice, got {names}")
    return tuple(names)


def _options(methods: Mapping[str, Any], name: str, path: Path) -> Settings:
    """Return the settings of a method, defaults filled in."""
    table = methods.get(name, {})
    if not isinstance(table, dict):
        raise ValueError(f"{path}: [methods] {name} must be a table, got {table!r}; write [methods.{name}]")
    return parse(METHODS[name].options, table, file=path, section=f"[methods.{name}]")


def _check_grid(grid: Mapping[str, Any], preferences: list[Any], path: Path) -> None:
    for name, values in (("preferences", preferences), ("strengths", grid["strengths"])):
        if not 0 < len(set(values)) == len(values):
            raise ValueError(f"{path}: [grid] {name} must be at least one and none twice, got {values}")
    if any(s < 0 for s in grid["strengths"]):
        raise ValueError(f"{path}: [grid] strengths must be at least 0, got {min(grid['strengths']):g}")
    if grid["seeds"] < 2 or grid["block"] < 0 or grid["block"] == 1:
        raise ValueError(
            f"{path}: [grid] needs at least 2 seeds in blocks of at least 2, got {grid['seeds']} and {grid['block']}"
        )
    if grid["first_seed"] < 0 or grid["first_seed"] + grid["seeds"] > MAX_SEED:
        raise ValueError(f"{path}: [grid] seeds must lie from 0 to 2^32 - 1, got {grid['first_seed']} to "
                         f"{grid['first_seed'] + grid['seeds'] - 1}")


def _plain(value: Any) -> Any:
    """Return a value as JSON has it after a round trip; infinities as text, which no strict reader refuses."""
    if isinstance(value, Settings):
        return value.model_dump()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
