"""A short text that tells one network's weights from any other's, whatever precision they were loaded in.

The text has one hash for each half precision: of all tensors rounded to float16, and to bfloat16. Rounding twice is
rounding once where the first precision is float32 or the same, so a network tuned in float32 and blended in
float16 or bfloat16, or the other way round, shares a hash with itself. Adapters do not count.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_DIGITS = 16


def base_identity(network: Any) -> str:
    """Return the identity of a network's own weights, adapters left out: a few seconds a billion weights."""
    return " ".join(f"{name}:{_hash(network, dtype)}" for name, dtype in _PRECISIONS.items())


def same_base(one: str, other: str) -> bool:
    """Return whether two identities are of the same weights, in whatever precision each was loaded."""
    return bool(set(one.split()) & set(other.split()))


def _hash(network: Any, dtype: torch.dtype) -> str:
    digest = hashlib.blake2b(digest_size=_DIGITS // 2)
    for name, value in sorted(_own(network)):
        digest.update(f"{name} {tuple(value.shape)};".encode())
        digest.update(value.detach().to("cpu", dtype).contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _own(network: Any) -> Iterator[tuple[str, Tensor]]:
    for name, value in getattr(network, "_orig_mod", network).state_dict().items():
        parts = name.split(".")
        if not any(part.startswith("lora_") for part in parts):
            yield ".".join(part for part in parts if part not in ("base_layer", "_orig_mod")), value
