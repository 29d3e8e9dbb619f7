"""A scene's factors as class indices, for classifiers of captions and of pictures."""

from __future__ import annotations

import torch
from torch import Tensor

from stablediffusion.scenes.captions import COLOURS, POSITIONS, SHAPES, SIZES, TEXTURES, Scene

FACTORS: dict[str, tuple[str, ...]] = {
    "count": ("one", "two"),
    "background": COLOURS,
    "texture": TEXTURES,
    "shape": SHAPES,
    "colour": COLOURS,
    "size": SIZES,
    "position": POSITIONS,
    "second shape": SHAPES,
    "second colour": COLOURS,
}
ABSENT = -1


def indices(scenes: list[Scene]) -> Tensor:
    """Return each factor's class.

    Args:
        scenes: complete ones, or what captions mention.

    Returns:
        indices into the options of ``FACTORS``, ``ABSENT`` where a factor is not there, [scene, factor].
    """
    return torch.tensor([_row(scene) for scene in scenes])


def _row(scene: Scene) -> list[int]:
    first, second = scene.things[0], scene.things[1] if len(scene.things) == 2 else None
    words = (
        "two" if second else "one",
        scene.background,
        scene.texture,
        first.shape,
        first.colour,
        first.size,
        first.position,
        second and second.shape,
        second and second.colour,
    )
    return [ABSENT if w is None else o.index(w) for w, o in zip(words, FACTORS.values(), strict=True)]
