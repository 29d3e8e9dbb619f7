"""Prompt embeddings of members that change a text encoder, told from the base's by their values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class TextEmbeddings:
    """Prompt embeddings of the base and of each member with a text-encoder LoRA.

    A pipeline stacks, repeats and reorders what ``encode_prompt`` returned; each row that reaches the denoiser is
    recognised by its value and exchanged for the member's own.
    """

    def __init__(self) -> None:
        self._pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._known: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def clear(self) -> None:
        """Forget all prompts."""
        self._pairs, self._known = {}, {}

    def record(self, member: str, base: Any, own: Any) -> None:
        """Remember what ``encode_prompt`` returned without and with the member's adapter."""
        pairs = self._pairs.setdefault(member, [])
        for left, right in zip(base, own, strict=True):
            if isinstance(left, Tensor) and left.ndim >= 2:
                pairs.append((left, right))

    def of(self, member: str, given: Tensor) -> Tensor:
        """Return the member's embeddings for the base's rows ``given``.

        Raises:
            ValueError: for a row that no recorded prompt has.
        """
        known = self._known.setdefault(member, [])
        for seen, mapped in known:
            if seen is given:
                return mapped
        pairs = [(b, o) for b, o in self._pairs.get(member, []) if b.shape[1:] == given.shape[1:]]
        base = torch.cat([b for b, _ in pairs]).to(given) if pairs else given[:0]
        same = (given.unsqueeze(1) == base.unsqueeze(0)).flatten(2).all(-1)
        if not bool(same.any(1).all()):
            raise ValueError(
                f"member {member!r} changes the text encoder and needs prompts as text, got embeddings that "
                "encode_prompt did not make; pass prompt="
            )
        mapped = torch.cat([o for _, o in pairs]).to(given)[same.int().argmax(1)]
        self._known[member] = [*known[-3:], (given, mapped)]
        return mapped
