"""Several adapters on one network: switching between them, averaging them, running them side by side.

With adapters i of factors A_i, B_i and scales s_i, a layer of weight W computes W x + sum_i s_i B_i A_i x over
its *active* adapters. So

* switching is writing one list in each adapted layer (peft's own ``set_adapter`` also touches every
  parameter's ``requires_grad`` and costs milliseconds);
* the exact soup, W + sum_i c_i s_i B_i A_i, is all adapters active with their scales multiplied by c_i;
* the soup of factors, W + (sum_i c_i s_i B_i)(sum_i c_i A_i), is what averaging the parameters of LoRA
  files gives; it shrinks member i to about c_i^2 and has cross terms between members;
* side by side, a batch of K equal parts in which part k sees adapter k, is one batched product
  (K, N, in) (K, in, r) (K, r, out) added to one pass of the base.

Source: Wortsman et al. 2203.05482 and Rame et al. 2306.04488 for soups; Hu et al. 2106.09685 for LoRA.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

FACTOR_SOUP = "soup-factors"
_ABSENT = object()


class AdapterSwitch:
    """Chooses the active adapter of every adapted layer of some networks, in microseconds.

    Adapters that were active before and are no members (an acceleration LoRA, say) stay active for all: they
    belong to the base.

    Args:
        modules: networks with adapters injected; their layers are listed once, here.
        members: names of the adapters that are switched.
    """

    def __init__(self, modules: Iterable[nn.Module], members: Collection[str]) -> None:
        self.layers = [m for module in modules for m in module.modules() if isinstance(m, BaseTunerLayer)]
        self.members = frozenset(members)
        self._background: list[list[str]] = [[] for _ in self.layers]
        self._lists: dict[tuple[str, ...], list[list[str]]] = {}

    @contextmanager
    def borrowed(self) -> Iterator[AdapterSwitch]:
        """Allow ``use`` inside; every layer is as before afterwards, whatever happens."""
        saved = [
            (layer.__dict__.get("_active_adapter", _ABSENT), layer.__dict__.get("_disable_adapters", _ABSENT))
            for layer in self.layers
        ]
        background = [
            [] if layer.disable_adapters else [n for n in layer.active_adapters if n not in self.members]
            for layer in self.layers
        ]
        if background != self._background:
            self._background, self._lists = background, {}
        try:
            for layer in self.layers:
                layer.__dict__["_disable_adapters"] = False
            self.use()
            yield self
        finally:
            for layer, values in zip(self.layers, saved, strict=True):
                for name, value in zip(("_active_adapter", "_disable_adapters"), values, strict=True):
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
            layer.__dict__["_active_adapter"] = value

    def background_of(self, layer: BaseTunerLayer) -> list[str]:
        """Return the adapters that stay active in a layer whatever is chosen."""
        return self._background[self.layers.index(layer)]


def check_unfused(pipe_name: str, modules: Iterable[nn.Module]) -> None:
    """Raise if a network is in a state in which switching adapters would silently do the wrong thing.

    Raises:
        ValueError: merged adapters, fused projections, or a cache that skips computations.
    """
    for module in modules:
        if getattr(module, "is_cache_enabled", False):
            raise ValueError(f"a blend needs every member computed, got a cache on {pipe_name}; call disable_cache()")
        for part in module.modules():
            if isinstance(part, BaseTunerLayer) and part.merged:
                raise ValueError(
                    f"a blend needs adapters apart from the weights, got {', '.join(part.merged_adapters)} fused into "
                    f"{pipe_name}; call unfuse_lora() first"
                )
            if getattr(part, "fused_projections", False):
                raise ValueError(
                    f"a blend needs the projections that adapters address, got fused ones in {pipe_name}; "
                    "call unfuse_qkv_projections() first"
                )


@contextmanager
def delta_soup(switch: AdapterSwitch, coefficients: Mapping[str, float]) -> Iterator[None]:
    """Run with the average of the members' changes, W + sum_i c_i s_i B_i A_i; exact.

    Args:
        switch: a borrowed switch.
        coefficients: adapter -> c_i.
    """
    _check_plain(switch.layers, coefficients)
    used = {name: c for name, c in coefficients.items() if c != 0}
    saved = [(layer, name, layer.scaling[name]) for layer in switch.layers for name in used if name in layer.scaling]
    try:
        for layer, name, scale in saved:
            layer.scaling[name] = scale * used[name]
        switch.use(*used)
        yield
    finally:
        for layer, name, scale in saved:
            layer.scaling[name] = scale
        switch.use()


@contextmanager
def factor_soup(switch: AdapterSwitch, coefficients: Mapping[str, float]) -> Iterator[None]:
    """Run with averaged factors, W + (sum_i c_i s_i B_i)(sum_i c_i A_i), as averaging LoRA files does.

    Args:
        switch: a borrowed switch.
        coefficients: adapter -> c_i.

    Raises:
        ValueError: members of different ranks, whose factors cannot be averaged.
    """
    _check_plain(switch.layers, coefficients)
    made: list[Any] = []
    try:
        for layer in switch.layers:
            names = [name for name in coefficients if name in layer.lora_A]
            if not names:
                continue
            ranks = {name: layer.r[name] for name in names}
            if len(set(ranks.values())) > 1:
                raise ValueError(f"a soup of factors needs members of one rank, got {ranks}; use mode='soup'")
            made.append(layer)
            for factors, scales in (
                (layer.lora_A, {n: coefficients[n] for n in names}),
                (layer.lora_B, {n: coefficients[n] * layer.scaling[n] for n in names}),
            ):
                mean = copy.deepcopy(factors[names[0]]).requires_grad_(False)
                mean.weight.copy_(sum(factors[n].weight.detach() * c for n, c in scales.items()))
                factors[FACTOR_SOUP] = mean
            layer.lora_dropout[FACTOR_SOUP] = nn.Identity()
            layer.scaling[FACTOR_SOUP] = 1.0
        switch.use(FACTOR_SOUP)
        yield
    finally:
        for layer in made:
            for holder in (layer.lora_A, layer.lora_B, layer.lora_dropout, layer.scaling):
                if FACTOR_SOUP in holder:
                    del holder[FACTOR_SOUP]
        switch.use()


SOUPS: dict[str, Callable[[AdapterSwitch, Mapping[str, float]], Any]] = {
    "soup": delta_soup,
    "soup-factors": factor_soup,
}


class SideBySide:
    """One pass of the base for K members: part k of the batch sees adapter k.

    Args:
        switch: a borrowed switch; layers that are no plain LoRA of Linear or Conv2d are refused.
    """

    def __init__(self, switch: AdapterSwitch) -> None:
        _check_plain(switch.layers, switch.members)
        self.switch = switch
        self._stacked: dict[tuple[int, tuple[str | None, ...]], tuple[Tensor, Tensor]] = {}

    @contextmanager
    def parts(self, names: Sequence[str | None]) -> Iterator[None]:
        """Inside, a batch consists of ``len(names)`` equal parts; None is the base."""
        key = tuple(names)
        try:
            for position, layer in enumerate(self.switch.layers):
                layer.__dict__["forward"] = self._forward(position, layer, key)
            yield
        finally:
            for layer in self.switch.layers:
                layer.__dict__.pop("forward", None)

    def _forward(self, position: int, layer: Any, names: tuple[str | None, ...]) -> Callable[..., Tensor]:
        background = self.switch.background_of(layer)

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            result = layer.base_layer(x, *args, **kwargs)
            for name in background:
                if name in layer.lora_A:
                    result = result + layer.lora_B[name](layer.lora_A[name](x)) * layer.scaling[name]
            if not any(name in layer.lora_A for name in names if name is not None):
                return result
            if len(x) % len(names):
                raise ValueError(
                    f"members side by side need a batch of {len(names)} equal parts in every adapted layer, got "
                    f"{len(x)} rows; use batched=False"
                )
            if isinstance(layer.base_layer, nn.Linear):
                down, up = self._factors(position, layer, names)
                h = x.to(down.dtype).reshape(len(names), -1, x.shape[-1])
                return result + (h @ down @ up).reshape(result.shape).to(result.dtype)
            parts = [
                layer.lora_B[n](layer.lora_A[n](part)) * layer.scaling[n] if n in layer.lora_A else None
                for n, part in zip(names, x.chunk(len(names)), strict=True)
            ]
            zero = torch.zeros_like(next(p for p in parts if p is not None))
            return result + torch.cat([zero if p is None else p for p in parts])

        return forward

    def _factors(self, position: int, layer: Any, names: tuple[str | None, ...]) -> tuple[Tensor, Tensor]:
        """Return (K, in, r) and (K, r, out), zero for the base and padded to the largest rank."""
        key = (position, names)
        if key not in self._stacked:
            some = next(layer.lora_A[n].weight for n in names if n in layer.lora_A)
            rank = max(layer.r[n] for n in names if n in layer.lora_A)
            down = some.new_zeros(len(names), layer.base_layer.in_features, rank)
            up = some.new_zeros(len(names), rank, layer.base_layer.out_features)
            with torch.no_grad():
                for k, name in enumerate(names):
                    if name in layer.lora_A:
                        down[k, :, : layer.r[name]] = layer.lora_A[name].weight.T
                        up[k, : layer.r[name]] = layer.lora_B[name].weight.T * layer.scaling[name]
            self._stacked[key] = down, up
        return self._stacked[key]


def _check_plain(layers: Sequence[BaseTunerLayer], names: Iterable[str]) -> None:
    for layer in layers:
        for name in names:
            if name not in getattr(layer, "lora_A", {}):
                if name in layer.active_adapters and not isinstance(layer, LoraLayer):
                    raise ValueError(f"a soup or a batch of members needs LoRA adapters, got {type(layer).__name__}")
                continue
            base = layer.get_base_layer()
            if name in layer.lora_variant or layer.lora_bias.get(name) or not isinstance(base, nn.Linear | nn.Conv2d):
                raise ValueError(
                    f"a soup or a batch of members needs plain LoRA on linear or convolution layers, got {name!r} on "
                    f"{type(base).__name__}; use mode='mpa' with batched=False"
                )
