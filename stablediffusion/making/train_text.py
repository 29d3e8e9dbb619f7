"""Pre-train the text encoder: linear heads on its end-of-text state must name every factor of the caption.

Stable Diffusion's text encoder was trained with pictures before any denoiser saw it; here a minute on captions
alone does the same service: every cross-attention finds the whole caption in the end-of-text and padding tokens
from its first step.

Source: Radford et al. 2021 (CLIP reads a caption off its end-of-text token).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from stablediffusion.making.loop import Budget, Loop, Rate, seeded
from stablediffusion.making.networks import TEXT_WIDTH, text_encoder
from stablediffusion.making.tokenizer import MAX_LENGTH, tokenizer
from stablediffusion.scenes.captions import caption, mention, sample_scenes
from stablediffusion.scenes.factors import FACTORS, indices

BATCH = 64
LEARNING_RATE = 1e-3


def tokens(words: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Return token ids padded to the model's length, [caption, token]."""
    batch = words(captions, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt")
    ids: Tensor = batch["input_ids"]
    return ids


def text_loss(
    text: CLIPTextModel, heads: nn.ModuleList, words: CLIPTokenizer, generator: torch.Generator, batch: int = BATCH
) -> Tensor:
    """Return the cross-entropy of all factors, "not mentioned" being a class, at end-of-text and the last pad."""
    mentioned = mention(sample_scenes(batch, generator), generator)
    ids = tokens(words, [caption(scene) for scene in mentioned])
    states = text(ids.to(text.device))[0]
    place = (ids == words.eos_token_id).int().argmax(1)
    end = states[torch.arange(batch, device=text.device), place.to(text.device)]
    # class 0 is "not mentioned"
    classes = (indices(mentioned) + 1).to(text.device)
    losses = [
        nn.functional.cross_entropy(head(state), classes[:, i])
        for state in (end, states[:, -1])
        for i, head in enumerate(heads)
    ]
    return torch.stack(losses).mean()


def train_text(
    folder: Path, budget: Budget, batch: int = BATCH, device: torch.device | str = "cpu"
) -> tuple[CLIPTextModel, list[dict[str, float]]]:
    """Pre-train, or go on pre-training, the text encoder.

    Args:
        folder: of the run; the state is kept in ``text.safetensors``.
        budget: of the stage.
        batch: captions a step.
        device: of the text encoder.

    Returns:
        the text encoder with averaged weights, and the stage's log.
    """
    words = tokenizer()
    with seeded(2):
        text = text_encoder().to(device)
        heads = nn.ModuleList(nn.Linear(TEXT_WIDTH, 1 + len(options)) for options in FACTORS.values()).to(device)
    networks = {"text": text, "heads": heads}
    rate = Rate(dict.fromkeys(networks, LEARNING_RATE), average=0.99)
    loop = Loop(folder / "text.safetensors", networks, rate, seed=2)
    loop.run(lambda g: text_loss(text, heads, words, g, batch), budget)
    loop.use_averages()
    return text, loop.log
