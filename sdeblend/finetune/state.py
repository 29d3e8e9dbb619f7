"""Tensors in files: an optimiser's state by name, and safetensors whose bytes are a function of what they hold."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from safetensors.torch import save
from torch import Tensor


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return a safetensors file; the same tensors and metadata give the same bytes in every process.

    Args:
        tensors: by name; copied to the CPU.
        metadata: strings by name.
    """
    content = save({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, dict(metadata))
    # The library orders metadata by a hash that differs between processes.
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:start]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[start:]


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return what an optimiser remembers of each parameter, "optimizer.INDEX.NAME" -> tensor; empty before a step."""
    state = optimizer.state_dict()["state"]
    return {f"optimizer.{i}.{name}": torch.as_tensor(v) for i, kept in state.items() for name, v in kept.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Take back what ``optimizer_state`` returned; other names are left alone."""
    kept: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        head, *rest = name.split(".")
        if head == "optimizer":
            kept.setdefault(int(rest[0]), {})[rest[1]] = tensor.clone()
    optimizer.load_state_dict(optimizer.state_dict() | {"state": kept})
