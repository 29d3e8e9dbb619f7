"""LoRA files on a pipeline: loaded whole with the strength that the file says, or not at all; saved; removed.

diffusers loads files of layouts that it does not know as *nothing*, leaves out what it cannot place with a warning, and
takes an alpha of one layer for another's where they differ. So what a file says is read here (``layouts``), names of
other trainers are translated by the pipeline's own loader and found again in the file (``conversion``), and each layer
gets a rank and an alpha of its own; afterwards each holds its factors and its scale, or the adapter is removed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, SequentialHook, remove_hook_from_module
from diffusers.utils.peft_utils import delete_adapter_layers, recurse_remove_peft_layers
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from stablediffusion.adapters.conversion import converted
from stablediffusion.adapters.files import COMPONENTS, LoraFile, Source, check_target, read_lora, write_lora
from stablediffusion.adapters.layouts import Change, changes_of, layer_of, settings_of, some, where_of
from stablediffusion.adapters.switch import activity_of, adapted_layers, deactivate
from stablediffusion.pipelines.components import denoisers_of, lora_components
from stablediffusion.pipelines.identity import held
from stablediffusion.pipelines.loading import no_false_alarms

# component -> layer -> what the adapter does there
Placed = dict[str, dict[str, Change]]


def load_lora(pipe: Any, source: Source | Mapping[str, Source], adapter: str) -> tuple[str, ...]:
    """Load a LoRA of any layout as an adapter, whole and with its own strength.

    A file whose names have a component goes there; one whose names have none goes where all of its layers are. Where
    two networks have them, as the transformers of Wan 2.2 for high and for low noise, say which:
    ``{"transformer": "high.safetensors", "transformer_2": "low.safetensors"}``, or one of the two.

    Args:
        pipe: a diffusers pipeline.
        source: see ``read_lora``; or a file for each of some components, by the component's name.
        adapter: name of the new adapter, without ".".

    Returns:
        the components that have it, e.g. ("unet", "text_encoder").

    Raises:
        ValueError: for a name that is taken or has a ".", for anything in the file that the pipeline has no place for,
            or a place that is not clear; the pipeline is left without the adapter.
    """
    if not adapter or "." in adapter:
        raise ValueError(f"an adapter name must be non-empty and without '.', got {adapter!r}; use '-' or '_'")
    components = lora_components(pipe)
    if any(adapter in getattr(module, "peft_config", {}) for module in components.values()):
        raise ValueError(f"an adapter name must be new, got {adapter!r}, which is loaded; delete it first or rename")
    placed: Placed = {}
    for component, file in files_of(source, components):
        for place, changes in _place(pipe, file, component).items():
            if place in placed:
                raise ValueError(f"each component takes one file, got two for {place} of {adapter!r}; give one of them")
            placed[place] = changes
    restore = activity_of(components.values())
    try:
        for component, changes in placed.items():
            _inject(pipe, component, components[component], changes, adapter)
    except BaseException:
        remove_adapter(pipe, adapter)
        restore()
        raise
    return tuple(placed)


def files_of(source: Source | Mapping[str, Source], components: Mapping[str, Any]) -> list[tuple[str | None, LoraFile]]:
    """Read the file of a source, or those that it gives to components by name.

    Raises:
        ValueError: for a component that the pipeline lacks.
    """
    if not isinstance(source, Mapping) or all(isinstance(value, Tensor) for value in source.values()):
        return [(None, read_lora(cast(Source, source)))]
    for component in source:
        if component not in components:
            raise ValueError(f"files must be for some of {', '.join(components)}, got one for {component!r}; rename it")
    return [(component, read_lora(cast(Source, file))) for component, file in source.items()]


def save_lora(
    pipe: Any,
    path: str | Path,
    adapter: str,
    *,
    about: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Save an adapter of the pipeline (denoisers and text encoders) with its configuration.

    Args:
        pipe: the pipeline that carries the adapter.
        path: file to write, ``*.safetensors``, whole or not at all; the same adapter gives the same bytes.
        adapter: the adapter's name.
        about: written beside the configuration, see ``LoraFile.about``.
        dtype: of the tensors in the file; as they are by default.

    Returns:
        the path.

    Raises:
        ValueError: if no component has such an adapter.
    """
    path = check_target(path)
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, Any] = {}
    for name, module in lora_components(pipe).items():
        if adapter in getattr(module, "peft_config", {}):
            # peft's own names: diffusers' converter renames attention only, and cannot read the mixture back
            factors = get_peft_model_state_dict(module, adapter_name=adapter)
            tensors |= {f"{name}.{key}": value.to(dtype or value.dtype) for key, value in factors.items()}
            metadata |= {f"{name}.{k}": v for k, v in _plain(module.peft_config[adapter].to_dict()).items()}
    if not tensors:
        names = sorted({n for m in lora_components(pipe).values() for n in getattr(m, "peft_config", {})})
        loaded = f"loaded are {', '.join(names)}" if names else "none is loaded"
        raise ValueError(f"saving needs an adapter that is loaded, got {adapter!r}; {loaded}")
    return write_lora(LoraFile(tensors, metadata, about=about or {}), path)


def remove_adapter(pipe: Any, adapter: str) -> None:
    """Remove an adapter from every component; the last one takes the LoRA layers with it."""
    for module in lora_components(pipe).values():
        if adapter in getattr(module, "peft_config", {}):
            deactivate([module], adapter)
            delete_adapter_layers(module, adapter)
        # also where diffusers, after a load that failed, has deleted the adapter and left its layers
        if not getattr(module, "peft_config", None) and adapted_layers([module]):
            recurse_remove_peft_layers(module)
            module._hf_peft_config_loaded = False


def _place(pipe: Any, file: LoraFile, component: str | None) -> Placed:
    """Return where each change of a file belongs.

    Args:
        pipe: the pipeline.
        file: what was read.
        component: which one the file was given for, None where its names must say.
    """
    said = changes_of(file)
    components = lora_components(pipe)
    layers = {name: {place for place, _ in module.named_modules()} for name, module in components.items()}
    placed, lost = _resolve(pipe, said, layers, component, file)
    if lost and not any(stem.partition(".")[0] in components for stem in lost) and component is None:
        _only_one(pipe, denoisers_of(pipe), file)
    if lost:
        placed, lost = _resolve(pipe, converted(pipe, file, said), layers, component, file)
    if lost or not placed:
        raise ValueError(
            f"a LoRA must load whole or not at all, got {some(lost or said)} in {where_of(file)}, which "
            f"{', '.join(components)} of {type(pipe).__name__} lack; use a LoRA of this model family"
        )
    return placed


def _resolve(
    pipe: Any, said: Mapping[str, Change], layers: Mapping[str, set[str]], component: str | None, file: LoraFile
) -> tuple[Placed, list[str]]:
    """Return the changes by component and layer, and the names that mean none."""
    named = {stem: stem.split(".", 1)[0] for stem in said}
    heads = {head for head in named.values() if head in (*COMPONENTS, *layers)}
    absent = sorted(heads - set(layers))
    if absent and component is None:
        raise ValueError(
            f"a LoRA for {type(pipe).__name__} must address {', '.join(layers)}, got {', '.join(absent)} in "
            f"{where_of(file)}; use a LoRA of this model family"
        )
    home = component
    if component is None:
        bare = [stem for stem, head in named.items() if head not in heads]
        fitting = [name for name, known in layers.items() if bare and all(layer_of(stem, known) for stem in bare)]
        if len(fitting) > 1:
            _only_one(pipe, fitting, file)
        home = fitting[0] if fitting else next(iter(layers))
    elif len(heads) > 1:
        raise ValueError(f"a file given for {component} must be for it alone, got {', '.join(sorted(heads))} in it")
    placed: Placed = {}
    lost = []
    for stem, change in said.items():
        head, name = (named[stem], stem.split(".", 1)[-1]) if named[stem] in heads else (home, stem)
        place = component or head
        layer = layer_of(name, layers[place]) if place else None
        if layer is None or layer in placed.get(place or "", {}):
            lost.append(stem)
        else:
            placed.setdefault(str(place), {})[layer] = change
    return placed, lost


def _only_one(pipe: Any, places: Any, file: LoraFile) -> None:
    if len(places) > 1:
        first = next(iter(places))
        raise ValueError(
            f"a LoRA whose names do not say for which of {', '.join(places)} of {type(pipe).__name__} it is needs a "
            f"place, got {where_of(file)}; give it as {{{first!r}: file}}, with another file for each other"
        )


def _inject(pipe: Any, component: str, module: Any, changes: dict[str, Change], adapter: str) -> None:
    """Put an adapter on a network, each layer with its own rank and scale, and check that it is there."""
    changes = {name: _shaped(change, module.get_submodule(name)) for name, change in changes.items()}
    extras = {kind: any(getattr(c, kind) is not None for c in changes.values()) for kind in ("bias", "lengths")}
    if extras["lengths"] and any(change.lengths is None for change in changes.values()):
        raise ValueError(
            f"DoRA must be on all layers of {component} that a file changes, or on none, got some; merge it"
        )
    if extras["bias"]:
        changes = {
            name: change if change.bias is not None else replace(change, bias=change.up.new_zeros(len(change.up)))
            for name, change in changes.items()
        }
    tensors: dict[str, Tensor] = {}
    for name, change in changes.items():
        tensors |= {f"{component}.{name}.{end}": value for end, value in _tensors(change).items()}
    settings = {f"{component}.{key}": value for key, value in settings_of(changes).items()}
    options = {"adapter_name": adapter, "metadata": settings, "_pipeline": pipe, "low_cpu_mem_usage": True}
    with no_false_alarms(checked=True), _at_hand(module):
        try:
            if component in denoisers_of(pipe):
                module.load_lora_adapter(tensors, prefix=component, **options)
            else:
                pipe.load_lora_into_text_encoder(
                    tensors, network_alphas=None, text_encoder=module, prefix=component, **options
                )
        except Exception as error:
            detail = " ".join((str(error).splitlines() or [""])[-1].split())
            raise ValueError(
                f"a LoRA must fit {type(pipe).__name__}, got one that does not for {component} "
                f"({detail or type(error).__name__}); use a LoRA of this model family"
            ) from error
        _check(module, component, changes, adapter)


def _shaped(change: Change, layer: nn.Module) -> Change:
    """Return a change with its factors as its layer has them: a convolution of one pixel is a linear layer too."""
    weight = getattr(getattr(layer, "base_layer", layer), "weight", None)
    if weight is not None and weight.ndim == 2 and change.down.ndim == 4 and change.down[0, 0].numel() == 1:
        return replace(change, down=change.down.flatten(1), up=change.up.flatten(1))
    if weight is not None and weight.ndim == 4 and change.down.ndim == 2:
        return replace(change, down=change.down[..., None, None], up=change.up[..., None, None])
    return change


def _tensors(change: Change) -> dict[str, Tensor]:
    """Return what a change consists of, named as peft names it."""
    found = {"lora_A.weight": change.down, "lora_B.weight": change.up}
    if change.bias is not None:
        found["lora_B.bias"] = change.bias
    if change.lengths is not None:
        found["lora_magnitude_vector"] = change.lengths
    return {name: value.contiguous() for name, value in found.items()}


def _check(module: Any, component: str, changes: Mapping[str, Change], adapter: str) -> None:
    """Set the scales to the last bit and the dropout of training off; raise unless each layer holds its factors."""
    for name, change in changes.items():
        layer = module.get_submodule(name)
        if not isinstance(layer, LoraLayer) or adapter not in layer.lora_A:
            raise ValueError(
                f"a layer must take its adapter, got none on {name} of {component}, a {type(layer).__name__}"
            )
        down, up = layer.lora_A[adapter], layer.lora_B[adapter]
        for part, value in ((down, change.down), (up, change.up)):
            kept = held(part, "weight", part.weight)
            if kept.shape != value.shape or not torch.equal(kept.cpu(), value.to("cpu", kept.dtype)):
                raise ValueError(f"a layer must hold the factors of its file, got others on {name} of {component}")
        layer.scaling[adapter] = change.scale
        layer.lora_dropout[adapter].eval()
    extra = [
        n for n, m in module.named_modules() if isinstance(m, LoraLayer) and adapter in m.lora_A and n not in changes
    ]
    if extra:
        raise ValueError(f"an adapter must be where its file says, got it also on {some(extra)} of {component}")


@contextmanager
def _at_hand(module: nn.Module) -> Iterator[None]:
    """Inside, a network's weights are in it, where offloading keeps them elsewhere from layer to layer."""
    hook = getattr(module, "_hf_hook", None)
    hook = hook.hooks[0] if isinstance(hook, SequentialHook) else hook
    if not isinstance(hook, AlignDevicesHook):
        yield
        return
    hooks = [getattr(part, "_hf_hook", None) for part in module.modules()]
    devices = [h.execution_device for h in hooks if isinstance(h, AlignDevicesHook) and h.execution_device is not None]
    remove_hook_from_module(module, recurse=True)
    try:
        yield
    finally:
        # the pipeline's own offloading may be back already
        if not hasattr(module, "_hf_hook"):
            cpu_offload(module, devices[0] if devices else None, offload_buffers=len(module._parameters) > 0)


def _plain(value: Any) -> Any:
    """Return a configuration as JSON can hold it: sets become sorted lists."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value)
    return value
