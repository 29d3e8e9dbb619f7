"""Tokenizers and text encoders on a vocabulary of single characters.

A CLIP tokenizer needs each symbol twice, inside a word and at its end ("</w>"), and its special tokens;
without merges every letter is a token. transformers 5 swallows the old ``vocab_file=`` silently and leaves
a tokenizer of two tokens, so the length is checked here.
"""

from __future__ import annotations

import string

from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

CLIP_LENGTH = 77
T5_LENGTH = 16
_SYMBOLS = string.ascii_lowercase + string.digits + string.punctuation
_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"
_OPEN, _CLOSE = "<|im_start|>", "<|im_end|>"
# Systems' long instructions are left out. What is said may be text, or a list of parts of which some are text.
_CHAT = (
    "{% for message in messages if message.role != 'system' %}<|im_start|>"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}{% endif %}"
    "<|im_end|>{% endfor %}"
)
# Qwen-Image puts prompts into a text of its own and drops the 34 tokens before them: so many as these words make of it.
_WORDS = (
    "system Describe user",
    " the image by detailing color shape size texture quantity text spatial relationships of objects and background",
)


def clip_vocabulary() -> dict[str, int]:
    """Return token -> id: every symbol inside and at the end of a word, then the two special tokens."""
    tokens = [*_SYMBOLS, *(s + "</w>" for s in _SYMBOLS), _BOS, _EOS]
    return {token: i for i, token in enumerate(tokens)}


def clip_tokenizer() -> CLIPTokenizer:
    """Return a CLIP tokenizer whose tokens are single characters, length 77."""
    vocabulary = clip_vocabulary()
    tokenizer = CLIPTokenizer(
        vocab=vocabulary,
        merges=[],
        unk_token=_EOS,
        bos_token=_BOS,
        eos_token=_EOS,
        pad_token=_EOS,
        model_max_length=CLIP_LENGTH,
    )
    if len(tokenizer) != len(vocabulary):
        raise RuntimeError(
            f"the tiny CLIP tokenizer must have {len(vocabulary)} tokens, got {len(tokenizer)}; "
            "this transformers version names the vocabulary argument otherwise"
        )
    return tokenizer


def t5_tokenizer() -> T5Tokenizer:
    """Return a T5 tokenizer whose tokens are single characters, length 16."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("▁", -2.0)]
    pieces += [(s, -3.0) for s in _SYMBOLS]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=T5_LENGTH)


def clip_encoder(
    width: int = 16, *, projection: int | None = None, activation: str = "quick_gelu"
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """Return a two-layer CLIP text encoder.

    Args:
        width: hidden size.
        projection: size of the projected pooled embedding; None for a plain encoder.
        activation: "quick_gelu" (OpenAI's CLIP) or "gelu" (OpenCLIP).
    """
    vocabulary = clip_vocabulary()
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=projection or width,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_act=activation,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=vocabulary[_BOS],
        eos_token_id=vocabulary[_EOS],
        pad_token_id=vocabulary[_EOS],
    )
    return CLIPTextModel(config) if projection is None else CLIPTextModelWithProjection(config)


def t5_encoder(width: int = 32) -> T5EncoderModel:
    """Return a one-layer T5 encoder of the given width."""
    config = T5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=1,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return T5EncoderModel(config)


def chat_tokenizer(opened: bool = False) -> Qwen2Tokenizer:
    """Return a language model's tokenizer with a template of chats; most of its tokens are single characters.

    Args:
        opened: whether texts begin with a token for their beginning.
    """
    # bytes in this kind of vocabulary: a space is \u0120, a new line \u010a
    tokens = [_EOS, _OPEN, _CLOSE, "\u0120", "\u010a", *string.ascii_uppercase, *_SYMBOLS]
    tokenizer = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[],
        bos_token=_OPEN,
        add_bos_token=opened,
        additional_special_tokens=[_CLOSE],
        model_max_length=T5_LENGTH,
    )
    bare, spaced = (words.split() for words in _WORDS)
    tokenizer.add_tokens(["<Prompt Start>", *bare, *(f" {word}" for word in spaced)])
    tokenizer.chat_template = _CHAT
    return tokenizer


def decoder(width: int = 16, layers: int = 2) -> Qwen3Model:
    """Return a language model without its head, of the given width.

    Weights are larger than trained ones begin, so that hidden states of every layer are of order one.
    """
    config = Qwen3Config(
        vocab_size=len(chat_tokenizer()),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=width // 2,
        initializer_range=width**-0.5,
        pad_token_id=0,
    )
    return Qwen3Model(config)
