"""OpenCLIP's names of CLIP's weights, in which HPSv2 was published, and those of transformers.

OpenCLIP keeps query, key and value of an attention in one matrix, one above the other, and applies both projections
from the right: they are split here, and transposed.

Source: Ilharco et al., open_clip, and transformers' conversion to ``CLIPModel``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import transformers
from torch import Tensor

# Of both encoders of ViT-H/14; the shapes of the weights do not tell.
HEADS = 16
_NAMES = (
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.weight$", "vision_model.embeddings.patch_embedding.weight"),
    # misspelt in transformers
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^token_embedding\.weight$", "text_model.embeddings.token_embedding.weight"),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^text_projection$", "text_projection.weight"),
    (r"(\.layers\.\d+)\.ln_([12])\.", r"\1.layer_norm\2."),
    (r"(\.layers\.\d+)\.attn\.", r"\1.self_attn."),
    (r"(\.layers\.\d+)\.mlp\.c_fc\.", r"\1.mlp.fc1."),
    (r"(\.layers\.\d+)\.mlp\.c_proj\.", r"\1.mlp.fc2."),
)


def is_openclip(state: Mapping[str, Tensor]) -> bool:
    """Return whether a model's tensors have OpenCLIP's names."""
    return "visual.conv1.weight" in state


def transformers_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a ``CLIPModel`` from those of OpenCLIP; unknown names stay as they are."""
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        name = key
        for old, new in _NAMES:
            name = re.sub(old, new, name)
        if name.endswith(("in_proj_weight", "in_proj_bias")):
            stem, kind = name.rsplit("in_proj_", 1)
            out |= {f"{stem}{part}_proj.{kind}": rows for part, rows in zip("qkv", value.chunk(3), strict=True)}
        else:
            out[name] = value.T if key in ("visual.proj", "text_projection") else value
    # a mask that is computed
    out.pop("attn_mask", None)
    return out


def config_of(state: Mapping[str, Tensor]) -> Any:
    """Return the settings of a ``CLIPModel`` of ViT-H/14's kind, sizes read off its tensors.

    Args:
        state: under transformers' names.

    Raises:
        KeyError: for a tensor that is missing.
    """
    words, text = state["text_model.embeddings.token_embedding.weight"].shape
    vision, _, patch, _ = state["vision_model.embeddings.patch_embedding.weight"].shape
    patches = state["vision_model.embeddings.position_embedding.weight"].shape[0] - 1
    width = state["visual_projection.weight"].shape[0]

    def shared(kind: str, size: int) -> dict[str, Any]:
        pattern = rf"{kind}_model\.encoder\.layers\.(\d+)\."
        layers = [int(found[1]) for key in state if (found := re.match(pattern, key))]
        return {
            "hidden_size": size, "num_hidden_layers": 1 + max(layers, default=-1), "num_attention_heads": HEADS,
            "intermediate_size": state[f"{kind}_model.encoder.layers.0.mlp.fc1.weight"].shape[0], "hidden_act": "gelu",
            "projection_dim": width,
        }  # fmt: skip

    return transformers.CLIPConfig(
        text_config=shared("text", text) | {
            "vocab_size": words,
            "max_position_embeddings": state["text_model.embeddings.position_embedding.weight"].shape[0],
            # The embedding is that of the token with the largest number, which ends a text.
            "eos_token_id": 2,
        },
        vision_config=shared("vision", vision) | {"patch_size": patch, "image_size": patch * round(patches**0.5)},
        projection_dim=width,
    )  # fmt: skip
