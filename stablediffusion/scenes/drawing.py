"""Anti-aliased drawings of scenes, 32 x 32 pixels, a batch at once.

A shape is given by its signed distance d(p) in pixels (negative inside); a pixel's coverage is
clip(1/2 - d, 0, 1), and an object of colour c is laid over what lies beneath: image <- image + coverage (c - image).
Positions jitter by up to a pixel, radii by 4 %, and each picture is faded by up to 40 % towards grey, so that one
caption has many drawings, more and less vivid ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stablediffusion.scenes.captions import COLOURS, SHAPES, TEXTURES, Scene

IMAGE_SIZE = 32
CELL = 4
# Colourfulness must vary within a caption, or no reward could move it without painting another colour.
FADE = 0.4
RADII = {"small": 5.4, "large": 8.2, None: 6.4}
_NEAR, _MIDDLE, _FAR = 9.0, 16.0, 23.0
_CENTRES = {
    "center": (_MIDDLE, _MIDDLE),
    "top left": (_NEAR, _NEAR),
    "top right": (_FAR, _NEAR),
    "bottom left": (_NEAR, _FAR),
    "bottom right": (_FAR, _FAR),
}
_RGB = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.65, 0.15),
    "blue": (0.10, 0.20, 0.90),
    "yellow": (0.98, 0.90, 0.10),
    "purple": (0.60, 0.10, 0.75),
    "cyan": (0.10, 0.85, 0.90),
    "white": (0.97, 0.97, 0.97),
    "black": (0.04, 0.04, 0.04),
}
_PALETTE = torch.tensor([_RGB[colour] for colour in COLOURS])


def tones() -> Tensor:
    """Return the second tone of each colour's textures, [colours, 3] in 0..1: darker, for black lighter."""
    dark = 0.6 * _PALETTE
    dark[COLOURS.index("black")] = 0.33
    return dark


def draw(scenes: list[Scene], generator: torch.Generator | None = None) -> Tensor:
    """Draw complete scenes.

    Args:
        scenes: without factors left open (``scenes.complete`` fills them).
        generator: of the jitter; None for none.

    Returns:
        images in -1..1, [scene, 3, 32, 32].
    """
    n = len(scenes)
    jitter = torch.zeros(n, 2, 3) if generator is None else 2 * torch.rand(n, 2, 3, generator=generator) - 1
    image = _backgrounds(scenes)
    for i in range(2):
        rows = [k for k, scene in enumerate(scenes) if len(scene.things) > i]
        if not rows:
            continue
        things = [scenes[k].things[i] for k in rows]
        two = [len(scenes[k].things) == 2 for k in rows]
        centres = torch.tensor([
            (_FAR if i else _NEAR, _MIDDLE) if pair else _CENTRES[str(t.position)]
            for t, pair in zip(things, two, strict=True)
        ])
        radii = torch.tensor([RADII[t.size] for t in things]) * (1 + 0.04 * jitter[rows, i, 2])
        kinds = torch.tensor([SHAPES.index(str(t.shape)) for t in things])
        paint = _PALETTE[[COLOURS.index(str(t.colour)) for t in things]][:, :, None, None]
        cover = coverage(kinds, centres + jitter[rows, i, :2], radii)[:, None]
        image[rows] += cover * (paint - image[rows])
    if generator is not None:
        fade = FADE * torch.rand(n, 1, 1, 1, generator=generator)
        image = torch.lerp(image, image.mean(1, keepdim=True), fade)
    return 2 * image - 1


def _backgrounds(scenes: list[Scene]) -> Tensor:
    colours = torch.tensor([COLOURS.index(str(scene.background)) for scene in scenes])
    textures = torch.tensor([TEXTURES.index(str(scene.texture)) for scene in scenes])
    cell = torch.arange(IMAGE_SIZE) // CELL
    stripes = (cell % 2).expand(IMAGE_SIZE, -1)
    checks = (cell[:, None] + cell) % 2
    second = torch.stack((torch.zeros_like(stripes), stripes, checks)).float()[textures][:, None]
    return torch.lerp(_PALETTE[colours][:, :, None, None], tones()[colours][:, :, None, None], second)


def coverage(kinds: Tensor, centres: Tensor, radii: Tensor) -> Tensor:
    """Return how much of each pixel a shape covers.

    Args:
        kinds: indices into ``SHAPES``, [n].
        centres: x (to the right) and y (downwards) in pixels, [n, 2].
        radii: in pixels, [n].

    Returns:
        coverage in 0..1, [n, 32, 32].
    """
    grid = torch.arange(IMAGE_SIZE) + 0.5
    x = (grid - centres[:, :1])[:, None, :]
    y = (grid - centres[:, 1:])[:, :, None]
    r = radii[:, None, None]
    distance = torch.hypot(x, y)
    ax, ay = x.abs(), y.abs()
    long, thin = torch.maximum(ax - r, ay - 0.36 * r), torch.maximum(ay - r, ax - 0.36 * r)
    shapes = {
        "circle": distance - r,
        "square": torch.maximum(ax, ay) - 0.88 * r,
        "triangle": torch.maximum(y, 3**0.5 / 2 * ax - y / 2) - 0.64 * r,
        "cross": torch.minimum(long, thin),
        "ring": (distance - 0.75 * r).abs() - 0.27 * r,
    }
    signed = torch.stack([s.expand(-1, IMAGE_SIZE, IMAGE_SIZE) for s in shapes.values()])
    return (0.5 - signed[kinds, torch.arange(len(kinds))]).clamp(0, 1)
