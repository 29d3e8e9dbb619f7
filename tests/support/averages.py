"""The oracle of blends on pipelines: a denoiser whose weights are set to each member's in turn, outputs averaged.

It shares no line with the package: LoRA files are read with safetensors, their changes added to the weights by hand,
and the pipeline is called as it is, with every denoiser's forward replaced. Rows of a pass are B images in each of its
branches, so row r is of image r modulo B.
"""

from __future__ import annotations

import copy
import json
from contextlib import contextmanager

import torch
from safetensors import safe_open

DENOISERS = ("unet", "transformer", "transformer_2")


def factors(path):
    """Return what a LoRA file says of each layer: component -> layer -> (B times alpha / rank, A), float64."""
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key).double() for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["lora_adapter_metadata"])
    found = {}
    for key, down in tensors.items():
        if key.endswith(".lora_A.weight"):
            component, layer = key.removesuffix(".lora_A.weight").split(".", 1)
            scale = config[f"{component}.lora_alpha"] / config[f"{component}.r"]
            up = tensors[key.replace("lora_A", "lora_B")]
            found.setdefault(component, {})[layer] = (scale * up, down)
    assert len(tensors) == 2 * sum(len(layers) for layers in found.values())
    return found


class Oracle:
    """Averages on a pipeline that carries no adapters yet, or is called while none is active.

    Args:
        pipe: the pipeline; its layers may be wrapped by peft later.
        paths: LoRA files of the members.

    Attributes:
        rows: of every pass of the last run, by denoiser.
    """

    def __init__(self, pipe, paths):
        self.pipe, self.rows = pipe, {}
        self.networks = {name: getattr(pipe, name) for name in DENOISERS if getattr(pipe, name, None) is not None}
        self.factors = [factors(path) for path in paths]
        assert all(set(found) == set(self.networks) for found in self.factors)
        layers = {name: set().union(*(f[name] for f in self.factors)) for name in self.networks}
        modules = {name: dict(network.named_modules()) for name, network in self.networks.items()}
        self.weights = {name: {layer: modules[name][layer].weight for layer in layers[name]} for name in layers}
        self.base = {n: {layer: w.detach().clone() for layer, w in ws.items()} for n, ws in self.weights.items()}

    def alone(self, name, member):
        """Return the weights of the base (0) or of a member (from 1), by layer."""
        return self.soup(name, [float(k == member) for k in range(1, len(self.factors) + 1)])

    def soup(self, name, shares):
        """Return the base's weights and the members' changes times their shares."""
        changed = {layer: weight.double() for layer, weight in self.base[name].items()}
        for share, found in zip(shares, self.factors, strict=True):
            for layer, (up, down) in found[name].items():
                changed[layer] = changed[layer] + share * up @ down
        return changed

    def soup_of_factors(self, name, shares):
        """Return the base's weights and the product of the averaged factors."""
        changed = {}
        for layer, weight in self.base[name].items():
            ups, downs = zip(*(found[name][layer] for found in self.factors), strict=True)
            up, down = (sum(s * part for s, part in zip(shares, parts, strict=True)) for parts in (ups, downs))
            changed[layer] = weight.double() + up @ down
        return changed

    def __call__(self, call, networks, weights):
        """Run the pipeline on averages.

        Args:
            call: runs the pipeline.
            networks: component -> weights by layer of each network.
            weights: step -> weight of each network, (K,), or (B, K) for B images.
        """
        step = [0]
        taken = type(self.pipe.scheduler).step

        def counted(*args, **kwargs):
            step[0] += 1
            return taken(self.pipe.scheduler, *args, **kwargs)

        self.rows = {name: [] for name in self.networks}
        with contextmanager(self._patched)(networks, lambda: weights(step[0])):
            self.pipe.scheduler.step = counted
            try:
                return call()
            finally:
                del self.pipe.scheduler.step

    def _patched(self, networks, weights):
        try:
            for name, network in self.networks.items():
                network.forward = self._averaged(name, network, networks[name], weights)
            yield
        finally:
            for name, network in self.networks.items():
                del network.forward
                self._set(name, self.base[name])

    def _averaged(self, name, network, changed, weights):
        def forward(*args, **kwargs):
            outputs, now = [], torch.as_tensor(weights(), dtype=torch.float64)
            for k, layers in enumerate(changed):
                if bool((now[..., k] != 0).any()):
                    self._set(name, layers)
                    own = copy.deepcopy((args, kwargs)) if k + 1 < len(changed) else (args, kwargs)
                    outputs.append((now[..., k], type(network).forward(network, *own[0], **own[1])))
            self.rows[name].append(self._count(outputs[0][1]))
            return self._mean([out for _, out in outputs], [w for w, _ in outputs])

        return forward

    def _set(self, name, layers):
        with torch.no_grad():
            for layer, weight in self.weights[name].items():
                weight.copy_(layers[layer])

    def _count(self, given):
        """Return the number of rows of an output."""
        if isinstance(given, torch.Tensor):
            return len(given)
        first = given[0]
        return len(first) if isinstance(first, list | torch.Tensor) else self._count(first)

    def _mean(self, given, weights, rows=None):
        """Return the average of outputs, whatever they are made of; a list has an entry a row."""
        first = given[0]
        if isinstance(first, torch.Tensor):
            shares = [self._shares(w, len(first)).view(-1, *[1] * (first.ndim - 1)) for w in weights]
            return sum(s.to(out) * out for s, out in zip(shares, given, strict=True))
        if isinstance(first, list):
            entries = []
            for r, parts in enumerate(zip(*given, strict=True)):
                shares = [self._shares(w, len(first))[r] for w in weights]
                entries.append(sum(s.to(p) * p for s, p in zip(shares, parts, strict=True)))
            return entries
        if isinstance(first, tuple):
            return tuple(self._mean(list(parts), weights) for parts in zip(*given, strict=True))
        return type(first)(sample=self._mean([out.sample for out in given], weights))

    @staticmethod
    def _shares(weight, rows):
        """Return a weight a row: that of the row's image."""
        return weight.expand(rows) if weight.ndim == 0 else weight.repeat(rows // len(weight))
