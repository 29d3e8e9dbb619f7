"""What learned rewards share: batches, prompts, and the small head that turns an embedding into one number."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stablediffusion.rewards.learned.files import Model
from stablediffusion.rewards.learned.pixels import Pixels


class Scorer(ABC):
    """A learned reward of images, a function of (images, condition).

    Args:
        pixels: what is done to the images first.
        model: what is loaded.

    Raises:
        ValueError: for a batch below 1.
    """

    reads_prompts = True

    def __init__(self, pixels: Pixels, model: Model) -> None:
        if model.batch < 1:
            raise ValueError(f"batch must be at least 1, got {model.batch}")
        self.pixels, self.device, self.batch = pixels, model.device, model.batch

    def __call__(self, images: Tensor, condition: Any) -> Tensor:
        """Return the rewards, float32 (B,) on the images' device.

        Args:
            images: (B, 3, H, W) in [0, 1]; gradients reach them.
            condition: its ``prompts``, one an image; anything for a reward that reads none.

        Raises:
            ValueError: for another number of prompts.
        """
        prompts = list(condition.prompts) if self.reads_prompts else [""] * len(images)
        if len(prompts) != len(images):
            raise ValueError(f"each image needs one prompt, got {len(images)} images and {len(prompts)} prompts")
        parts = [
            self.score(self.pixels(images[i : i + self.batch].to(self.device)), prompts[i : i + self.batch])
            for i in range(0, len(images), self.batch)
        ]
        return torch.cat(parts).to(images.device) if parts else images.new_zeros(0, dtype=torch.float32)

    @abstractmethod
    def score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the rewards of one batch of prepared images, float32 (b,)."""


def head(width: int) -> nn.Sequential:
    """Return the network width-1024-128-64-16-1 without activations, with dropout only while it is trained.

    Source: Schuhmann, improved-aesthetic-predictor (2022); its places in the sequence name its weights.
    """
    return nn.Sequential(
        nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64),
        nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1),
    )  # fmt: skip


def unit(embedding: Tensor) -> Tensor:
    """Return an embedding (B, width) at length one, in float32, where lengths of half precision overflow."""
    return nn.functional.normalize(embedding.float(), dim=-1)
