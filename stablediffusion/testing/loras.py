"""Random LoRA files for tiny pipelines, written as a trainer would write them, with metadata.

A LoRA adds ``(alpha / rank) B A`` to a weight. Training starts at B = 0; here both factors are random and
``scale`` sets the size of the change, so that members differ visibly from the base and from each other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

from stablediffusion.adapters.loading import remove_adapter, save_lora
from stablediffusion.pipelines.components import denoisers_of, text_encoders_of
from stablediffusion.testing.networks import seeded

TARGETS = {
    "denoiser": ("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj"),
    "text-encoder": ("q_proj", "k_proj", "v_proj", "out_proj"),
}


def tiny_lora(
    pipe: Any,
    path: str | Path,
    *,
    seed: int,
    scale: float = 1.0,
    rank: int = 4,
    alpha: float | None = None,
    target: str = "denoiser",
) -> Path:
    """Write a random LoRA of ``pipe`` to a file; the pipeline is left without it.

    Args:
        pipe: a pipeline of any family.
        path: file to write, ``*.safetensors``.
        seed: of the factors.
        scale: standard deviation of the factor B relative to A (A has 1/sqrt(width)).
        rank: of the factors.
        alpha: the change is ``alpha / rank`` times B A; the rank by default.
        target: "denoiser" (every denoiser of the pipeline), or "text-encoder" (every CLIP encoder).

    Returns:
        the path.

    Raises:
        ValueError: for an unknown target.
    """
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
    adapter, alpha = "tiny", rank if alpha is None else alpha
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(TARGETS[target]))
    encoders = [m for m in text_encoders_of(pipe).values() if type(m).__name__.startswith("CLIP")]
    modules: list[Any] = [*denoisers_of(pipe).values()] if target == "denoiser" else encoders
    with seeded(seed):
        for module in modules:
            module.add_adapter(config, adapter_name=adapter)
            for layer in module.modules():
                if isinstance(layer, LoraLayer):
                    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
                    torch.nn.init.normal_(a, std=a.shape[1] ** -0.5)
                    torch.nn.init.normal_(b, std=scale * a.shape[0] ** -0.5)
    try:
        return save_lora(pipe, path, adapter)
    finally:
        remove_adapter(pipe, adapter)
