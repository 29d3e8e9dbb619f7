"""Train the scorer on drawings under blur and noise of random strength, by cross-entropy over all factors."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from sdeblend.shell.files import write_atomically
from stablediffusion.making.loop import Budget, Loop, Rate, seeded
from stablediffusion.scenes.captions import complete_scenes
from stablediffusion.scenes.drawing import draw
from stablediffusion.scenes.factors import ABSENT, indices
from stablediffusion.scenes.scorer import Scorer

BATCH = 64
LEARNING_RATE = 2e-3
NOISE, BLUR = 0.15, 0.8


def scorer_loss(scorer: Scorer, generator: torch.Generator, batch: int = BATCH) -> Tensor:
    """Return the cross-entropy on freshly drawn scenes, held-out combinations among them."""
    scenes = complete_scenes(batch, generator)
    device = scorer.heads.weight.device
    images = blemish(draw(scenes, generator), generator).to(device)
    classes = indices(scenes).to(device)
    losses = [nn.functional.nll_loss(log, classes[:, i], ignore_index=ABSENT, reduction="sum")
              for i, log in enumerate(scorer(images))]  # fmt: skip
    return torch.stack(losses).sum() / (classes != ABSENT).sum()


def blemish(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blur and add noise, of random strength in each image.

    Args:
        images: [n, 3, 32, 32].
        generator: source of strengths and noise.
    """
    blur, noise = torch.rand(2, len(images), 1, 1, 1, generator=generator)
    soft = nn.functional.avg_pool2d(nn.functional.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    noisy = NOISE * noise * torch.randn(images.shape, generator=generator)
    return torch.lerp(images, soft, BLUR * blur) + noisy


def train_scorer(
    folder: Path, budget: Budget, batch: int = BATCH, device: torch.device | str = "cpu"
) -> tuple[Scorer, list[dict[str, float]]]:
    """Train, or go on training, the scorer.

    Args:
        folder: of the run; the state is kept in ``scorer.safetensors``.
        budget: of the stage.
        batch: drawings a step.
        device: of the scorer.

    Returns:
        the scorer with averaged weights, frozen, and the stage's log.
    """
    with seeded(4):
        scorer = Scorer().to(device)
    loop = Loop(folder / "scorer.safetensors", {"scorer": scorer}, Rate({"scorer": LEARNING_RATE}, average=0.995), 4)
    loop.run(lambda g: scorer_loss(scorer, g, batch), budget)
    loop.use_averages()
    return scorer.eval().requires_grad_(False), loop.log


def export_scorer(scorer: Scorer, path: Path) -> None:
    """Write the scorer's weights in half precision."""
    write_atomically(path, save({name: weight.half() for name, weight in scorer.state_dict().items()}))
