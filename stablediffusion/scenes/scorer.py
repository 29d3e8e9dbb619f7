"""Does a picture show what its caption says? A small classifier of every factor, trained on drawings alone.

    log_prob(images, captions) = sum over the factors that a caption mentions of log p(factor | image)

It is differentiable in the images. It never sees a generated image in training; noise and blur laid over the drawings
keep an autoencoder's artefacts from confusing it.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from stablediffusion.scenes.captions import Scene, parse
from stablediffusion.scenes.factors import ABSENT, FACTORS, indices

# of numbers, and of None where there is none
Accuracies = dict[str, dict[str, Any]]
WEIGHTS = Path(__file__).with_name("scorer.safetensors")


class Scorer(nn.Module):
    """Four convolutions and a hidden layer, with one group of logits for each factor."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 32, 48, 64)
        layers: list[nn.Module] = []
        for i in range(4):
            layers += [nn.Conv2d(widths[i], widths[i + 1], 3, stride=1 if i == 0 else 2, padding=1), nn.SiLU()]
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * widths[-1], 64), nn.SiLU())
        self.heads = nn.Linear(64, sum(map(len, FACTORS.values())))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return log-probabilities of each factor's options.

        Args:
            images: in -1..1, [n, 3, 32, 32].

        Returns:
            one [n, options] for each of ``FACTORS``.
        """
        logits = self.heads(self.features(images)).split([len(options) for options in FACTORS.values()], 1)
        return tuple(group.log_softmax(1) for group in logits)


@cache
def load_scorer() -> Scorer:
    """Load the bundled scorer, frozen, in float32."""
    scorer = Scorer()
    scorer.load_state_dict({name: weight.float() for name, weight in load_file(WEIGHTS).items()})
    return scorer.eval().requires_grad_(False)


def log_prob(images: Tensor, captions: list[str]) -> Tensor:
    """Return the log-probability of what each caption mentions; one object or two always counts as mentioned.

    Args:
        images: in 0..1, [n, 3, 32, 32].
        captions: n captions of the grammar of scenes.

    Returns:
        log-probabilities, [n], differentiable in the images.

    Raises:
        ValueError: for a caption outside the grammar, or images of another size or number.
    """
    if images.shape != (len(captions), 3, 32, 32):
        raise ValueError(
            f"{len(captions)} captions need images of shape ({len(captions)}, 3, 32, 32), got {tuple(images.shape)}; "
            "give one 32 x 32 image for each"
        )
    classes = indices([parse(caption) for caption in captions]).to(images.device)
    logs = load_scorer().to(images.device)(2 * images.float() - 1)
    picked = [log.gather(1, classes[:, i : i + 1].clamp_min(0))[:, 0] for i, log in enumerate(logs)]
    return torch.where(classes == ABSENT, 0, torch.stack(picked, 1)).sum(1)


def accuracies(images: Tensor, mentioned: list[Scene], scorer: Scorer | None = None) -> Accuracies:
    """Return the accuracy of each factor where it is mentioned, and of all at once.

    Args:
        images: in -1..1, [n, 3, 32, 32].
        mentioned: of each image.
        scorer: in place of the bundled one.

    Returns:
        by factor and for "all": "accuracy", "error" (standard error), both None if no caption mentions it, and "n".
    """
    right, said = _read(images, mentioned, scorer)
    out = {name: _share(right[said[:, i], i]) for i, name in enumerate(FACTORS)}
    return out | {"all": _share((right | ~said).all(1))}


def all_right(images: Tensor, mentioned: list[Scene], scorer: Scorer | None = None) -> Tensor:
    """Return whether each image in -1..1, [n, 3, 32, 32], shows all that was mentioned, bool [n]."""
    right, said = _read(images, mentioned, scorer)
    return (right | ~said).all(1)


@torch.no_grad()
def _read(images: Tensor, mentioned: list[Scene], scorer: Scorer | None) -> tuple[Tensor, Tensor]:
    """Return whether each factor was read as mentioned, and whether it was mentioned, [n, factors]."""
    logs = (scorer or load_scorer()).to(images.device)(images.float())
    classes = indices(mentioned).to(images.device)
    return torch.stack([log.argmax(1) for log in logs], 1) == classes, classes != ABSENT


def _share(right: Tensor) -> dict[str, Any]:
    n = len(right)
    if not n:
        # not NaN, which is no JSON
        return {"accuracy": None, "error": None, "n": 0}
    p = float(right.float().mean())
    return {"accuracy": round(p, 4), "error": round(math.sqrt(p * (1 - p) / n), 4), "n": n}
