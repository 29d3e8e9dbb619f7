"""The results folder: one pair of files a finished cell, and a manifest that pins what they are results of.

    manifest.json             configuration, versions, prompts, what pins the backend; scales, format, how it is shown
    rows/KEY.jsonl.gz         one row a sample: method, variant, preference, strength, prompt, seed, rewards, ...
    cells/KEY.json            the cell: its costs, distances, seconds, and the hash and number of its rows

The rows are written first and the cell's file last, each whole or not at all, so a cell is finished exactly if its
file is there, and a kill at any moment loses at most the cells in progress and doubles nothing. KEY hashes all that
decides the content; rows that do not agree with the hash in the cell's file (a full disk, a bad copy) are noticed.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple

from pydantic import ConfigDict, Field, JsonValue, ValidationError

from sdeblend.evaluate.plan import FORMAT, Report
from sdeblend.evaluate.results import Distance, Published, Result, Scale, Variant
from sdeblend.preference import Preference
from sdeblend.shell.files import write_atomically

_OPTIONS: Final = "options."


class Picture(Result):
    """Where an image is: a file below the results folder, and (left, upper, right, lower) in it."""

    file: str
    box: tuple[int, int, int, int]


class Row(Result):
    """One sample; further columns, the backend's own, are kept.

    Attributes:
        method, variant, preference, strength, prompt, seed: what it is a sample of.
        ancestor: the seed that it descends from.
        rewards, weighted: each reward and r(w), None where one failed.
        log_weight: of mean weight one in a block, None for a weight of zero.
        model_calls, gradient_calls, reward_calls: a sample.
        image: the sample itself, if it is one.
    """

    model_config = ConfigDict(extra="allow")

    method: str
    variant: str
    preference: dict[str, float]
    strength: float
    prompt: str
    seed: int
    ancestor: int
    rewards: dict[str, float | None]
    weighted: float | None
    log_weight: float | None
    model_calls: float
    gradient_calls: float
    reward_calls: float
    image: Picture | None = None


class CellRecord(Result):
    """A finished cell.

    Attributes:
        index: its place in the grid.
        method, variant, prompt, weights, strength, first_seed, count: what it is, as ``plan.Cell``.
        left_out: why the method does not apply; "" if it does.
        failed: what went wrong; "" if nothing did.
        model_calls, gradient_calls, reward_calls: a sample. seconds: in all.
        facts, measures: further numbers of the method and on its samples.
        target: the mean of each reward under the exact target.
        distances: to the exact target.
        rows, sha256: number and hash of its rows.
    """

    index: int
    method: str
    variant: str
    prompt: str
    weights: dict[str, float]
    strength: float
    first_seed: int
    count: int
    left_out: str = ""
    failed: str = ""
    model_calls: float = 0.0
    gradient_calls: float = 0.0
    reward_calls: float = 0.0
    seconds: float = 0.0
    facts: dict[str, float | None] = Field(default_factory=dict)
    measures: dict[str, float | None] = Field(default_factory=dict)
    target: dict[str, float | None] = Field(default_factory=dict)
    distances: dict[str, Distance] = Field(default_factory=dict)
    rows: int = 0
    sha256: str = ""

    @property
    def preference(self) -> Preference:
        """What was asked for."""
        return Preference(self.weights, self.strength)

    @property
    def stratum(self) -> tuple[str, str]:
        """The variant and the prompt."""
        return self.variant, self.prompt

    @property
    def block(self) -> tuple[str, str, int]:
        """The variant, the prompt and the first seed."""
        return self.variant, self.prompt, self.first_seed


class Manifest(Result):
    """What the results of a folder are results of.

    Attributes:
        format: of the files. title, report, published: as in the settings.
        fixed: all that decides the samples.
        variants, prompts: of the backend.
        rewards: their scales; None where a version did not store them.
    """

    format: int
    title: str
    fixed: dict[str, JsonValue]
    variants: tuple[Variant, ...]
    prompts: tuple[str, ...]
    rewards: tuple[Scale, ...] | None = None
    report: Report
    published: tuple[Published, ...] = ()

    @property
    def options(self) -> dict[str, dict[str, JsonValue]]:
        """The options of each method."""
        return {k.removeprefix(_OPTIONS): v for k, v in self.fixed.items() if k.startswith(_OPTIONS)}  # type: ignore[misc]

    @property
    def sampled(self) -> str:
        """What was sampled, whatever the methods: results that agree in it are compared."""
        what = [key for key in self.fixed if key in ("kind", "seed") or key.startswith(("backend.", "identity."))]
        return repr([self.prompts, *((key, self.fixed[key]) for key in sorted(what))])


class CellRows(NamedTuple):
    """A finished cell, its rows, and the folder that it lies in."""

    record: CellRecord
    rows: list[Row]
    folder: Path


class Folder:
    """A results folder.

    Args:
        path: of the folder; made when the first file is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def manifest_file(self) -> Path:
        """Where the manifest is."""
        return self.path / "manifest.json"

    def manifest(self) -> Manifest | None:
        """Return the manifest, None if there is none.

        Raises:
            ValueError: for one that cannot be read.
        """
        if not self.manifest_file.exists():
            return None
        text = self.manifest_file.read_text(encoding="utf-8")
        try:
            stored = json.loads(text).get("format")
            found = Manifest.model_validate_json(text) if stored == FORMAT else None
        except (ValueError, AttributeError) as error:
            why = str(error).splitlines()[0]
            raise ValueError(f"{self.manifest_file}: not a manifest ({why}); choose another folder") from None
        if found is None:
            raise ValueError(f"{self.manifest_file}: format must be {FORMAT}, got {stored!r}; another version wrote it")
        return found

    def open(self, manifest: Manifest, *, resume: bool) -> None:
        """Take the folder for a configuration: write its manifest, or check that it has the same.

        Raises:
            ValueError: if it holds results of another configuration, or results at all and ``resume`` is not said.
        """
        found = self.manifest()
        if found is None:
            if self.path.exists() and not all(map(_unfinished, self.path.iterdir())):
                raise ValueError(f"{self.path}: needs to be empty or a results folder, got other files; choose another")
        else:
            old, new = found.fixed, manifest.fixed
            changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
            if changed:
                was, now = _short(old.get(changed[0])), _short(new.get(changed[0]))
                raise ValueError(
                    f"{self.path}: holds results of another configuration ({changed[0]} was {was}, now {now}); choose "
                    "another folder"
                )
            if not resume and self.stored():
                raise ValueError(
                    f"{self.path}: holds results already; say --resume to continue, or choose another folder"
                )
        if found != manifest:  # how results are shown may change
            write_atomically(self.manifest_file, manifest.written(indent=2, defaults=True))

    def write(self, key: str, record: CellRecord, rows: Sequence[Row]) -> None:
        """Store a finished cell: the rows, then its own file, which says that they are all there.

        Raises:
            OSError: if they cannot be written; what was stored before stays.
        """
        text = "".join(row.written() for row in rows).encode()
        whole = record.model_copy(update={"rows": len(rows), "sha256": hashlib.sha256(text).hexdigest()})
        try:
            # Without a time in it, the same rows give the same file.
            write_atomically(self._rows_file(key), gzip.compress(text, 6, mtime=0))
            write_atomically(self._cell_file(key), whole.written())
        except OSError as error:
            why = f"{error.strerror or error}; finished cells are stored, and --resume continues once it can be written"
            raise OSError(error.errno, why, str(self.path)) from error

    def started(self, key: str) -> bool:
        """Return whether a cell's own file is there; ``damage`` says whether it is whole."""
        return self._cell_file(key).exists()

    def damage(self, key: str) -> str | None:
        """Return what is wrong with a stored cell, one phrase, or None."""
        try:
            self.read(key)
        except ValueError as error:
            return str(error)
        return None

    def read(self, key: str) -> CellRows:
        """Return a cell and its rows.

        Raises:
            ValueError: if they are not whole.
        """
        file, rows_file = self._cell_file(key), self._rows_file(key)
        try:
            record = CellRecord.model_validate_json(file.read_text(encoding="utf-8"))
            text = gzip.decompress(rows_file.read_bytes())
            if hashlib.sha256(text).hexdigest() != record.sha256:
                raise ValueError("its rows are not those that were written")
            return CellRows(record, [Row.model_validate_json(line) for line in text.splitlines()], self.path)
        except ValidationError as error:
            why = f"{error.errors()[0]['msg']}"
        except (OSError, EOFError, ValueError) as error:
            why = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        raise ValueError(
            f"{file}: truncated or damaged ({' '.join(why.split())}); run evaluate again with --resume"
        ) from None

    def stored(self) -> list[str]:
        """Return the keys of the cells that are there, sorted."""
        return sorted(file.stem for file in (self.path / "cells").glob("*.json"))

    def _cell_file(self, key: str) -> Path:
        return self.path / "cells" / f"{key}.json"

    def _rows_file(self, key: str) -> Path:
        return self.path / "rows" / f"{key}.jsonl.gz"


@dataclass(frozen=True)
class Stored:
    """Results of one configuration, from one folder or several.

    Attributes:
        manifest: of the first folder.
        cells: each once, its method by the name it has in ``options``.
        options: method -> its options; one with others than in the first folder has these in its name.
    """

    manifest: Manifest
    cells: list[CellRows] = field(default_factory=list)
    options: dict[str, dict[str, JsonValue]] = field(default_factory=dict)


def load(folders: Sequence[Folder]) -> list[Stored]:
    """Read results; folders that sampled the same problems and prompts with the same seed are put together.

    Raises:
        ValueError: for a folder without results or with a damaged cell, or for folders whose blocks of seeds differ.
    """
    found: dict[str, tuple[Stored, dict[str, CellRows]]] = {}
    for folder in folders:
        manifest, keys = folder.manifest(), folder.stored()
        if manifest is None or not keys:
            raise ValueError(f"{folder.path}: holds no results; name a folder that 'sdeblend evaluate' wrote")
        stored, cells = found.setdefault(manifest.sampled, (Stored(manifest), {}))
        names = _names(manifest.options, stored.options)
        for key in keys:
            if key not in cells:
                cell = folder.read(key)
                named = cell.record.model_copy(update={"method": names[cell.record.method]})
                cells[key] = cell._replace(record=named)
    for stored, cells in found.values():
        stored.cells.extend(sorted(cells.values(), key=lambda cell: cell.record.index))
        _check_blocks(stored.cells)
    return [stored for stored, _ in found.values()]


def _names(own: Mapping[str, dict[str, JsonValue]], known: dict[str, dict[str, JsonValue]]) -> dict[str, str]:
    """Return what a folder's methods are called beside those that are known, and add them to these."""
    names = {}
    for method, options in own.items():
        first = known.setdefault(method, options)
        other = ", ".join(f"{key} {value}" for key, value in options.items() if value != first.get(key))
        names[method] = f"{method} ({other})" if other else method
        known[names[method]] = options
    return names


def _check_blocks(cells: Iterable[CellRows]) -> None:
    """Check that methods can be paired block by block, and that no sample counts twice."""
    blocks: dict[tuple[int, int], Path] = {}
    seen: set[tuple[object, ...]] = set()
    for record, rows, folder in cells:
        first, count = record.first_seed, record.count
        blocks.setdefault((first, count), folder)
        what = record.method, *record.block, *record.weights.items(), record.strength
        if what in seen or (rows and [row.seed for row in rows] != list(range(first, first + count))):
            raise ValueError(
                f"{folder}: needs one row a seed of every method, got seeds {first} to {first + count - 1} of "
                f"{record.method!r} twice or in part; sample it again into another folder"
            )
        seen.add(what)
    for (low, size), (high, other) in pairwise(sorted(blocks)):
        if low + size > high:
            raise ValueError(
                f"{blocks[high, other]}: needs the blocks of seeds of {blocks[low, size]} to be compared with it, got "
                f"{high} to {high + other - 1} beside {low} to {low + size - 1}; compare them apart"
            )


def _unfinished(file: Path) -> bool:
    """Return whether a file is what a kill leaves of one that was being written."""
    return file.name.startswith(".") and file.suffix == ".part"


def _short(value: JsonValue) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 50 else f"{text[:47]}..."
