"""Rewards of images: file size, colourfulness, the bundled model's scorer, and any function of the user's own.

Those that are learned (CLIPScore, PickScore, ...) are in ``stablediffusion.rewards.learned``.

A reward takes images (B, 3, H, W) in [0, 1] and the condition (its ``prompts``, one a row) and gives one number an
image, (B,). Compressibility is minus the size of the image as JPEG. Colourfulness of the opponent channels
rg = R - G, yb = (R + G)/2 - B is

    sqrt(var rg + var yb) + 0.3 sqrt(mean(rg)^2 + mean(yb)^2),

variances and means over pixels, in the units of the pixels: about 0.06 is slightly, 0.43 extremely colourful.

A file's size has no gradient. ``jpeg_estimate`` has: JPEG spends about log2|z| bits on a quantised coefficient z of its
8 x 8 cosine transform, so that

    size in kB = a + b sum_Y log2(1 + 9 z^2)/2 + c sum_CbCr log2(1 + 9 z^2)/2

without rounding z, over all coefficients but the blocks' means. a, b and c were fitted to 512 reconstructions of the
bundled model's drawings; on 512 others the estimate explains .956 of the variance of the size.

Source: Black et al. 2305.13301 (compressibility); Hasler and Süsstrunk 2003, equation 3, divided by 255; Wallace 1992
(JPEG), its tables by the Independent JPEG Group's rule for quality 95.
"""

from __future__ import annotations

import functools
import importlib
import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from stablediffusion.scenes.captions import parse
from stablediffusion.scenes.scorer import all_right, log_prob

QUALITY = 95
_EPSILON = 1e-8
# kB of header and empty blocks of 32 x 32 pixels, and for each estimated bit of luma and of chroma.
_JPEG_KB = (0.6158, 0.000289, 0.000229)


@dataclass(frozen=True)
class ImageReward:
    """A reward of images with what is known of it.

    Attributes:
        name: as the settings name it.
        function: (images (B, 3, H, W) in [0, 1], condition) -> (B,).
        differentiable: whether gradients reach the images.
        unit: of its values.
    """

    name: str
    function: Callable[[Tensor, Any], Tensor]
    differentiable: bool
    unit: str

    def __call__(self, images: Tensor, condition: Any) -> Tensor:
        """Return the rewards, (B,)."""
        return self.function(images, condition)


def jpeg_size(images: Tensor, quality: int = QUALITY) -> Tensor:
    """Return the size of each image as a JPEG file, in kB of 1000 bytes, (B,); not differentiable.

    Args:
        images: (B, 3, H, W) in [0, 1], rounded to 8 bits.
        quality: Pillow's, 1 to 95.
    """
    pixels = (images.detach().float().clamp(0, 1) * 255).round().to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()
    return torch.tensor([_bytes(image, quality) / 1000 for image in pixels], device=images.device)


def jpeg_estimate(images: Tensor) -> Tensor:
    """Return a differentiable estimate of ``jpeg_size``, kB, (B,).

    Args:
        images: (B, 3, H, W) in [0, 1], H and W multiples of 16.

    Raises:
        ValueError: for another size.
    """
    if images.shape[-1] % 16 or images.shape[-2] % 16:
        raise ValueError(f"an estimate of JPEG size needs sides that 16 divides, got {tuple(images.shape[-2:])}")
    red, green, blue = (255 * images).unbind(1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    # Colour is halved in resolution, as JPEG does by default.
    chroma = nn.functional.avg_pool2d(torch.stack([0.564 * (blue - luma), 0.713 * (red - luma)], 1), 2)
    tables = _quantisation()
    bits = [_bits(plane, table) for plane, table in ((luma[:, None], tables[0]), (chroma, tables[1]))]
    return _JPEG_KB[0] + _JPEG_KB[1] * bits[0] + _JPEG_KB[2] * bits[1]


def _bits(planes: Tensor, table: Tensor) -> Tensor:
    """Return the sum of log2(1 + 9 z^2) / 2 over the coefficients of planes (B, C, H, W), blocks' means left out."""
    k = torch.arange(8.0, device=planes.device)
    cosines = torch.cos((2 * k + 1) * k[:, None] * math.pi / 16) / 2
    cosines[0] /= math.sqrt(2)
    blocks = planes.unfold(2, 8, 8).unfold(3, 8, 8)
    z = (cosines @ blocks @ cosines.T) / table.to(planes)
    bits = torch.log2(1 + 9 * z.square()) / 2
    return bits.flatten(1).sum(1) - bits[..., 0, 0].flatten(1).sum(1)


@functools.cache
def _quantisation() -> tuple[Tensor, Tensor]:
    """Return Pillow's tables of luma and chroma at ``QUALITY``, (8, 8) each."""
    stream = io.BytesIO()
    Image.new("RGB", (16, 16)).save(stream, "JPEG", quality=QUALITY)
    tables = Image.open(stream).quantization  # type: ignore[attr-defined]
    luma, chroma = (torch.tensor(tables[k], dtype=torch.float32).reshape(8, 8) for k in (0, 1))
    return luma, chroma


def colourfulness(images: Tensor) -> Tensor:
    """Return the colourfulness of each image, (B,), in units of the pixels; differentiable.

    Args:
        images: (B, 3, H, W) in [0, 1].
    """
    red, green, blue = images.flatten(2).unbind(1)
    rg, yb = red - green, (red + green) / 2 - blue

    # the root of zero, at a grey image, has no gradient
    def root(value: Tensor) -> Tensor:
        return (value + _EPSILON).sqrt() - _EPSILON**0.5

    spread = root(rg.var(1, correction=0) + yb.var(1, correction=0))
    return spread + 0.3 * root(rg.mean(1).square() + yb.mean(1).square())


def _bytes(pixels: np.ndarray, quality: int) -> int:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=quality)
    return stream.tell()


def _alignment(images: Tensor, condition: Any) -> Tensor:
    # an empty prompt asks for nothing
    asked = [i for i, prompt in enumerate(condition.prompts) if prompt]
    values = images.new_zeros(len(images))
    if asked:
        values[asked] = log_prob(images[asked], [condition.prompts[i] for i in asked]).to(images.dtype)
    return values


def _correctness(images: Tensor, condition: Any) -> Tensor:
    asked = [i for i, prompt in enumerate(condition.prompts) if prompt]
    values = images.new_ones(len(images))
    if asked:
        right = all_right(2 * images[asked].detach() - 1, [parse(condition.prompts[i]) for i in asked])
        values[asked] = right.to(images)
    return values


REWARDS: Mapping[str, ImageReward] = {
    "compress": ImageReward("compress", lambda images, _: -jpeg_size(images), False, "kB of JPEG saved"),
    "compress-smooth": ImageReward(
        "compress-smooth", lambda images, _: -jpeg_estimate(images), True, "kB of JPEG saved, estimated"
    ),
    "incompress": ImageReward("incompress", lambda images, _: jpeg_size(images), False, "kB of JPEG"),
    "vivid": ImageReward("vivid", lambda images, _: colourfulness(images), True, "colourfulness, pixels in [0, 1]"),
    "align": ImageReward("align", _alignment, True, "nats, of the bundled model's captions"),
    "correct": ImageReward("correct", _correctness, False, "1 if all a caption of the bundled model says is seen"),
}


def find_reward(name: str) -> ImageReward:
    """Return a reward by its name, or a user's own by ``"package.module:function"``.

    A function of one's own takes (images, condition) and is taken to be differentiable unless it has an attribute
    ``differentiable`` that is False.

    Raises:
        ValueError: for a name that is neither, naming what exists.
    """
    if name in REWARDS:
        return REWARDS[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        known = ", ".join(REWARDS)
        raise ValueError(f"a reward must be one of {known} or 'package.module:function', got {name!r}; correct it")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"a reward of your own must be an importable 'package.module:function', got {name!r} ({error}); check that "
            "Python finds the module"
        ) from error
    if not callable(function):
        raise ValueError(f"a reward must be a function of (images, condition), got {type(function).__name__}: {name!r}")
    if isinstance(function, ImageReward):
        return function
    return ImageReward(name, function, bool(getattr(function, "differentiable", True)), "its own")
