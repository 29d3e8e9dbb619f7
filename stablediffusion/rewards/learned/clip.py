"""Rewards that are CLIP, or a head on it: CLIPScore, PickScore, HPSv2 and LAION's aesthetic score.

With f(image) and g(prompt) the embeddings at length one, <f, g> is their cosine, and

    CLIPScore    100 <f, g>
    PickScore    exp(s) <f, g>, s the model's own logit_scale: its value in the model of Pick-a-Pic preferences
    HPSv2        <f, g>, as its authors report it
    aesthetic    MLP(f), on a scale that people gave from 1 to 10; no prompt

CLIPScore here is not cut at zero, where its gradient would end: 2.5 max(cos, 0) of Hessel et al. is .025 times its
positive part. PickScore and HPSv2 are CLIP ViT-H/14 tuned on preferences between images; only differences count. As
its own code does, HPSv2 sees the whole of an image that is not square, on black; the others see its centre.

The code released with Diffusion Blend subtracts 19 from PickScore, stretches images to a square and leaves out the
mean and deviation of the channels, without which the model was not trained: its values differ from these.

Embeddings are brought to length one, and the head applied, in float32 whatever precision the network has.

Source: Hessel et al. 2104.08718 (CLIPScore); Kirstain et al. 2305.01569 (PickScore); Wu et al. 2306.09341 and its
code, score.py (HPSv2); Schuhmann, improved-aesthetic-predictor (2022).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from stablediffusion.rewards.learned import openclip
from stablediffusion.rewards.learned.base import Scorer, head, unit
from stablediffusion.rewards.learned.files import Model
from stablediffusion.rewards.learned.pixels import Pixels, pixels_of

# The vocabulary and image settings are the same for every model here, for folders that come without.
PROCESSOR = "openai/clip-vit-large-patch14"
_TOKENIZER = ("tokenizer.json", "vocab.json")
_PREPROCESSOR = "preprocessor_config.json"
_ENDS = ("<|startoftext|>", "<|endoftext|>")
_CONVERT = "safetensors.torch.save_file(torch.load(OLD, weights_only=True)['state_dict'], NEW)"
# <f, g> times this; None is exp(logit_scale).
_SCALES = {"clipscore": 100.0, "pickscore": None, "hpsv2": 1.0}


class Similarity(Scorer):
    """The scaled cosine of image and prompt; see the module's docstring."""

    def __init__(self, network: Any, tokenizer: Any, scale: float, pixels: Pixels, model: Model) -> None:
        super().__init__(pixels, model)
        self.network, self.tokenizer, self.scale = network.to(model.device, model.dtype), tokenizer, scale
        self.length = int(self.network.config.text_config.max_position_embeddings)

    def score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        seen = self.network.vision_model(pixel_values=pixels.to(self.network.dtype)).pooler_output
        images = unit(self.network.visual_projection(seen))
        return self.scale * (images * self._texts(prompts)).sum(-1)

    @torch.no_grad()
    def _texts(self, prompts: Sequence[str]) -> Tensor:
        """Return the embeddings of prompts, one a row, each distinct one computed once."""
        place = {prompt: k for k, prompt in enumerate(dict.fromkeys(prompts))}
        tokens = self.tokenizer(
            list(place), padding=True, truncation=True, max_length=self.length, return_tensors="pt"
        ).to(self.device)
        read = self.network.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
        return unit(self.network.text_projection(read))[[place[prompt] for prompt in prompts]]


class Aesthetic(Scorer):
    """The head on the image's embedding; see the module's docstring."""

    reads_prompts = False

    def __init__(self, network: Any, top: nn.Module, pixels: Pixels, model: Model) -> None:
        super().__init__(pixels, model)
        self.network, self.top = network.to(model.device, model.dtype), top.to(model.device)

    def score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        seen = self.network(pixel_values=pixels.to(self.network.dtype)).image_embeds
        return self.top(unit(seen))[:, 0]


def load_similarity(model: Model) -> Similarity:
    """Load CLIPScore, PickScore or HPSv2 from a ``CLIPModel`` of transformers, or HPSv2 under OpenCLIP's names.

    Args:
        model: with config.json and model.safetensors; OpenCLIP's needs no config.json.

    Raises:
        ValueError: for files that are missing, or of another model.
    """
    config, state = _openclip(model) if model.name == "hpsv2" else (None, {})
    if config is None:
        table = model.table("config.json")
        if table.get("model_type") != "clip":
            raise model.wrong(
                f"needs a CLIPModel of transformers (model_type 'clip'), got {table.get('model_type')!r} in "
                f"{model.folder / 'config.json'}; give such a folder or hub id"
            )
        config, state = _config(model, transformers.CLIPConfig, table), model.tensors()
    network = model.network(lambda: transformers.CLIPModel(config), state)
    tokenizer = model.with_either(_TOKENIZER, PROCESSOR).tokenizer(
        transformers.CLIPTokenizer, config.text_config.vocab_size, _ENDS,
        model_max_length=config.text_config.max_position_embeddings,
    )  # fmt: skip
    side = config.vision_config.image_size
    pixels = _pixels(model, side)
    if model.name == "hpsv2":
        pixels = dataclasses.replace(pixels, size=side, crop=(side, side), pad=True)
    fixed = _SCALES[model.name]
    return Similarity(network, tokenizer, float(network.logit_scale.exp()) if fixed is None else fixed, pixels, model)


def load_aesthetic(model: Model) -> Aesthetic:
    """Load an aesthetic score: a CLIP image encoder with projection, and the head's weights as ``layers.N``.

    Args:
        model: with config.json and model.safetensors.

    Raises:
        ValueError: for files that are missing, or of another model.
    """
    table, state = model.table("config.json"), model.tensors()
    tops = {key.removeprefix("layers."): value for key, value in state.items() if key.startswith("layers.")}
    if not tops:
        raise model.wrong(
            f"needs a CLIP image encoder with the head's weights 'layers.0.weight', ..., got none of these in "
            f"{model.folder} (model_type {table.get('model_type')!r}); give a model such as its default"
        )
    # the settings are those of the image encoder alone, under a name of the author's own
    flat = {key: value for key, value in table.items() if key not in ("model_type", "architectures", "auto_map")}
    config = _config(model, transformers.CLIPVisionConfig, flat)
    rest = {key: value for key, value in state.items() if not key.startswith("layers.")}
    network = model.network(lambda: transformers.CLIPVisionModelWithProjection(config), rest)
    top = model.network(lambda: head(config.projection_dim), tops)
    return Aesthetic(network, top, _pixels(model, config.image_size), model)


def _openclip(model: Model) -> tuple[Any, dict[str, Tensor]]:
    """Return settings and weights of a model under OpenCLIP's names, or None and nothing of another."""
    if (model.folder / "config.json").is_file():
        return None, {}
    state = model.tensors(convert=_CONVERT)
    if not openclip.is_openclip(state):
        return None, {}
    renamed = openclip.transformers_names(state)
    try:
        return openclip.config_of(renamed), renamed
    except KeyError as error:
        raise model.wrong(
            f"needs all weights of CLIP ViT-H/14 in {model.folder}, got a file without {error}; convert "
            "HPS_v2.1_compressed.pt again"
        ) from error


def _config(model: Model, kind: Any, table: dict[str, Any]) -> Any:
    try:
        return kind.from_dict(json.loads(json.dumps(table)))
    except Exception as error:
        raise model.wrong(
            f"needs a config.json that transformers {transformers.__version__} reads, got one in {model.folder} that "
            f"it refuses ({type(error).__name__}); replace it"
        ) from error


def _pixels(model: Model, image_size: int) -> Pixels:
    source = model.with_either((_PREPROCESSOR,), PROCESSOR)
    return pixels_of(model.name, source.table(_PREPROCESSOR), image_size, source.folder)
