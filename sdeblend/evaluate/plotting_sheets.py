"""Contact sheets of results that kept images: a row a method, a column a preference, the same seeds in every cell.

Rows say where an image is, ``{"file": "images/KEY.png", "box": [left, upper, right, lower]}``, below their results
folder; nothing is sampled and no backend is needed.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from sdeblend.evaluate.rows import Row
from sdeblend.evaluate.summary import Stored, label

# Prompts a sheet, and images a prompt.
PROMPTS: Final = 4
EACH: Final = 2
_WIDTH: Final = 1.5


def sheets(stored: Stored) -> dict[str, bytes]:
    """Return one sheet a variant and strength as png files, by name; none if no images were kept."""
    places: dict[tuple[str, float], dict[tuple[str, tuple[float, ...]], list[tuple[Path, Row]]]] = {}
    for (head, rows), folder in zip(stored.cells, stored.folders, strict=True):
        if rows and "image" in rows[0]:
            cells = places.setdefault((head["variant"], head["strength"]), {})
            key = head["method"], tuple(head["weights"].values())
            cells.setdefault(key, []).extend((folder, row) for row in rows)
    out = {}
    for (variant, strength), cells in places.items():
        name = "sheet" + "".join(f"-{part}" for part in (variant, f"strength {strength:g}") if len(places) > 1)
        out[name.replace(" ", "-").replace(",", "")] = _bytes(_sheet(cells, variant, strength))
    return out


def _sheet(
    cells: Mapping[tuple[str, tuple[float, ...]], Sequence[tuple[Path, Row]]], variant: str, strength: float
) -> Figure:
    methods = list(dict.fromkeys(method for method, _ in cells))
    preferences = list(dict.fromkeys(preference for _, preference in cells))
    first = next(iter(cells.values()))
    prompts = list(dict.fromkeys(row["prompt"] for _, row in first))[:PROMPTS]
    names = ", ".join(first[0][1]["preference"])
    tall = -(-len(prompts) // 2) / (2 * EACH) * _WIDTH
    size = (_WIDTH * len(preferences) + 1.4, (tall + 0.05) * len(methods) + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(methods), len(preferences), squeeze=False)
    opened: dict[Path, Image.Image] = {}
    for line, method in zip(grid, methods, strict=True):
        for axes, preference in zip(line, preferences, strict=True):
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
            rows = cells.get((method, preference), ())
            picture = _picture(rows, prompts, opened)
            if picture is not None:
                axes.imshow(picture, interpolation="nearest")
            if line is grid[0]:
                axes.set_title(", ".join(f"{w:.2g}" for w in preference), fontsize=8)
        line[0].set_ylabel(label(method), fontsize=7, rotation=0, ha="right", va="center")
    shown = "; ".join(f"“{prompt}”" for prompt in prompts if prompt)
    figure.suptitle(
        f"{variant}, strength {strength:g}; columns: weights of {names}\n{shown}", fontsize=7, wrap=True
    )
    return figure


def _picture(rows: Sequence[tuple[Path, Row]], prompts: Sequence[str], opened: dict[Path, Image.Image]) -> Any:
    """Return the first images of each prompt, prompts side by side two by two, or None."""
    tiles = []
    for prompt in prompts:
        own = sorted((row["seed"], folder, row) for folder, row in rows if row["prompt"] == prompt)[:EACH]
        if len(own) < EACH:
            return None
        line = []
        for _, folder, row in own:
            file = folder / row["image"]["file"]
            if file not in opened:
                try:
                    with Image.open(file) as image:
                        opened[file] = image.convert("RGB")
                except OSError:
                    return None
            line.append(np.asarray(opened[file].crop(row["image"]["box"])))
        tiles.append(np.concatenate(line, 1))
    half = -(-len(tiles) // 2)
    blank = [np.full_like(tiles[0], 255)] * (2 * half - len(tiles))
    every = [*tiles, *blank]
    return np.concatenate([np.concatenate(every[:half], 0), np.concatenate(every[half:], 0)], 1)


def _bytes(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=100, facecolor="white", metadata={"Software": None})
    return stream.getvalue()
