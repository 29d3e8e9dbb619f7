"""A CLIP tokenizer whose tokens are the caption grammar's words.

Byte-pair merges build each word from its letters; any other lower-case text falls back to single
characters, so every prompt can be encoded, though the model has learned the words only.
"""

from __future__ import annotations

import string
from itertools import pairwise

from transformers import CLIPTokenizer

from stablediffusion.scenes.captions import WORDS

MAX_LENGTH = 24
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
_SYMBOLS = string.ascii_lowercase + string.digits + string.punctuation


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return token -> id and the merges, so that each word is one token.

    Each word is encoded by the merges so far, and what is still apart is joined from the left. Later merges rank
    lower, so they change no earlier word; a word's last symbol carries CLIP's end-of-word mark.
    """
    merges: dict[tuple[str, str], int] = {}
    for word in WORDS:
        parts = _encode([*word[:-1], word[-1] + "</w>"], merges)
        while len(parts) > 1:
            merges[(parts[0], parts[1])] = len(merges)
            parts[:2] = ["".join(parts[:2])]
    tokens = [*_SYMBOLS, *(s + "</w>" for s in _SYMBOLS), *dict.fromkeys(a + b for a, b in merges), BOS, EOS]
    return {token: i for i, token in enumerate(tokens)}, list(merges)


def _encode(parts: list[str], merges: dict[tuple[str, str], int]) -> list[str]:
    while pairs := [pair for pair in pairwise(parts) if pair in merges]:
        best = list(pairwise(parts)).index(min(pairs, key=merges.__getitem__))
        parts[best : best + 2] = ["".join(parts[best : best + 2])]
    return parts


def tokenizer() -> CLIPTokenizer:
    """Build the tokenizer; it pads with the end-of-text token, as Stable Diffusion's does.

    Raises:
        RuntimeError: if the installed transformers builds another vocabulary than asked, or splits a word.
    """
    vocab, merges = vocabulary()
    built = CLIPTokenizer(
        vocab=vocab, merges=merges, unk_token=EOS, bos_token=BOS, eos_token=EOS, pad_token=EOS,
        model_max_length=MAX_LENGTH,
    )  # fmt: skip
    split = [word for word in WORDS if len(built(word)["input_ids"]) != 3]
    if len(built) != len(vocab) or split:
        raise RuntimeError(
            f"the tokenizer must have {len(vocab)} tokens and one for each word, got {len(built)} and {split} split; "
            "this transformers version reads the vocabulary otherwise"
        )
    return built
