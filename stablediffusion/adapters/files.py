"""LoRA files: read, convert, save, load, and check that they really loaded.

A LoRA changes a weight by ``(alpha / rank) B A``. In the canonical file (safetensors) each tensor is named
``component.layer.lora_A.weight`` and the configuration of every component, alpha with it, is in the
metadata. Files come in three other layouts, which diffusers loads as *nothing*, without an error:

* names without a component, as ``unet.save_lora_adapter`` writes them;
* pickles of attention processors, ``layer.processor.to_q_lora.down.weight``, as the authors of the method did;
* metadata for one component only, which gives the other a default configuration.

The first two are converted here; after every load the adapter is counted and compared with the file.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils.peft_utils import delete_adapter_layers, recurse_remove_peft_layers
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sdeblend.shell.files import write_atomically
from stablediffusion.adapters.switch import activity_of, adapted_layers, deactivate
from stablediffusion.pipelines.components import denoiser_of, lora_components
from stablediffusion.pipelines.loading import no_false_alarms

LORA_FILE_NAMES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
ABOUT = "sdeblend."
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
# Layouts of other trainers that the pipeline's own loader converts; their tensors are renamed and rescaled.
_FOREIGN = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "diffusion_model.", "base_model.", "double_blocks.")


@dataclass(frozen=True)
class LoraFile:
    """What a LoRA file holds.

    Attributes:
        tensors: name -> tensor, as in the file.
        metadata: the configuration of each component, or None if the file has none.
        path: where it was read, or None for tensors given in memory.
        about: what a trainer of ours wrote beside it (reward, KL weight, base, ...), by name after "sdeblend.".
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, Any] | None
    path: Path | None = None
    about: Mapping[str, str] = field(default_factory=dict)

    @property
    def foreign(self) -> bool:
        """Whether the pipeline's loader must translate the names (kohya and the like)."""
        return any(key.startswith(_FOREIGN) for key in self.tensors)

    def qualified(self, component: str) -> LoraFile:
        """Return the file with ``component.`` put before names that have no component."""
        if self.foreign or any(key.split(".", 1)[0] in _COMPONENTS for key in self.tensors):
            return self
        metadata = None if self.metadata is None else {f"{component}.{k}": v for k, v in self.metadata.items()}
        tensors = {f"{component}.{key}": value for key, value in self.tensors.items()}
        return LoraFile(tensors, metadata, self.path, self.about)


Source = str | Path | Mapping[str, Tensor] | LoraFile


def find_lora(source: str | Path) -> Path:
    """Return the one LoRA file that ``source`` names.

    Args:
        source: a file, a folder with one LoRA file, a hub id ``owner/name``, or ``owner/name/file``.

    Raises:
        ValueError: if there is none, or several and none has the usual name.
    """
    path = Path(source)
    if path.is_file():
        return path
    if not path.exists():
        path = _from_hub(str(source))
        if path.is_file():
            return path
    found = sorted(p for p in path.iterdir() if p.suffix in (".safetensors", *_PICKLES))
    for usual in LORA_FILE_NAMES:
        if path / usual in found:
            return path / usual
    safe = [p for p in found if p.suffix == ".safetensors"] or found
    if len(safe) != 1:
        names = ", ".join(p.name for p in safe) or "none"
        raise ValueError(f"a LoRA folder must hold one LoRA file, got {names} in {source}; give the file itself")
    return safe[0]


def _from_hub(source: str) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HFValidationError

    parts = [] if source.startswith(("/", ".", "~")) else source.split("/")
    try:
        if len(parts) > 2 and Path(source).suffix:
            return Path(hf_hub_download("/".join(parts[:2]), "/".join(parts[2:])))
        if len(parts) == 2 and all(parts) and Path(source).suffix not in (".safetensors", *_PICKLES):
            return Path(snapshot_download(source, allow_patterns=["*.safetensors", *(f"*{s}" for s in _PICKLES)]))
    except (OSError, ValueError, HFValidationError) as error:
        raise ValueError(
            f"a LoRA must be a file, a folder or a hub id that can be fetched, got {source!r}, which is no path here "
            f"and the hub answered {type(error).__name__}; check the name"
        ) from error
    raise ValueError(f"a LoRA must be a file, a folder or a hub id owner/name, got {source!r}, which does not exist")


def read_lora(source: Source) -> LoraFile:
    """Read a LoRA file of any layout, without running code that it may carry.

    Args:
        source: a file or folder or hub id (see ``find_lora``), tensors by name, or what was read before.

    Returns:
        tensors on the CPU and metadata.

    Raises:
        ValueError: if the file is damaged or holds no LoRA tensors, or a pickle holds more than tensors.
    """
    if isinstance(source, LoraFile):
        return source
    metadata, path = None, None
    about: dict[str, str] = {}
    if isinstance(source, Mapping):
        tensors = dict(source)
    else:
        path = find_lora(source)
        if path.suffix == ".safetensors":
            tensors, metadata, about = _read_safetensors(path)
        else:
            tensors = _read_pickle(path)
    if not tensors or not any("lora" in key or key.startswith(_FOREIGN) for key in tensors):
        example = next(iter(tensors), "nothing")
        raise ValueError(
            f"a LoRA file needs tensors whose names contain 'lora', got {example!r} among {len(tensors)} "
            f"in {path or 'the given tensors'}; a whole model can be a member as a module"
        )
    return LoraFile(tensors, metadata, path, about)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None, dict[str, str]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - a handle is no dictionary
            header = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"a LoRA must be a whole safetensors file, got {path} ({error}); fetch it again") from error
    raw = header.get(LORA_ADAPTER_METADATA_KEY)
    about = {key.removeprefix(ABOUT): value for key, value in header.items() if key.startswith(ABOUT)}
    return tensors, json.loads(raw) if raw else None, about


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"a pickled LoRA must hold tensors only, got {path.name}, which torch.load(weights_only=True) refuses "
            f"({type(error).__name__}); convert it to safetensors where you trust it"
        ) from error
    loaded = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ValueError(f"a pickled LoRA must be a dictionary of tensors, got {type(loaded).__name__} in {path.name}")
    return loaded


def convert_lora(source: Source, path: str | Path, component: str = "unet") -> Path:
    """Write a LoRA of any layout as safetensors with component names and its metadata.

    Args:
        source: see ``read_lora``.
        path: file to write, ``*.safetensors``.
        component: what names without a component belong to: "unet" or "transformer".

    Returns:
        the path.
    """
    return _write(read_lora(source).qualified(component), _check_target(path))


def save_lora(
    pipe: Any,
    path: str | Path,
    adapter: str,
    *,
    about: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Save an adapter of the pipeline (denoiser and text encoders) with its configuration.

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
    path = _check_target(path)
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, Any] = {}
    for name, module in lora_components(pipe).items():
        if adapter in getattr(module, "peft_config", {}):
            # peft's own names: diffusers' converter renames attention only, and cannot read the mixture back
            factors = get_peft_model_state_dict(module, adapter_name=adapter)
            tensors |= {f"{name}.{key}": value.to(dtype or value.dtype) for key, value in factors.items()}
            metadata |= {f"{name}.{k}": v for k, v in _plain(module.peft_config[adapter].to_dict()).items()}
    if not tensors:
        raise ValueError(f"saving needs an adapter that is loaded, got {adapter!r}; {_loaded(pipe)}")
    return _write(LoraFile(tensors, metadata, about=about or {}), path)


def load_lora(pipe: Any, source: Source, adapter: str) -> tuple[str, ...]:
    """Load a LoRA of any layout as an adapter, and check that all of it arrived.

    Args:
        pipe: a diffusers pipeline.
        source: see ``read_lora``.
        adapter: name of the new adapter, without ".".

    Returns:
        the components that have it, e.g. ("unet", "text_encoder").

    Raises:
        ValueError: for a name that is taken or has a ".", or when less arrived than the file holds; the
            pipeline is left without the adapter.
    """
    if not adapter or "." in adapter:
        raise ValueError(f"an adapter name must be non-empty and without '.', got {adapter!r}; use '-' or '_'")
    components = lora_components(pipe)
    if any(adapter in getattr(module, "peft_config", {}) for module in components.values()):
        raise ValueError(f"an adapter name must be new, got {adapter!r}, which is loaded; delete it first or rename")
    file = read_lora(source).qualified(denoiser_of(pipe)[0])
    absent = sorted({key.split(".", 1)[0] for key in file.tensors} & set(_COMPONENTS) - set(components))
    if absent:
        raise ValueError(
            f"a LoRA for {type(pipe).__name__} must address {', '.join(components)}, got {', '.join(absent)} "
            f"in {file.path or 'the given tensors'}; use a LoRA of this model family"
        )
    restore = activity_of(components.values())
    try:
        with tempfile.TemporaryDirectory() as folder:
            # through a file, because only there does diffusers read the metadata
            name = _write(file, Path(folder) / "lora.safetensors").name
            with no_false_alarms():
                pipe.load_lora_weights(folder, weight_name=name, adapter_name=adapter)
        where = _check_arrived(file, components, adapter)
        for layer in adapted_layers(components.values()):
            if adapter in getattr(layer, "lora_dropout", {}):
                layer.lora_dropout[adapter].eval()  # of its training
        return where
    except BaseException as error:
        remove_adapter(pipe, adapter)
        restore()
        if isinstance(error, RuntimeError | KeyError | IndexError):
            lines = str(error).splitlines()
            raise ValueError(
                f"a LoRA must fit {type(pipe).__name__}, got one that does not in {file.path or 'the given tensors'} "
                f"({' '.join(' '.join(lines[-1:]).split()) or type(error).__name__}); use a LoRA of this model family"
            ) from error
        raise


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


def _write(file: LoraFile, path: Path) -> Path:
    metadata = {"format": "pt"} | {f"{ABOUT}{key}": value for key, value in file.about.items()}
    if file.metadata is not None:
        metadata[LORA_ADAPTER_METADATA_KEY] = json.dumps(file.metadata, indent=2, sort_keys=True)
    content = save({key: value.contiguous() for key, value in file.tensors.items()}, metadata=metadata)
    # safetensors writes the metadata in an order that differs from one process to the next
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    write_atomically(path, len(text).to_bytes(8, "little") + text + content[end:])
    return path


def _check_arrived(file: LoraFile, components: Mapping[str, Any], adapter: str) -> tuple[str, ...]:
    found = {n: m for n, m in components.items() if adapter in getattr(m, "peft_config", {})}
    tensors = [t for m in found.values() for t in get_peft_model_state_dict(m, adapter_name=adapter).values()]
    given = [t for key, t in file.tensors.items() if not key.endswith(".alpha")]
    where = file.path or "the given tensors"
    short = not tensors if file.foreign else len(tensors) != len(given)
    if short:
        raise ValueError(
            f"all tensors of a LoRA must load, got {len(tensors)} of {len(given)} from {where}; "
            f"the file belongs to another model, or names layers that {', '.join(components)} lack"
        )
    size, expected = _squares(tensors), _squares(given)
    # a network in bfloat16 rounds each value by at most 2^-9
    if not file.foreign and abs(size - expected) > 1e-2 * expected:
        raise ValueError(
            f"a LoRA must load with its own values, got a sum of squares of {size:g} for {expected:g} from {where}; "
            "the adapter was initialised, not read"
        )
    return tuple(found)


def _squares(tensors: list[Tensor]) -> float:
    return sum(float(t.detach().double().square().sum()) for t in tensors)


def _check_target(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"a LoRA is saved as *.safetensors, got {path.name!r}; change the suffix")
    return path


def _plain(value: Any) -> Any:
    """Return a configuration as JSON can hold it: sets become sorted lists."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value)
    return value


def _loaded(pipe: Any) -> str:
    names = sorted({n for m in lora_components(pipe).values() for n in getattr(m, "peft_config", {})})
    return f"loaded are {', '.join(names)}" if names else "none is loaded"
