"""Several adapters in one pass of the base: each has a part of the batch.

A batch of K equal parts in which part k sees adapter k is one batched product (K, N, in) (K, in, r) (K, r, out) in each
layer, added to one pass of the base.

Source: Hu et al. 2106.09685 (LoRA).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stablediffusion.adapters.soups import check_plain
from stablediffusion.adapters.switch import ACTIVE, AdapterSwitch


class SideBySide:
    """One pass of the base for K members: part k of the batch sees adapter k.

    Args:
        switch: a borrowed switch; layers that are no plain LoRA of Linear or Conv2d are refused.
    """

    def __init__(self, switch: AdapterSwitch) -> None:
        check_plain(switch.layers, switch.members)
        self.switch = switch
        self._stacked: dict[tuple[int, tuple[str | None, ...]], tuple[list[int], Tensor, Tensor]] = {}

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
        own = type(layer).forward
        background = self.switch.background_of(layer)

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            # the base with what stays active for all, of whatever kind, as peft computes it
            active = layer.__dict__[ACTIVE]
            layer.__dict__[ACTIVE] = background
            try:
                result: Tensor = own(layer, x, *args, **kwargs)
            finally:
                layer.__dict__[ACTIVE] = active
            if not any(name in layer.lora_A for name in names if name is not None):
                return result
            if len(x) % len(names):
                raise ValueError(
                    f"members side by side need a batch of {len(names)} equal parts in every adapted layer, got "
                    f"{len(x)} rows; use batched=False"
                )
            if isinstance(layer.get_base_layer(), nn.Linear):
                down, up = self._factors(position, layer, names)
                # the scales are read now: a call's own scale or new weights of adapters change them
                scales = up.new_tensor([layer.scaling[n] if n in layer.lora_A else 0.0 for n in names])
                h = x.to(down.dtype).reshape(len(names), -1, x.shape[-1])
                return result + ((h @ down) * scales[:, None, None] @ up).reshape(result.shape).to(result.dtype)
            parts = [
                layer.lora_B[n](layer.lora_A[n](part)) * layer.scaling[n] if n in layer.lora_A else None
                for n, part in zip(names, x.chunk(len(names)), strict=True)
            ]
            zero = torch.zeros_like(next(p for p in parts if p is not None))
            return result + torch.cat([zero if p is None else p for p in parts])

        return forward

    def _factors(self, position: int, layer: Any, names: tuple[str | None, ...]) -> tuple[Tensor, Tensor]:
        """Return (K, in, r) and (K, r, out) without their scales, zero for the base and padded to the largest rank."""
        weights = [part[n].weight for n in names if n in layer.lora_A for part in (layer.lora_A, layer.lora_B)]
        # another file may be loaded in place of an adapter's
        state = [0 if w.is_inference() else w._version for w in weights]
        key = (position, names)
        if key not in self._stacked or self._stacked[key][0] != state:
            some = weights[0]
            rank = max(layer.r[n] for n in names if n in layer.lora_A)
            base = layer.get_base_layer()
            down = some.new_zeros(len(names), base.in_features, rank)
            up = some.new_zeros(len(names), rank, base.out_features)
            with torch.no_grad():
                for k, name in enumerate(names):
                    if name in layer.lora_A:
                        down[k, :, : layer.r[name]] = layer.lora_A[name].weight.T
                        up[k, : layer.r[name]] = layer.lora_B[name].weight.T
            self._stacked[key] = state, down, up
        return self._stacked[key][1:]
