"""Prompts to tune on: where they come from, and their embeddings as a condition whose rows can be taken.

A source is a list, a file with one prompt a line, or a function (count, generator) -> prompts. Each prompt is
encoded once and by itself, so that its embedding does not depend on what else is in a batch or was seen before: a
run that is resumed gets the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stablediffusion.pipelines.families import Text
from stablediffusion.pipelines.inputs import encode_negatives, encode_prompts

Draw = Callable[[int, torch.Generator], Sequence[str]]
_REMEMBERED = 1024


@dataclass
class PromptCondition:
    """The prompts of a batch, one a row, with their embeddings.

    Attributes:
        prompts: one a row.
        texts: embeddings of the distinct prompts.
        which: row -> distinct prompt, long (B,).
        negative: embeddings of the negative prompt, None without guidance.
    """

    prompts: tuple[str, ...]
    texts: Sequence[Text]
    which: Tensor
    negative: Text | None = None

    def rows(self, index: Tensor) -> PromptCondition:
        """Return the condition of the rows ``index``, long (N,), repeated rows allowed."""
        prompts = tuple(self.prompts[i] for i in index.tolist())
        return PromptCondition(prompts, self.texts, self.which[index.to(self.which.device)], self.negative)

    def __len__(self) -> int:
        return len(self.prompts)

    def of_rows(self) -> tuple[list[Text], list[Text]]:
        """Return the embeddings of prompts and of negative prompts, one a row; none of these without guidance."""
        texts = [self.texts[k] for k in self.which.tolist()]
        return texts, [] if self.negative is None else [self.negative] * len(texts)


class Encoder:
    """Encodes prompts with one negative prompt and remembers them.

    Args:
        pipe: a text-to-image pipeline.
        negative: negative prompt, for classifier-free guidance; None for what the pipeline has in its place.
        guided: whether there is guidance.
    """

    def __init__(self, pipe: Any, negative: str | None, guided: bool) -> None:
        self.pipe = pipe
        self._known: dict[str, Text] = {}
        self._negative: Text | None = None
        if guided:
            with torch.no_grad():
                self._negative = encode_negatives(pipe, None if negative is None else [negative], [self._one("")])[0]

    def __call__(self, prompts: Sequence[str]) -> PromptCondition:
        """Return the condition of these prompts, one a row."""
        distinct = list(dict.fromkeys(prompts))
        place = {prompt: k for k, prompt in enumerate(distinct)}
        which = torch.tensor([place[prompt] for prompt in prompts])
        return PromptCondition(tuple(prompts), [self._one(prompt) for prompt in distinct], which, self._negative)

    @torch.no_grad()
    def _one(self, prompt: str) -> Text:
        if prompt not in self._known:
            if len(self._known) >= _REMEMBERED:
                del self._known[next(iter(self._known))]
            self._known[prompt] = encode_prompts(self.pipe, [prompt])[0]
        return self._known[prompt]


def prompt_source(prompts: Sequence[str] | str | Path | Draw) -> Draw:
    """Return a function that draws prompts.

    Args:
        prompts: a list, a file with one prompt a line, or the function itself. From a list prompts are drawn
            without repetition as long as there are enough.

    Raises:
        ValueError: for a file that cannot be read, or without a prompt.
    """
    if callable(prompts):
        return prompts
    chosen = prompt_lines(prompts)

    def draw(count: int, generator: torch.Generator) -> list[str]:
        if count > len(chosen):
            index = torch.randint(len(chosen), (count,), generator=generator, device=generator.device)
        else:
            index = torch.randperm(len(chosen), generator=generator, device=generator.device)[:count]
        return [chosen[i] for i in index.tolist()]

    return draw


def prompt_lines(prompts: Sequence[str] | str | Path) -> list[str]:
    """Return the prompts of a list, or of a file with one a line.

    Raises:
        ValueError: for a file that cannot be read, or without a prompt.
    """
    if isinstance(prompts, str | Path):
        path = Path(prompts)
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"prompts need a readable text file with one a line, got {path} ({type(error).__name__}); check it"
            ) from error
        chosen, where = [line.strip() for line in lines if line.strip()], str(path)
    else:
        chosen, where = list(prompts), "an empty list"
    if not chosen or not all(isinstance(prompt, str) for prompt in chosen):
        raise ValueError(f"there must be at least one prompt as text, got none in {where}; give one a line")
    return chosen
