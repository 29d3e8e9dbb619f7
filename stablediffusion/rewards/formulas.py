"""Rewards of images that need no weights from elsewhere: file size, colourfulness, the bundled model's scorer.

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
import io
import math
from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sdeblend.reward import Condition, Reward
from stablediffusion.scenes.captions import parse
from stablediffusion.scenes.scorer import all_right, log_prob

QUALITY = 95
_EPSILON = 1e-8
# kB of header and empty blocks of 32 x 32 pixels, and for each estimated bit of luma and of chroma.
_JPEG_KB = (0.6158, 0.000289, 0.000229)


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


def _alignment(images: Tensor, condition: Condition) -> Tensor:
    asked, prompts = _asked(condition)
    values = images.new_zeros(len(images))
    if asked:
        values[asked] = log_prob(images[asked], prompts).to(images.dtype)
    return values


def _correctness(images: Tensor, condition: Condition) -> Tensor:
    asked, prompts = _asked(condition)
    values = images.new_ones(len(images))
    if asked:
        values[asked] = all_right(2 * images[asked].detach() - 1, [parse(prompt) for prompt in prompts]).to(images)
    return values


def _asked(condition: Condition) -> tuple[list[int], list[str]]:
    """Return the rows and prompts of what is asked for; an empty prompt asks for nothing."""
    asked = [i for i, prompt in enumerate(condition.prompts) if prompt]
    return asked, [condition.prompts[i] for i in asked]


FORMULAS: Mapping[str, Reward] = {
    "compress": Reward("compress", lambda images, _: -jpeg_size(images), False, "kB of JPEG saved"),
    "compress-smooth": Reward(
        "compress-smooth", lambda images, _: -jpeg_estimate(images), True, "kB of JPEG saved, estimated"
    ),
    "incompress": Reward("incompress", lambda images, _: jpeg_size(images), False, "kB of JPEG"),
    "vivid": Reward("vivid", lambda images, _: colourfulness(images), True, "colourfulness, pixels in [0, 1]"),
    "align": Reward("align", _alignment, True, "nats, of the bundled model's captions"),
    "correct": Reward("correct", _correctness, False, "1 if all a caption of the bundled model says is seen"),
}
