"""Figures: one palette, panels, images side by side, and files that are the same for the same figure.

Figures are ``matplotlib.figure.Figure`` objects, so nothing opens a window and no state is global. Sheets of images are
put together pixel by pixel, so that every image in them is itself.

Source: Okabe and Ito, "Color universal design" (2008), for colours that colour-blind readers can tell apart.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

OKABE_ITO: Final = {
    "black": "#000000",
    "orange": "#E69F00",
    "sky": "#56B4E9",
    "green": "#009E73",
    "yellow": "#F0E442",
    "blue": "#0072B2",
    "vermillion": "#D55E00",
    "purple": "#CC79A7",
    "grey": "#7A7A7A",
}
# For things that are told apart by nothing else, in this order.
COLOURS: Final = tuple(
    OKABE_ITO[name] for name in ("blue", "vermillion", "green", "purple", "orange", "sky", "black", "grey")
)
FORMATS: Final = ("png", "svg", "pdf")
# Without dates and random names, the same figure gives the same file.
_UNDATED: Final[dict[str, dict[str, Any]]] = {
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None, "Format": None, "Type": None},
    "pdf": {"CreationDate": None},
}
_GAP: Final = 8
_SEEN: Final = 220


def panels(
    count: int, *, columns: int = 3, width: float = 4.0, height: float = 3.1, beside: float = 0.0, above: float = 0.5
) -> tuple[Figure, list[Axes]]:
    """Return a figure with ``count`` panels in rows of ``columns``, without the frame's upper and right edges.

    Args:
        count: number of panels.
        columns: how many in a row, at most.
        width, height: of one panel, in inches.
        beside, above: what a legend or a title needs besides, in inches.
    """
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns + beside, height * rows + above), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for unused in grid[count:]:
        unused.remove()
    for axes in grid[:count]:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, list(grid[:count])


def curves(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float] | None]],
    *,
    x: str,
    y: str,
    title: str = "",
    dashed: Sequence[str] = (),
) -> Figure:
    """Draw curves with two standard errors as bars.

    Args:
        lines: name -> (positions, values, standard errors or None).
        x, y: what the axes show, with units.
        title: above the axes.
        dashed: names of curves drawn in black and dashed: targets and references.
    """
    with rc_context({"font.size": 9}):
        figure, (axes,) = panels(1, width=6, height=3.4, above=0)
        for k, (name, (positions, values, errors)) in enumerate(lines.items()):
            bars = None if errors is None else [2 * error for error in errors]
            colour, line = ("black", "--") if name in dashed else (COLOURS[k % len(COLOURS)], "-")
            axes.errorbar(
                positions, values, yerr=bars, label=name, color=colour, linestyle=line, marker="o", ms=4, capsize=2
            )
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.set_title(title)
        axes.legend(frameon=False)
    return figure


def encoded(picture: Figure | Image.Image, kind: str = "png", *, dpi: int = 130, ground: str = "white") -> bytes:
    """Return a picture as a file's content.

    Args:
        picture: a figure, or an image (png only).
        kind: "png", "svg" or "pdf".
        dpi: dots an inch of a figure, of png and of points in the others.
        ground: what is behind a figure, a colour or "none".

    Raises:
        ValueError: for another kind.
    """
    if kind not in FORMATS:
        raise ValueError(f"a figure can be {', '.join(FORMATS)}, got {kind!r}; name the file accordingly")
    stream = io.BytesIO()
    if isinstance(picture, Image.Image):
        picture.save(stream, "PNG")
    else:
        with rc_context({"svg.hashsalt": "sdeblend", "svg.fonttype": "path"}):
            picture.savefig(stream, format=kind, dpi=dpi, metadata=_UNDATED[kind], facecolor=ground)
    return stream.getvalue()


def montage(images: Tensor, columns: int, *, zoom: int = 1) -> Image.Image:
    """Return images as one picture, row by row, without gaps; what is missing in the last row is white.

    Args:
        images: (N, 3, H, W) in [0, 1].
        columns: images a row.
        zoom: pixels a pixel.
    """
    n, channels, height, width = images.shape
    rows = -(-n // columns)
    images = torch.cat([images, images.new_ones(rows * columns - n, channels, height, width)])
    grid = images.reshape(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    grid = grid.reshape(rows * height, columns * width, channels).clamp(0, 1)
    picture = Image.fromarray((255 * grid.cpu().numpy()).round().astype(np.uint8))
    return _zoomed(picture, zoom)


def contact_sheet(
    cells: Sequence[Sequence[Image.Image | Tensor | None]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    notes: Sequence[Sequence[str]] = (),
    title: str = "",
    across: int = 0,
    zoom: int = 0,
) -> Image.Image:
    """Return pictures in rows and columns with their names, and a note below each.

    Args:
        cells: of each row, one a column: a picture, several images (N, 3, H, W) in [0, 1], or None for an empty place.
        rows, columns: their names; a name may have several lines.
        notes: what stands below each cell; nothing if left out.
        title: above all; lines that are too long are broken.
        across: images a line of a cell of several; 0 makes it as square as can be.
        zoom: pixels a pixel; 0 makes cells about as wide as can be seen.
    """
    pictures = [[_picture(cell, across) for cell in line] for line in cells]
    there = [picture for line in pictures for picture in line if picture is not None]
    zoom = zoom or max(1, round(_SEEN / max(picture.width for picture in there)))
    width, height = (zoom * max(getattr(picture, side) for picture in there) for side in ("width", "height"))
    font = ImageFont.truetype(findfont("DejaVu Sans"), size=min(max(12, width // 24), 20))
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))

    def extent(text: str) -> tuple[int, int]:
        if not text:
            return 0, 0
        _, _, right, bottom = draw.multiline_textbbox((0, 0), text, font=font)
        return math.ceil(right) + 2 * _GAP, math.ceil(bottom) + 2 * _GAP

    notes = notes or [[""] * len(columns) for _ in rows]
    left = max(extent(name)[0] for name in rows)
    below = max(extent(note)[1] for line in notes for note in line)
    cell = max(width, *(extent(text)[0] - _GAP for text in (*columns, *(n for line in notes for n in line)))) + _GAP
    line_height = max(height + _GAP + below, *(extent(name)[1] for name in rows))
    wide = left + cell * len(columns)
    title = "\n".join(part for line in title.splitlines() for part in _broken(line, wide - 2 * _GAP, font))
    top = extent(title)[1]
    header = top + max(extent(name)[1] for name in columns)
    sheet = Image.new("RGB", (max(wide, extent(title)[0]), header + line_height * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((_GAP, _GAP), title, fill="black", font=font)
    for c, name in enumerate(columns):
        draw.multiline_text((left + c * cell, top + _GAP), name, fill="black", font=font)
    for r, (name, line, told) in enumerate(zip(rows, pictures, notes, strict=True)):
        y = header + r * line_height
        draw.multiline_text((_GAP, y), name, fill="black", font=font)
        for c, (picture, note) in enumerate(zip(line, told, strict=True)):
            if picture is not None:
                sheet.paste(_zoomed(picture, zoom), (left + c * cell, y))
            draw.multiline_text((left + c * cell, y + height + _GAP // 2), note, fill="black", font=font)
    return sheet


def _picture(cell: Image.Image | Tensor | None, across: int) -> Image.Image | None:
    return montage(cell, across or math.ceil(math.sqrt(len(cell)))) if isinstance(cell, Tensor) else cell


def _zoomed(picture: Image.Image, zoom: int) -> Image.Image:
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)


def _broken(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """Return a line as lines that are no wider than so many pixels, broken between words."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
