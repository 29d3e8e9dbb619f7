"""Soups: several adapters averaged into one network, the baseline that blends are compared with.

* The exact soup, W + sum_i c_i s_i B_i A_i, is all adapters active with their scales multiplied by c_i.
* The soup of factors, W + (sum_i c_i s_i B_i)(sum_i c_i A_i), is what averaging the parameters of LoRA files gives; it
  shrinks member i to about c_i^2 and has cross terms between members.

Source: Wortsman et al. 2203.05482 and Rame et al. 2306.04488.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from stablediffusion.adapters.switch import AdapterSwitch

FACTOR_SOUP = "soup-factors"


@contextmanager
def delta_soup(switch: AdapterSwitch, coefficients: Mapping[str, float]) -> Iterator[None]:
    """Run with the average of the members' changes, W + sum_i c_i s_i B_i A_i; exact.

    Args:
        switch: a borrowed switch.
        coefficients: adapter -> c_i.
    """
    check_plain(switch.layers, coefficients)
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
    check_plain(switch.layers, coefficients)
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


def check_plain(layers: Sequence[BaseTunerLayer], names: Iterable[str]) -> None:
    """Raise unless these adapters are plain LoRA, whose factors can be averaged or stacked.

    Raises:
        ValueError: another kind of adapter, or of layer, or factors that offloading keeps elsewhere.
    """
    for layer in layers:
        for name in names:
            if name not in getattr(layer, "lora_A", {}):
                if name in layer.active_adapters and not isinstance(layer, LoraLayer):
                    raise ValueError(f"a soup or a batch of members needs LoRA adapters, got {type(layer).__name__}")
                continue
            if layer.lora_A[name].weight.device.type == "meta":
                raise ValueError(
                    f"a soup or a batch of members needs its factors at hand, got those of {name!r} offloaded from "
                    "layer to layer; use mode='mpa' with batched=False, or another way of offloading"
                )
            base = layer.get_base_layer()
            if name in layer.lora_variant or layer.lora_bias.get(name) or not isinstance(base, nn.Linear | nn.Conv2d):
                raise ValueError(
                    f"a soup or a batch of members needs plain LoRA on linear or convolution layers, got {name!r} on "
                    f"{type(base).__name__}; use mode='mpa' with batched=False"
                )
