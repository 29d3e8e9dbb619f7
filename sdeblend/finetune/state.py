"""The state of an optimiser as named tensors, for a file that holds tensors only."""

from __future__ import annotations

import torch
from torch import Tensor


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
