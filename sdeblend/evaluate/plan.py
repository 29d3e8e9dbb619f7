"""The file that says what to compare: CONFIG.toml, and the grid of cells that it stands for.

    title = "Two rewards on a ring"
    [backend]                   # what is sampled: `kind` names a backend, the other keys are the backend's own
    kind = "mixture"
    [grid]                      # every method with every preference, strength, prompt and seed
    methods = ["exact", "mpa", "mpa-corrected", "code"]
    preferences = ["equal", [0.2, 0.8]]
    seeds = 4096
    block = 2048
    [methods.code]              # options of a method
    candidates = 20
    [report]                    # how results are shown; it may change without sampling anew
    reference = "mpa"
    order = ["base", "mpa", "<= exact"]
    [[published]]               # printed numbers to stand beside: label, group, reward, value, source

``Grid``, ``Report`` and ``Published`` say what their tables hold, as does ``sdeblend evaluate --keys``.

A cell is one method, variant, preference, prompt and block of seeds; it is the unit of work and of storage.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Final

import torch
from pydantic import Field, field_validator, model_validator

from sdeblend.evaluate.backend import Backend, Builder
from sdeblend.evaluate.results import Published, Variant
from sdeblend.methods.draws import MAX_SEED
from sdeblend.methods.registry import METHODS
from sdeblend.preference import Preference
from sdeblend.shell.registry import BACKENDS, load
from sdeblend.shell.settings import Settings, parse, read_toml

FORMAT: Final = 1
CONFIGS: Final = Path(__file__).parent / "configs"
EQUAL: Final = "equal"
AT_MOST: Final = "<= "


class Grid(Settings):
    """The table [grid]: every method with every preference, strength, prompt and seed.

    Attributes:
        methods: names of methods.
        preferences: "equal", or a weight for each reward.
        strengths: lambda.
        seeds: samples a preference, strength, prompt and method.
        block: samples at once, the particles of a correction and the replicates of a distance; 0 for all.
        first_seed: seeds are counted from here.
        seed: of all random numbers, together with prompt, seed and step.
    """

    methods: tuple[str, ...]
    preferences: tuple[Annotated[str | tuple[float, ...], f"{EQUAL!r} or a list of weights"], ...] = (EQUAL,)
    strengths: tuple[Annotated[float, Field(ge=0)], ...] = (1.0,)
    seeds: int = Field(ge=2)
    block: int = Field(default=0, ge=0)
    first_seed: int = Field(default=0, ge=0)
    seed: int = 0

    @field_validator("methods")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in METHODS:
                nearest = ", ".join(get_close_matches(name, METHODS, n=4, cutoff=0))
                raise ValueError(f"must be of those in sdeblend.methods, got {name!r}; nearest are {nearest}")
        return names

    @field_validator("methods", "preferences", "strengths")
    @classmethod
    def _each_once(cls, values: tuple[object, ...]) -> tuple[object, ...]:
        if not 0 < len(set(values)) == len(values):
            raise ValueError(f"must be at least one and none twice, got {list(values)}")
        return values

    @field_validator("preferences")
    @classmethod
    def _equal(cls, values: tuple[str | tuple[float, ...], ...]) -> tuple[str | tuple[float, ...], ...]:
        for value in values:
            if isinstance(value, str) and value != EQUAL:
                raise ValueError(f"must be {EQUAL!r} or a list of weights each, got {value!r}")
        return values

    @model_validator(mode="after")
    def _in_range(self) -> Grid:
        if self.block == 1:
            raise ValueError("block must be at least 2, got 1; leave it out for all seeds at once")
        if self.first_seed + self.seeds > MAX_SEED:
            last = self.first_seed + self.seeds - 1
            raise ValueError(f"seeds must lie from 0 to 2^32 - 1, got {self.first_seed} to {last}")
        return self


class Report(Settings):
    """The table [report]: how results are shown.

    Attributes:
        reference: the method that the others are compared with; the first one by default.
        note: stands under the title.
        resamples: of the bootstrap.
        confidence: of all intervals.
        hypervolume_reference: the corner of hypervolumes; just below all points by default.
        hypervolume_over: the method whose hypervolume the others' is divided by; the reference by default.
        order: a claim, from the lowest r(w) to the highest, checked pair by pair. A method that begins with "<= " may
            be as low as the one before it: the pair holds unless its difference is significantly below zero, where a
            plain pair holds only if it is significantly above.
    """

    reference: str = ""
    note: str = ""
    resamples: int = Field(default=1000, ge=100)
    confidence: float = Field(default=0.95, ge=0.5, lt=1)
    hypervolume_reference: tuple[float, ...] = ()
    hypervolume_over: str = ""
    order: tuple[str, ...] = ()

    def check(self, methods: Sequence[str]) -> None:
        """Check that what is named is of the grid.

        Raises:
            ValueError: for a name that is not.
        """
        known = ", ".join(methods)
        for key in ("reference", "hypervolume_over"):
            if getattr(self, key) not in ("", *methods):
                raise ValueError(f"[report] {key} must be one of {known}, got {getattr(self, key)!r}")
        names = [entry.removeprefix(AT_MOST) for entry in self.order]
        once = set(names) <= set(methods) and len(set(names)) == len(names) != 1
        if not once or self.order[:1] != tuple(names[:1]):
            raise ValueError(
                f"[report] order must name two or more of {known}, each once, with {AT_MOST!r} before one that may "
                f"equal the last, got {list(self.order)}"
            )

    def claimed(self, there: Collection[str]) -> list[tuple[str, str, bool]]:
        """Return the neighbours (low, high, strict) of the claimed order among the methods that are there.

        Args:
            there: methods with results; a pair across one that is not is strict if a step of it is.
        """
        pairs: list[tuple[str, str, bool]] = []
        low, strict = "", False
        for entry in self.order:
            name = entry.removeprefix(AT_MOST)
            strict |= name == entry
            if name in there:
                pairs += [(low, name, strict)] if low else []
                low, strict = name, False
        return pairs


class Config(Settings):
    """CONFIG.toml as a whole."""

    title: str = ""
    backend: dict[str, Any]
    grid: Grid
    methods: dict[str, dict[str, Any]] = Field(default_factory=dict)
    report: Report = Report()
    published: tuple[Published, ...] = ()

    @model_validator(mode="after")
    def _fit(self) -> Config:
        methods = self.grid.methods
        if not isinstance(self.backend.get("kind"), str):
            raise ValueError('[backend] kind is missing; give the name of a backend, as "mixture"')
        for name in self.methods:
            if name not in methods:
                known = ", ".join(methods)
                raise ValueError(f"[methods.{name}] must be for one of [grid] methods ({known}); add it there")
        self.report.check(methods)
        return self


@dataclass(frozen=True)
class Cell:
    """The unit of work: one method on one variant, preference, prompt and block of seeds.

    Attributes:
        method, variant, prompt: by name.
        preference: what is asked for.
        first_seed, count: the block of seeds.
    """

    method: str
    variant: str
    prompt: str
    preference: Preference
    first_seed: int
    count: int

    @property
    def seeds(self) -> range:
        """The seeds of the block."""
        return range(self.first_seed, self.first_seed + self.count)

    def spec(self) -> dict[str, Any]:
        """Return the cell as it is stored."""
        return {
            "method": self.method, "variant": self.variant, "prompt": self.prompt, **self.preference.to_json(),
            "first_seed": self.first_seed, "count": self.count,
        }  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """One settings file, checked.

    Attributes:
        file: where it came from.
        title: for tables.
        kind, table: the backend's.
        grid: see there; ``block`` is that of a run.
        options: method -> its options.
        report: how results are shown; its ``reference`` is a method.
        published: printed numbers.
    """

    file: str
    title: str
    kind: str
    table: Mapping[str, Any]
    grid: Grid
    options: Mapping[str, Settings]
    report: Report
    published: tuple[Published, ...]

    def fixed(self) -> dict[str, Any]:
        """Return what decides the samples, flat and as JSON has it; all else only decides how they are shown."""
        flat = {"kind": self.kind, **self.grid.model_dump(mode="json")}
        flat |= {f"options.{name}": options.model_dump(mode="json") for name, options in self.options.items()}
        return flat | {f"backend.{key}": value for key, value in self.table.items()}

    def backend(self, device: torch.device | str = "cpu") -> Backend:
        """Build the backend that the plan names, and check that the grid fits it.

        Raises:
            ValueError: for what the backend cannot use, or a preference that does not fit a variant's rewards.
        """
        build: Builder = load(BACKENDS, self.kind, what=f"{self.file}: [backend] kind")
        backend = build(self.table, file=self.file, seed=self.grid.seed, device=torch.device(device))
        for variant in backend.variants:
            list(self._preferences(variant))
        return backend

    def cells(self, backend: Backend) -> list[Cell]:
        """Return the grid, the same list in every process."""
        return list(self._cells(backend))

    def key(self, cell: Cell, backend: Backend) -> str:
        """Return the name of a cell's files: a hash of all that decides its content."""
        decides = {
            "format": FORMAT,
            "cell": cell.spec(),
            "options": self.options[cell.method].model_dump(mode="json"),
            "backend": {"kind": self.kind, **self.table},
            "identity": backend.identity,
            "seed": self.grid.seed,
        }
        return hashlib.sha256(json.dumps(decides, sort_keys=True, default=dict).encode()).hexdigest()[:20]

    def _cells(self, backend: Backend) -> Iterator[Cell]:
        # Methods innermost: a run that was stopped has whole comparisons.
        grid = self.grid
        for variant in backend.variants:
            for preference in self._preferences(variant):
                for prompt in backend.prompts:
                    for start in range(0, grid.seeds, grid.block):
                        count, first = min(grid.block, grid.seeds - start), grid.first_seed + start
                        for method in grid.methods:
                            yield Cell(method, variant.name, prompt, preference, first, count)

    def _preferences(self, variant: Variant) -> Iterator[Preference]:
        names = variant.rewards
        for strength in self.grid.strengths:
            for preference in self.grid.preferences:
                values = [1 / len(names)] * len(names) if isinstance(preference, str) else preference
                if len(values) != len(names):
                    raise ValueError(
                        f"{self.file}: [grid] preferences must have one weight for each reward of {variant.name!r} "
                        f"({', '.join(names)}), got {len(values)}; make them fit, or write {EQUAL!r}"
                    )
                yield Preference(dict(zip(names, values, strict=True)), strength)


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


def forms() -> dict[str, type[Settings]]:
    """Return the tables that a settings file may hold, but for the backend's own, by heading."""
    options = {f"[methods.{name}]": method.options for name, method in METHODS.items() if method.options.model_fields}
    return {"[grid]": Grid, **options, "[report]": Report, "[[published]]": Published}


def load_plan(path: Path) -> Plan:
    """Read and check a settings file; see the module's docstring.

    Raises:
        ValueError: for what cannot be used: file, table, key, and what is allowed.
        OSError: if it cannot be read.
    """
    config = parse(Config, read_toml(path), file=path)
    grid, report = config.grid, config.report
    options = {
        name: parse(METHODS[name].options, config.methods.get(name, {}), file=path, section=f"[methods.{name}]")
        for name in grid.methods
    }
    return Plan(
        file=str(path),
        title=config.title or path.stem,
        kind=config.backend["kind"],
        table={key: value for key, value in config.backend.items() if key != "kind"},
        grid=grid.changed(block=min(grid.block or grid.seeds, grid.seeds)),
        options=options,
        report=report.changed(reference=report.reference or grid.methods[0]),
        published=config.published,
    )
