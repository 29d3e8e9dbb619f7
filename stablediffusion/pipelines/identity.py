"""A short text that tells one network's weights from any other's, whatever precision they were loaded in.

The text has one hash for each half precision: of all tensors rounded to float16, and to bfloat16. Rounding twice is
rounding once where the first precision is float32 or the same, so a network tuned in float32 and blended in
float16 or bfloat16, or the other way round, shares a hash with itself. What is put on a network later does not count:
adapters, image prompts (IP-Adapter), joint projections computed from its own; nor does where its weights lie.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models import embeddings
from torch import Tensor, nn

_PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_DIGITS = 16
_WHOLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_PLAIN = (Tensor, nn.Parameter)
# computed from to_q, to_k and to_v; left behind, unused, where they are taken apart again
_JOINT = {"to_qkv": "to_q", "to_kv": "to_k", "to_added_qkv": "add_q_proj"}
_IMAGE_PROMPTS = tuple(
    kind
    for name, kind in vars(embeddings).items()
    if isinstance(kind, type) and issubclass(kind, nn.Module) and "IPAdapter" in name
)


def base_identity(network: Any) -> str:
    """Return the identity of a network's own weights: a few seconds a billion weights.

    Raises:
        ValueError: for weights that are not at hand as they were trained: quantised, cast to eight bits, or on a disk.
    """
    return " ".join(f"{name}:{_hash(network, dtype)}" for name, dtype in _PRECISIONS.items())


def same_base(one: str, other: str) -> bool:
    """Return whether two identities are of the same weights, in whatever precision each was loaded."""
    return bool(set(one.split()) & set(other.split()))


def held(module: nn.Module, name: str, value: Tensor) -> Tensor:
    """Return a tensor of a module's own, which offloading may keep elsewhere while the module has none.

    Raises:
        ValueError: if it is nowhere to be found.
    """
    if value.device.type == "meta":
        kept = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        value = value if kept is None else kept[name]
    if value.device.type == "meta":
        raise ValueError(
            f"weights must be at hand to be read, got {name!r} of {type(module).__name__} on the meta device without "
            "them; load the pipeline's weights first"
        )
    return value


def _hash(network: Any, dtype: torch.dtype) -> str:
    digest = hashlib.blake2b(digest_size=_DIGITS // 2)
    for name, value in sorted(_own(network), key=lambda item: item[0]):
        digest.update(f"{name} {tuple(value.shape)};".encode())
        digest.update(value.detach().to("cpu", dtype).contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _own(network: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that the network was trained as, by name."""
    network = getattr(network, "_orig_mod", network)
    if getattr(network, "hf_quantizer", None) is not None:
        raise _unreadable(network, "quantised ones")
    registries = [part._diffusers_hook for part in network.modules() if hasattr(part, "_diffusers_hook")]
    hooks = [hook for registry in registries for hook in registry.hooks.values()]
    if any(getattr(getattr(hook, "group", None), "offload_to_disk_path", None) for hook in hooks):
        raise _unreadable(network, "nothing in memory, but files on a disk,")
    added: set[int] = set()
    for place, module in network.named_modules():
        if place.rpartition(".")[2] == "processor" or isinstance(module, _IMAGE_PROMPTS):
            added |= {id(part) for part in module.modules()}
        for joint, single in _JOINT.items():
            if isinstance(getattr(module, joint, None), nn.Module) and hasattr(module, single):
                added |= {id(part) for part in getattr(module, joint).modules()}
    for place, module in network.named_modules(remove_duplicate=False):
        path = [part for part in place.split(".") if part not in ("", "base_layer", "_orig_mod")]
        if id(module) in added or any(part.startswith("lora_") for part in path):
            continue
        kept = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        kept |= {
            name: value
            for name, value in module.named_buffers(recurse=False)
            if name not in module._non_persistent_buffers_set
        }
        for name, value in kept.items():
            if type(value) not in _PLAIN or (value.is_floating_point() and value.dtype not in _WHOLE):
                raise _unreadable(network, f"{type(value).__name__} of {value.dtype} in {'.'.join(path)}")
            yield ".".join([*path, name]), held(module, name, value)


def _unreadable(network: Any, given: str) -> ValueError:
    return ValueError(
        f"a base is told by its weights as they were trained, got {given} in {type(network).__name__}; load it in "
        "float32, float16 or bfloat16, and quantise, cast or offload it after the members"
    )
