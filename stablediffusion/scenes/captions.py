"""Scenes of one or two coloured shapes, and the captions that mention them.

A scene is a tuple of factors; a caption names some of them, in a closed grammar of 30 words::

    caption := object ["in the" position] [background]  |  object "and" object [background]
    object  := "a" [size] [colour] (shape | "shape")
    background := "on a" {texture, colour in either order} "background"

A factor left out of a caption is free: the pictures drawn for it vary in it. A tenth of the combinations
(object colour, shape, background colour), chosen by a hash, is held out: no training scene contains one, and
every caption of the evaluation names one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch

COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan", "white", "black")
SHAPES = ("circle", "square", "triangle", "cross", "ring")
SIZES = ("small", "large")
POSITIONS = ("center", "top left", "top right", "bottom left", "bottom right")
TEXTURES = ("plain", "striped", "checkered")
WORDS = tuple(
    sorted({"a", "and", "background", "in", "on", "shape", "the", *COLOURS, *SHAPES, *SIZES, *TEXTURES}
           | {word for position in POSITIONS for word in position.split()})
)  # fmt: skip

TWO_OBJECTS = 0.2
_MENTION = {"colour": 0.9, "shape": 0.93, "size": 0.6, "position": 0.65, "texture": 0.7, "background": 0.92}
_DRAWS = 24


@dataclass(frozen=True)
class Thing:
    """One object; None is a factor not mentioned. Of two objects neither has a size or a position."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    position: str | None = None


@dataclass(frozen=True)
class Scene:
    """A picture's factors, or those that a caption mentions (the others None).

    Attributes:
        things: one object, or the left and the right one.
        background: colour.
        texture: of the background.
    """

    things: tuple[Thing, ...]
    background: str | None = None
    texture: str | None = None


def held_out(scene: Scene) -> bool:
    """Return whether the scene contains a combination that is kept out of training."""
    return any(_held_out(t.colour, t.shape, scene.background) for t in scene.things)


def _held_out(*combination: str | None) -> bool:
    return None not in combination and hashlib.sha256(" ".join(map(str, combination)).encode()).digest()[0] % 10 == 0


HELD_OUT = tuple(c for c in product(COLOURS, SHAPES, COLOURS) if c[0] != c[2] and _held_out(*c))


def caption(scene: Scene) -> str:
    """Write the caption that mentions the factors of a scene that are not None."""
    text = " and ".join(_noun(thing) for thing in scene.things)
    if scene.things[0].position:
        text += f" in the {scene.things[0].position}"
    if scene.background or scene.texture:
        text += " " + " ".join(word for word in ("on a", scene.texture, scene.background, "background") if word)
    return text


def _noun(thing: Thing) -> str:
    return " ".join(word for word in ("a", thing.size, thing.colour, thing.shape or "shape") if word)


def _any(name: str, words: tuple[str, ...]) -> str:
    return f"(?P<{name}>{'|'.join(words)})"


def _noun_pattern(i: int) -> str:
    sized = f"(?: {_any(f'size{i}', SIZES)})?(?: {_any(f'colour{i}', COLOURS)})?"
    return f"a{sized} (?:shape|{_any(f'shape{i}', SHAPES)})"


_GRAMMAR = re.compile(
    _noun_pattern(0)
    + f"(?: in the {_any('position', POSITIONS)}| and {_noun_pattern(1)})?"
    + f"(?: on a(?: {_any('texture0', TEXTURES)})?(?: {_any('background', COLOURS)})?"
    + f"(?: {_any('texture1', TEXTURES)})? background)?"
)


def parse(text: str) -> Scene:
    """Read the factors that a caption mentions.

    Args:
        text: a caption of the grammar above.

    Raises:
        ValueError: for any other text.
    """
    match = _GRAMMAR.fullmatch(" ".join(text.lower().split()))
    if match is None or (match["texture0"] and match["texture1"]):
        raise ValueError(
            "a caption must read like 'a large red circle in the top left on a striped blue background', "
            f"got {text[:80]!r}; the grammar is in stablediffusion.scenes.captions"
        )
    things = [Thing(match["shape0"], match["colour0"], match["size0"], match["position"])]
    if " and " in match[0]:
        things.append(Thing(match["shape1"], match["colour1"], match["size1"]))
    return Scene(tuple(things), match["background"], match["texture0"] or match["texture1"])


def sample_scenes(n: int, generator: torch.Generator, *, evaluation: bool = False) -> list[Scene]:
    """Draw complete scenes: none held out, or for the evaluation all of them.

    Args:
        n: how many.
        generator: source of the draws.
        evaluation: draw held-out combinations only.
    """
    scenes: list[Scene] = []
    while len(scenes) < n:
        scenes += [scene for scene in complete_scenes(n, generator) if held_out(scene) == evaluation]
    return scenes[:n]


def complete_scenes(n: int, generator: torch.Generator) -> list[Scene]:
    """Draw complete scenes of every combination, the held-out ones among them."""
    return list(map(complete, [Scene(())] * n, _uniforms(n, generator)))


def complete(scene: Scene, draws: Iterator[float]) -> Scene:
    """Fill in the factors that are None; no object has the background's colour.

    Args:
        scene: with zero (number of objects free), one or two objects.
        draws: uniform numbers.

    Raises:
        ValueError: if an object's colour is given and equals the background's.
    """
    things = scene.things or (Thing(),) * (2 if next(draws) < TWO_OBJECTS else 1)
    if scene.background and any(t.colour == scene.background for t in things):
        raise ValueError(f"an object must differ in colour from its background, got {caption(scene)!r}; change one")
    given = {t.colour for t in things}
    background = scene.background or _pick([c for c in COLOURS if c not in given], next(draws))
    colours = [c for c in COLOURS if c != background]
    filled = tuple(
        Thing(
            t.shape or _pick(SHAPES, next(draws)),
            t.colour or _pick(colours, next(draws)),
            (t.size or _pick(SIZES, next(draws))) if len(things) == 1 else None,
            (t.position or _pick(POSITIONS, next(draws))) if len(things) == 1 else None,
        )
        for t in things
    )
    return Scene(filled, background, scene.texture or _pick(TEXTURES, next(draws)))


def mention(scenes: list[Scene], generator: torch.Generator, *, combination: bool = False) -> list[Scene]:
    """Leave factors out of complete scenes at random, as captions do.

    Args:
        scenes: complete ones.
        generator: source of the draws.
        combination: always mention colours, shapes and the background's colour (the evaluation).
    """
    keep = _MENTION | (dict.fromkeys(("colour", "shape", "background"), 1.0) if combination else {})
    draws = _uniforms(len(scenes), generator)
    return [_mention(scene, row, keep) for scene, row in zip(scenes, draws, strict=True)]


def training_captions(n: int, generator: torch.Generator, *, combination: bool = False) -> list[str]:
    """Draw captions as the bundled model was trained on; ``combination`` as in ``mention``."""
    return [caption(scene) for scene in mention(sample_scenes(n, generator), generator, combination=combination)]


def different_captions(n: int, generator: torch.Generator, *, combination: bool = False) -> list[str]:
    """Draw captions as ``training_captions`` does, each one once."""
    found: list[str] = []
    while len(found) < n:
        found = list(dict.fromkeys([*found, *training_captions(n, generator, combination=combination)]))
    return found[:n]


def held_out_captions(n: int, seed: int) -> tuple[list[Scene], list[Scene]]:
    """Draw held-out scenes, and what their captions mention: always the combination, the rest at random.

    Args:
        n: how many.
        seed: of the draw.

    Returns:
        complete scenes, and mentioned ones for ``caption``.
    """
    generator = torch.Generator().manual_seed(seed)
    scenes = sample_scenes(n, generator, evaluation=True)
    return scenes, mention(scenes, generator, combination=True)


def _mention(scene: Scene, draws: Iterator[float], keep: dict[str, float]) -> Scene:
    def factors(of: object, *names: str) -> dict[str, str | None]:
        return {name: getattr(of, name) if next(draws) < keep[name] else None for name in names}

    things = tuple(replace(t, **factors(t, "shape", "colour", "size", "position")) for t in scene.things)
    return Scene(things, **factors(scene, "background", "texture"))


def _pick(options: tuple[str, ...] | list[str], draw: float) -> str:
    return options[int(draw * len(options))]


def _uniforms(n: int, generator: torch.Generator) -> list[Iterator[float]]:
    # in double precision: a float32 uniform times the number of options may round up to it
    return [iter(row) for row in torch.rand(n, _DRAWS, generator=generator, dtype=torch.float64).tolist()]
