"""ImageReward: BLIP reads the prompt while it looks at the image, and a head turns what it read into one number.

The image encoder (ViT-L/16) gives one vector a patch; the text encoder (BERT with cross-attention to these in every
layer) reads the prompt, cut or padded to 35 tokens; of its first output h_[CLS]

    r = (MLP(h_[CLS]) - 0.16717362830052426) / 1.0333394966054072.

The original checkpoint is a pickle with names of its own. Saved once as safetensors with these names, it is read here
into transformers' networks: see ``transformers_names``. Widths, depths and the image's size are read off the shapes;
both encoders have heads of 64 numbers, as ViT-L and BERT-base do. ``vision_proj`` and ``text_proj``, which only BLIP's
own training uses, are left out.

Source: Xu et al. 2304.05977 and its code, ImageReward.py and models/BLIP; Li et al. 2201.12086 (BLIP).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import transformers
from torch import Tensor, nn

from stablediffusion.rewards.learned.base import Scorer, head
from stablediffusion.rewards.learned.files import Model
from stablediffusion.rewards.learned.pixels import Pixels

FILE = "ImageReward.safetensors"
TOKENIZER = "google-bert/bert-base-uncased"
LENGTH = 35
MEAN, STD = 0.16717362830052426, 1.0333394966054072
HEAD_WIDTH = 64
_CONVERT = "safetensors.torch.save_file(torch.load(OLD, weights_only=True), NEW)"
_UNUSED = ("vision_proj.", "text_proj.")
# In this order: a name goes through all of them.
_VISION_NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.(\d+)\.", r"encoder.layers.\1."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
)


def transformers_names(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Return an original checkpoint as those of the image encoder, the text encoder and the head.

    Args:
        state: ``blip.visual_encoder.*``, ``blip.text_encoder.*`` and ``mlp.layers.*``.

    Returns:
        the tensors of ``BlipVisionModel``, of ``BlipTextModel``, whose names are the original's, and of ``head``.

    Raises:
        ValueError: for a name that is none of these.
    """
    vision: dict[str, Tensor] = {}
    text: dict[str, Tensor] = {}
    top: dict[str, Tensor] = {}
    for key, value in state.items():
        name = key.removeprefix("blip.")
        if name.startswith("visual_encoder."):
            name = name.removeprefix("visual_encoder.")
            for old, new in _VISION_NAMES:
                name = re.sub(old, new, name)
            vision[name] = value
        elif name.startswith("text_encoder."):
            text[name.removeprefix("text_encoder.")] = value
        elif name.startswith("mlp.layers."):
            top[name.removeprefix("mlp.layers.")] = value
        elif not name.startswith(_UNUSED):
            raise ValueError(
                f"an ImageReward checkpoint has blip.visual_encoder, blip.text_encoder and mlp.layers, got {key!r}; "
                "give the file of THUDM/ImageReward, converted"
            )
    return vision, text, top


class BlipReward(Scorer):
    """ImageReward; see the module's docstring."""

    def __init__(
        self, vision: Any, text: Any, top: nn.Module, tokenizer: Any, pixels: Pixels, model: Model
    ) -> None:
        super().__init__(pixels, model)
        self.vision, self.text = vision.to(model.device, model.dtype), text.to(model.device, model.dtype)
        self.top, self.tokenizer = top.to(model.device), tokenizer

    def score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        patches = self.vision(pixel_values=pixels.to(self.vision.dtype)).last_hidden_state
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
        ).to(self.device)
        read = self.text(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=patches
        ).last_hidden_state
        return (self.top(read[:, 0].float())[:, 0] - MEAN) / STD


def load_blip(model: Model) -> BlipReward:
    """Load ImageReward.

    Args:
        model: with ImageReward.safetensors, and a tokenizer of BERT if it is to be read from there.

    Raises:
        ValueError: for files that are missing, or of another model.
    """
    try:
        vision_state, text_state, top_state = transformers_names(model.tensors(FILE, convert=_CONVERT))
        vision_config, text_config = _configs(vision_state, text_state)
    except (KeyError, IndexError) as error:
        raise model.wrong(
            f"needs BLIP's encoders in {model.folder / FILE}, got a file without {error}; "
            "give the file of THUDM/ImageReward, converted"
        ) from error
    vision = model.network(lambda: transformers.BlipVisionModel(vision_config), vision_state)
    text = model.network(lambda: transformers.BlipTextModel(text_config, add_pooling_layer=False), text_state)
    top = model.network(lambda: head(text_config.hidden_size), top_state)
    tokenizer = model.with_either(("tokenizer.json", "vocab.txt"), TOKENIZER).tokenizer(
        transformers.BertTokenizer, text_config.vocab_size, ("[CLS]", "[SEP]", "[PAD]")
    )
    side = vision_config.image_size
    return BlipReward(vision, text, top, tokenizer, Pixels(side, (side, side)), model)


def _configs(vision: Mapping[str, Tensor], text: Mapping[str, Tensor]) -> tuple[Any, Any]:
    """Return the settings of both encoders, read off the shapes of their weights."""
    width, _, patch, _ = vision["embeddings.patch_embedding.weight"].shape
    patches = vision["embeddings.position_embedding"].shape[1] - 1
    words, read = text["embeddings.word_embeddings.weight"].shape
    layers = "encoder.layers.0", "encoder.layer.0"
    return (
        transformers.BlipVisionConfig(
            hidden_size=width, intermediate_size=vision[f"{layers[0]}.mlp.fc1.weight"].shape[0],
            num_hidden_layers=_depth(vision, "layers"), num_attention_heads=max(1, width // HEAD_WIDTH),
            image_size=patch * round(patches**0.5), patch_size=patch, layer_norm_eps=1e-6,
        ),
        transformers.BlipTextConfig(
            vocab_size=words, hidden_size=read, encoder_hidden_size=width,
            intermediate_size=text[f"{layers[1]}.intermediate.dense.weight"].shape[0],
            num_hidden_layers=_depth(text, "layer"), num_attention_heads=max(1, read // HEAD_WIDTH),
            max_position_embeddings=text["embeddings.position_embeddings.weight"].shape[0], layer_norm_eps=1e-12,
        ),
    )  # fmt: skip


def _depth(state: Mapping[str, Tensor], key: str) -> int:
    return 1 + max(int(found[1]) for name in state if (found := re.match(rf"encoder\.{key}\.(\d+)\.", name)))
