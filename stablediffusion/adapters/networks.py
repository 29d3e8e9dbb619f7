"""Whole networks as members: each must answer the pipeline's calls as the pipeline's own denoiser does.

A network that was tuned in full takes the denoiser's place for its member's predictions. What was put on the denoiser
alone (an image prompt, FreeU, an acceleration LoRA, hooks) acts on the other members and not on it, and what it cannot
take (another dtype, another device, other inputs) fails deep inside; both are told on entry.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from stablediffusion.adapters.switch import adapted_layers
from stablediffusion.pipelines.components import denoisers_of

# settings of a network's inside: members may differ in them and still answer the same calls
_INSIDE = {
    "sample_size", "down_block_types", "mid_block_type", "up_block_types", "block_out_channels", "layers_per_block",
    "transformer_layers_per_block", "attention_head_dim", "num_attention_heads", "num_layers", "num_single_layers",
    "norm_num_groups", "norm_eps", "act_fn", "dropout", "use_linear_projection", "only_cross_attention",
    "upcast_attention", "mid_block_only_cross_attention", "reverse_transformer_layers_per_block",
}  # fmt: skip
# ways to compute one and the same attention
_PLAIN_ATTENTION = ("AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor", "SlicedAttnProcessor")
_FREEU = ("s1", "s2", "b1", "b2")
# hooks that decide where and how weights lie, and change no computation
_WHERE_HOOKS = (
    "GroupOffloadingHook",
    "LazyPrefetchGroupOffloadingHook",
    "LayerExecutionTrackerHook",
    "LayerwiseCastingHook",
)


def check_network(pipe: Any, name: str, network: nn.Module, members: Collection[str] = ()) -> None:
    """Raise unless a whole network can stand in for a pipeline's denoiser as the pipeline is now.

    Args:
        pipe: the pipeline.
        name: the member's.
        network: its network.
        members: adapters that are members of the same blend; others that are active belong to the base.

    Raises:
        ValueError: for a pipeline of two denoisers, another class, inputs, dtype or device; for dropout that is on; and
            for whatever acts on the denoiser and not on the network.
    """
    denoisers = denoisers_of(pipe)
    if len(denoisers) > 1:
        raise ValueError(
            f"a whole network can be a member where there is one denoiser, got {name!r} for a {type(pipe).__name__} "
            f"with {', '.join(denoisers)}; give LoRA files"
        )
    own, network = (getattr(part, "_orig_mod", part) for part in (next(iter(denoisers.values())), network))
    if type(network) is not type(own):
        raise _refused(name, f"be a {type(own).__name__}", f"a {type(network).__name__}", "give a network of its class")
    for what, found in _ON_TOP.items():
        here, there = found(own), found(network)
        if here != there:
            raise _refused(
                name, f"have the {what} of the pipeline's denoiser", _difference(here, there), "put the same on both"
            )
    background = _adapters(own) - _adapters(network) - set(members)
    if background:
        raise _refused(
            name, "have the adapters that belong to the base", f"no {min(background)}", "load it into that network too"
        )
    config, other = (_outer(part) for part in (own, network))
    differ = sorted(key for key in {*config, *other} if config.get(key) != other.get(key))
    if differ:
        told = ", ".join(f"{key} {other.get(key)} for {config.get(key)}" for key in differ[:3])
        raise _refused(name, "take and give what the denoiser does", told, "give a network of this model family")
    if network.dtype != own.dtype:
        raise _refused(name, f"be in {own.dtype}", str(network.dtype), "move one of them with to(dtype)")
    device = torch.device(pipe._execution_device)
    if not hasattr(network, "_hf_hook") and network.device.type != device.type:
        raise _refused(name, f"be on {device}", str(network.device), f"move it with to({str(device)!r})")
    if any(isinstance(part, nn.Dropout) and part.training and part.p > 0 for part in network.modules()):
        raise _refused(name, "be in evaluation mode", "dropout that is on", "call eval() on it")
    if hasattr(pipe, "pag_applied_layers"):
        raise _refused(
            name, "be called as the denoiser is", "a pipeline that changes its denoiser's attention", "give LoRA files"
        )


def _outer(network: Any) -> dict[str, Any]:
    """Return the settings that a call of the network depends on."""
    return {key: value for key, value in network.config.items() if not key.startswith("_") and key not in _INSIDE}


def _refused(name: str, required: str, given: str, advice: str) -> ValueError:
    return ValueError(f"member {name!r}, a whole network, must {required}, got {given}; {advice}")


def _difference(here: set[str], there: set[str]) -> str:
    parts = [f"{verb} {min(some)}" for verb, some in (("no", here - there), ("also", there - here)) if some]
    return " and ".join(parts)


def _processors(network: nn.Module) -> set[str]:
    """Return the kinds of attention, ways to compute the usual one aside."""
    kinds = {type(p).__name__.replace("Fused", "") for p in getattr(network, "attn_processors", {}).values()}
    return {kind for kind in kinds if kind not in _PLAIN_ATTENTION}


def _free(network: nn.Module) -> set[str]:
    """Return FreeU's factors, which ``disable_freeu`` sets to None."""
    blocks = getattr(network, "up_blocks", ())
    return {f"{name}={getattr(block, name)}" for block in blocks for name in _FREEU if getattr(block, name, None)}


def _hooks(network: nn.Module) -> set[str]:
    """Return the hooks that change what layers compute, diffusers' and torch's."""
    found = set()
    for place, part in network.named_modules():
        registered = getattr(getattr(part, "_diffusers_hook", None), "hooks", {}).values()
        kinds = {type(hook).__name__ for hook in registered} - set(_WHERE_HOOKS)
        kinds |= {type(hook).__name__ for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values())}
        found |= {f"{kind} in {place or type(part).__name__}" for kind in kinds}
    return found


def _adapters(network: nn.Module) -> set[str]:
    """Return the adapters that are active now."""
    layers: list[BaseTunerLayer] = [layer for layer in adapted_layers([network]) if not layer.disable_adapters]
    return {name for layer in layers for name in layer.active_adapters}


_ON_TOP: dict[str, Callable[[nn.Module], set[str]]] = {
    "attention": _processors,
    "FreeU": _free,
    "hooks": _hooks,
}
