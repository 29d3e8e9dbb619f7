"""Which adapters are active: the one place that knows a network's adapted layers and writes peft's list in them.

With adapters i of factors A_i, B_i and scales s_i, a layer of weight W computes W x + sum_i s_i B_i A_i x over its
*active* adapters. Switching is writing one list in each adapted layer; peft's own ``set_adapter`` also touches every
parameter's ``requires_grad`` and costs milliseconds.

Source: Hu et al. 2106.09685 (LoRA).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain

from diffusers.models.attention_processor import Attention
from diffusers.models.cache_utils import CacheMixin
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

ACTIVE, _DISABLED = "_active_adapter", "_disable_adapters"  # peft's attributes
_ABSENT = object()


def adapted_layers(modules: Iterable[nn.Module]) -> list[BaseTunerLayer]:
    """Return the layers of some networks that carry adapters."""
    return [layer for module in modules for layer in module.modules() if isinstance(layer, BaseTunerLayer)]


def deactivate(modules: Iterable[nn.Module], adapter: str) -> None:
    """Take an adapter from the active ones of every layer; peft would activate another in place of a deleted one."""
    for layer in adapted_layers(modules):
        layer.__dict__[ACTIVE] = [name for name in layer.active_adapters if name != adapter]


def activity_of(modules: Collection[nn.Module]) -> Callable[[], None]:
    """Return what makes the adapters active again that are so now, and no others: loading one activates it."""
    before = {layer: list(layer.active_adapters) for layer in adapted_layers(modules)}

    def restore() -> None:
        for layer in adapted_layers(modules):
            layer.__dict__[ACTIVE] = before.get(layer, [])

    return restore


def freeze(modules: Iterable[nn.Module], adapters: Collection[str]) -> None:
    """Let no gradient reach the factors of some adapters."""
    for layer in adapted_layers(modules):
        for holder in (getattr(layer, name, {}) for name in layer.adapter_layer_names):
            for name in adapters:
                if name in holder:
                    holder[name].requires_grad_(False)


def evaluate_only(parts: Iterable[nn.Module]) -> Callable[[], None]:
    """Put parts of networks in evaluation mode, where the dropout of their training is off.

    Returns:
        what puts those back in training mode that were in it.
    """
    trained = [part for part in parts if part.training]
    for part in trained:
        part.__dict__["training"] = False  # past nn.Module.__setattr__, which is slow

    def restore() -> None:
        for part in trained:
            part.__dict__["training"] = True

    return restore


def with_dropout(layers: Iterable[BaseTunerLayer]) -> list[nn.Module]:
    """Return adapted layers and the dropout of their adapters."""
    return [part for layer in layers for part in chain([layer], getattr(layer, "lora_dropout", {}).values())]


class AdapterSwitch:
    """Chooses the active adapter of every adapted layer of some networks, in microseconds.

    Adapters that were active before and are no members (an acceleration LoRA, say) stay active for all: they
    belong to the base.

    Args:
        modules: networks with adapters injected; their layers are listed once, here.
        members: names of the adapters that are switched.
    """

    def __init__(self, modules: Iterable[nn.Module], members: Collection[str]) -> None:
        self.layers = adapted_layers(modules)
        self.members = frozenset(members)
        self._parts = with_dropout(self.layers)
        self._background: list[list[str]] = [[] for _ in self.layers]
        self._lists: dict[tuple[str, ...], list[list[str]]] = {}

    @contextmanager
    def borrowed(self) -> Iterator[AdapterSwitch]:
        """Allow ``use`` inside, in evaluation mode; every layer is as before afterwards, whatever happens."""
        saved = [{name: layer.__dict__.get(name, _ABSENT) for name in (ACTIVE, _DISABLED)} for layer in self.layers]
        background = [
            [] if values[_DISABLED] is True else [n for n in _listed(values[ACTIVE], layer) if n not in self.members]
            for layer, values in zip(self.layers, saved, strict=True)
        ]
        if background != self._background:
            self._background, self._lists = background, {}
        train = evaluate_only(self._parts)
        try:
            self.use()
            yield self
        finally:
            train()
            for layer, values in zip(self.layers, saved, strict=True):
                for name, value in values.items():
                    if value is _ABSENT:
                        layer.__dict__.pop(name, None)
                    else:
                        layer.__dict__[name] = value

    def use(self, *names: str) -> None:
        """Make these adapters active (none: the base), in addition to the background's."""
        lists = self._lists.get(names)
        if lists is None:
            lists = self._lists[names] = [[*background, *names] for background in self._background]
        for layer, value in zip(self.layers, lists, strict=True):
            # past nn.Module.__setattr__, which would cost more than the whole switch
            layer.__dict__[ACTIVE] = value
            layer.__dict__[_DISABLED] = False

    def background_of(self, layer: BaseTunerLayer) -> list[str]:
        """Return the adapters that stay active in a layer whatever is chosen."""
        return self._background[self.layers.index(layer)]


def _listed(active: object, layer: BaseTunerLayer) -> list[str]:
    """Return a layer's active adapters; its own property, which is slow, where they are no list."""
    return active if isinstance(active, list) else layer.active_adapters


def check_unfused(owner: object, modules: Iterable[nn.Module]) -> None:
    """Raise if a network is in a state in which switching adapters would silently do the wrong thing.

    Args:
        owner: the pipeline, for messages.
        modules: its networks.

    Raises:
        ValueError: merged adapters, fused projections, or layers that keep something from one pass to the next.
    """
    name = type(owner).__name__
    for module in modules:
        for place, part in module.named_modules():
            if isinstance(part, BaseTunerLayer) and part.merged:
                raise ValueError(
                    f"a blend needs adapters apart from the weights, got {', '.join(part.merged_adapters)} fused into "
                    f"{name}; call unfuse_lora() first"
                )
            if _fused(part):
                raise ValueError(
                    f"a blend needs the projections that adapters address, got fused ones in {name}; "
                    "call unfuse_qkv_projections() first"
                )
            kept = _keeper(part) or ("a forward put in its place" if place and _replaced(part) else None)
            if kept is not None:
                raise ValueError(
                    f"a blend needs every member computed, got {kept} in {place or type(part).__name__} of {name}, "
                    "which may hand one member what another left; call disable_cache(), or remove its hooks"
                )


def _fused(part: nn.Module) -> bool:
    """Whether a layer computes with joint projections: the older attention goes by its processor, not by its mark."""
    if not part.__dict__.get("fused_projections", False):
        return False
    return not isinstance(part, Attention) or "Fused" in type(part.processor).__name__


def _keeper(part: nn.Module) -> str | None:
    """Return what keeps results of a layer from one pass to the next, as every cache of diffusers does in a hook."""
    if isinstance(part, CacheMixin) and part.is_cache_enabled:
        return "a cache"
    hooks = getattr(part.__dict__.get("_diffusers_hook"), "hooks", {})
    # a cache's leader says that it has a state, its followers share the leader's
    kept = [hook for hook in hooks.values() if hook._is_stateful or hasattr(hook, "state_manager")]
    return f"the cache {type(kept[0]).__name__}" if kept else None


def _replaced(part: nn.Module) -> bool:
    """Whether somebody put a function in place of a layer's forward, other than offloading, hooks and compilation."""
    own = part.__dict__.get("forward")
    # offloading, when it is taken off, leaves the layer's own forward there
    known = own is None or getattr(own, "__func__", None) is type(part).forward
    return not known and not any(hasattr(part, name) for name in ("_hf_hook", "_diffusers_hook", "_orig_mod"))
