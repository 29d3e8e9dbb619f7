"""The results folder: one pair of files a finished cell, and a manifest that pins what they are results of.

    manifest.json             configuration, versions, prompts, what pins the backend; scales, format, how it is told
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
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdeblend.evaluate.config import FORMAT
from sdeblend.io import write_atomically

Row = dict[str, Any]
DIGITS = 9


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

    def manifest(self) -> dict[str, Any] | None:
        """Return the manifest, None if there is none.

        Raises:
            ValueError: for one that cannot be read.
        """
        if not self.manifest_file.exists():
            return None
        try:
            found = json.loads(self.manifest_file.read_text(encoding="utf-8"))
            if not isinstance(found, dict) or not isinstance(found["fixed"], dict):
                raise ValueError("no configuration in it")
        except (ValueError, KeyError) as error:
            raise ValueError(f"{self.manifest_file}: not a manifest ({error}); choose another folder") from None
        if found.get("format") != FORMAT:
            raise ValueError(
                f"{self.manifest_file}: format must be {FORMAT}, got {found.get('format')!r}; another version wrote it"
            )
        return found

    def open(self, manifest: Mapping[str, Any], *, resume: bool) -> None:
        """Take the folder for a configuration: write its manifest, or check that it has the same.

        Raises:
            ValueError: if it holds results of another configuration, or results at all and ``resume`` is not said.
        """
        found = self.manifest()
        if found is None:
            if self.path.exists() and not all(map(_unfinished, self.path.iterdir())):
                raise ValueError(f"{self.path}: needs to be empty or a results folder, got other files; choose another")
            write_atomically(self.manifest_file, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
            return
        old, new = found["fixed"], manifest["fixed"]
        changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
        if changed:
            key = changed[0]
            raise ValueError(
                f"{self.path}: holds results of another configuration ({key} was {_short(old.get(key))}, now "
                f"{_short(new.get(key))}); choose another folder"
            )
        if not resume and any((self.path / "cells").glob("*.json")):
            raise ValueError(f"{self.path}: holds results already; say --resume to continue, or choose another folder")
        if found != manifest:  # how results are told may change
            write_atomically(self.manifest_file, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")

    def write(self, key: str, cell: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
        """Store a finished cell: the rows, then its own file, which says that they are all there.

        Raises:
            OSError: if they cannot be written; what was stored before stays.
        """
        text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows).encode()
        head = {**cell, "rows": len(rows), "sha256": hashlib.sha256(text).hexdigest()}
        try:
            # Without a time in it, the same rows give the same file.
            write_atomically(self._rows_file(key), gzip.compress(text, 6, mtime=0))
            write_atomically(self._cell_file(key), json.dumps(head, ensure_ascii=False, allow_nan=False) + "\n")
        except OSError as error:
            why = f"{error.strerror or error}; finished cells are stored, and --resume continues once it can be written"
            raise OSError(error.errno, why, str(self.path)) from error

    def started(self, key: str) -> bool:
        """Return whether a cell's own file is there; ``damage`` tells whether it is whole."""
        return self._cell_file(key).exists()

    def damage(self, key: str) -> str | None:
        """Return what is wrong with a stored cell, one phrase, or None."""
        try:
            self.read(key)
        except ValueError as error:
            return str(error)
        return None

    def read(self, key: str) -> tuple[dict[str, Any], list[Row]]:
        """Return a cell and its rows.

        Raises:
            ValueError: if they are not whole.
        """
        file, rows_file = self._cell_file(key), self._rows_file(key)
        try:
            cell = json.loads(file.read_text(encoding="utf-8"))
            text = gzip.decompress(rows_file.read_bytes())
            if hashlib.sha256(text).hexdigest() != cell["sha256"]:
                raise ValueError("its rows are not those that were written")
            return cell, [json.loads(line) for line in text.splitlines()]
        except (OSError, EOFError, ValueError, KeyError, gzip.BadGzipFile) as error:
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


def _unfinished(file: Path) -> bool:
    """Return whether a file is what a kill leaves of one that was being written."""
    return file.name.startswith(".") and file.suffix == ".part"


def number(value: float) -> float | None:
    """Return a number as rows hold it: nine digits, None if it is not finite."""
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 50 else f"{text[:47]}..."
