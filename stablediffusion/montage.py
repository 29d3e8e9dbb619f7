"""Many images as one picture."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdeblend.io import write_atomically


def montage(images: Tensor, columns: int) -> np.ndarray:
    """Return images (N, 3, H, W) in [0, 1] as one picture, (N / columns * H, columns * W, 3), row by row.

    Raises:
        ValueError: if the images do not fill the rows.
    """
    n, channels, height, width = images.shape
    if n % columns:
        raise ValueError(f"a montage of {columns} columns needs a multiple of as many images, got {n}; change columns")
    grid = images.reshape(n // columns, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    return grid.reshape(n // columns * height, columns * width, channels).clamp(0, 1).cpu().numpy()


def montage_png(images: Tensor, folder: Path, name: str) -> list[dict[str, object]]:
    """Write images (N, 3, H, W) in [0, 1] as one PNG file, and return where each one is in it.

    Args:
        images: of a cell.
        folder: the results folder.
        name: of the file below it.

    Returns:
        one {"file": name, "box": [left, upper, right, lower]} an image.
    """
    n, _, height, width = images.shape
    columns = math.ceil(math.sqrt(n))
    blank = images.new_ones(-n % columns, *images.shape[1:])
    pixels = (255 * montage(torch.cat([images, blank]), columns)).round().astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", optimize=True)
    write_atomically(folder / name, stream.getvalue())
    places = [(i % columns * width, i // columns * height) for i in range(n)]
    return [{"file": name, "box": [x, y, x + width, y + height]} for x, y in places]
