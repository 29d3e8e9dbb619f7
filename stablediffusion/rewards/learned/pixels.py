"""What a checkpoint wants done to an image before it sees it, on tensors, so that gradients pass.

Resize with antialiasing (the shorter side to a length, or both), cut the centre, subtract the mean and divide by the
standard deviation of each channel, as ``preprocessor_config.json`` says. Pillow does the same on 8-bit pixels, in two
passes that each round: the results differ by at most about one level of 256.

Source: the image processors of transformers; Pillow's ``Image.resize``, cubic with a = -1/2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# Pillow's numbers for its filters.
_FILTERS = {2: "bilinear", 3: "bicubic"}
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Pixels:
    """Turns images into a network's input.

    Attributes:
        size: the shorter side in pixels, or (height, width), or None to leave it.
        crop: (height, width) of the centre that is kept, or None for all.
        mean: of each channel.
        std: of each channel.
        mode: "bicubic" or "bilinear".
        pad: whether to fit the longer side instead and fill the rest with black; ``crop`` is then the size.
    """

    size: int | tuple[int, int] | None = 224
    crop: tuple[int, int] | None = (224, 224)
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    mode: str = "bicubic"
    pad: bool = False

    def __call__(self, images: Tensor) -> Tensor:
        """Return the input, float32 (B, 3, height, width).

        Args:
            images: (B, 3, H, W) in [0, 1].

        Raises:
            ValueError: for images of another shape, or smaller than the centre that is kept.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must have shape (B, 3, H, W), got {tuple(images.shape)}")
        x = images.float()
        height, width = self._resized(*x.shape[-2:])
        # Rows, then columns, as Pillow: cubic weights overshoot, and 8-bit pixels cannot after either.
        for sides in ((x.shape[-2], width), (height, width)):
            if sides != tuple(x.shape[-2:]):
                x = nn.functional.interpolate(x, sides, mode=self.mode, antialias=True).clamp(0, 1)
        if self.crop is not None:
            h, w = self.crop
            if self.pad:
                left, top = (w - width) // 2, (h - height) // 2
                x = nn.functional.pad(x, (left, w - width - left, top, h - height - top))
                height, width = h, w
            if h > height or w > width:
                raise ValueError(f"images must have at least {h} x {w} pixels for this model, got {height} x {width}")
            top, left = (height - h) // 2, (width - w) // 2
            x = x[..., top : top + h, left : left + w]
        mean, std = (torch.tensor(v, device=x.device).reshape(3, 1, 1) for v in (self.mean, self.std))
        return (x - mean) / std

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if self.size is None:
            return height, width
        if isinstance(self.size, tuple):
            return self.size
        if self.pad:
            long = max(height, width)
            return max(1, round(self.size * height / long)), max(1, round(self.size * width / long))
        # the longer side is rounded down
        short = min(height, width)
        return int(self.size * height / short), int(self.size * width / short)


def pixels_of(name: str, table: Mapping[str, Any], image_size: int, source: Path) -> Pixels:
    """Return what a ``preprocessor_config.json`` asks for.

    Args:
        name: of the reward, for messages.
        table: the file's contents.
        image_size: side of the images that the network takes.
        source: the folder, for messages.

    Raises:
        ValueError: for what is not known, or does not make images of this size.
    """
    try:
        size = _sides(table.get("size", 224), "shortest_edge") if table.get("do_resize", True) else None
        crop = _sides(table.get("crop_size", 224)) if table.get("do_center_crop", True) else None
        plain = not table.get("do_normalize", True)
        mean = (0.0,) * 3 if plain else tuple(float(v) for v in table.get("image_mean", CLIP_MEAN))
        std = (1.0,) * 3 if plain else tuple(float(v) for v in table.get("image_std", CLIP_STD))
        pixels = Pixels(size, (crop, crop) if isinstance(crop, int) else crop, mean, std,
                        _FILTERS[table.get("resample", 3)])  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"reward {name!r} needs a preprocessor_config.json of CLIP in {source}, got one that cannot be used "
            f"({type(error).__name__}: {error}); replace it"
        ) from error
    made = pixels.crop or pixels.size
    if made != (image_size, image_size):
        raise ValueError(
            f"reward {name!r} takes images of {image_size} x {image_size} pixels, got a preprocessor_config.json in "
            f"{source} that makes {made}; give that of the same model"
        )
    return pixels


def _sides(value: Any, edge: str = "") -> int | tuple[int, int]:
    """Return 224, {"shortest_edge": 224} or {"height": 224, "width": 224} as an integer or (height, width)."""
    if isinstance(value, dict):
        if edge in value:
            return int(value[edge])
        return int(value["height"]), int(value["width"])
    return int(value)
