"""LoRA files: found, read, converted, written.

A LoRA changes a weight by ``(alpha / rank) B A``. In the canonical file (safetensors) each tensor is named
``component.layer.lora_A.weight`` and the configuration of every component, alpha with it, is in the
metadata. Files come in other layouts: names without a component, as ``unet.save_lora_adapter`` writes them; folders of
peft, ``adapter_model.safetensors`` beside ``adapter_config.json``; pickles of attention processors,
``layer.processor.to_q_lora.down.weight``, as the authors of the method did; the names of other trainers. What each says
is in ``layouts``, what becomes of it on a pipeline in ``loading``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sdeblend.shell.files import write_atomically

_PEFT = "adapter_model"
LORA_FILE_NAMES = (
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin",
    f"{_PEFT}.safetensors",
    f"{_PEFT}.bin",
)
_PEFT_CONFIG = "adapter_config.json"
PEFT_PREFIX = "base_model.model."
ABOUT = "sdeblend."
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# what components are called, in any pipeline
COMPONENTS = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3")
# names of other trainers, which the pipeline's own loader translates
_FOREIGN = ("lora_unet_", "lora_te", "lora_transformer_", "lycoris_", "diffusion_model.", "double_blocks.")
# files that are adapters of another kind; what they are is said where they are loaded
_OTHER_KINDS = ("hada_", "lokr_", "oft_", "boft_")


@dataclass(frozen=True)
class LoraFile:
    """What a LoRA file holds.

    Attributes:
        tensors: name -> tensor, as in the file.
        metadata: the configuration of each component, ``component.r`` and so on; of a file whose names have no
            component, without it, as peft writes it beside the file; None if there is none.
        path: where it was read, or None for tensors given in memory.
        about: what a trainer of ours wrote beside it (reward, KL weight, base, ...), by name after "sdeblend.".
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, Any] | None
    path: Path | None = None
    about: Mapping[str, str] = field(default_factory=dict)

    def qualified(self, component: str) -> LoraFile:
        """Return the file with ``component.`` put before names that have no component; a trainer's own are left."""
        if any(key.startswith(_FOREIGN) or key.split(".", 1)[0] in COMPONENTS for key in self.tensors):
            return self
        metadata = None if self.metadata is None else {f"{component}.{k}": v for k, v in self.metadata.items()}
        tensors = {f"{component}.{key.removeprefix(PEFT_PREFIX)}": value for key, value in self.tensors.items()}
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
            repository, name = "/".join(parts[:2]), "/".join(parts[2:])
            if Path(name).stem == _PEFT:
                hf_hub_download(repository, str(Path(name).with_name(_PEFT_CONFIG)))
            return Path(hf_hub_download(repository, name))
        if len(parts) == 2 and all(parts) and Path(source).suffix not in (".safetensors", *_PICKLES):
            patterns = ["*.safetensors", _PEFT_CONFIG, *(f"*{s}" for s in _PICKLES)]
            return Path(snapshot_download(source, allow_patterns=patterns))
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
        if metadata is None and path.stem == _PEFT:
            metadata = _read_config(path.with_name(_PEFT_CONFIG))
    if not any("lora" in key or any(kind in key for kind in _OTHER_KINDS) for key in tensors):
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


def _read_config(path: Path) -> dict[str, Any]:
    """Read what peft writes beside its weights; without it their strength is unknown."""
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"a folder of peft needs a readable {path.name} beside its weights, which says their strength, got "
            f"{type(error).__name__} in {path.parent}; fetch it too"
        ) from error
    if not isinstance(config, dict):
        raise ValueError(f"{path.name} must hold one configuration, got {type(config).__name__} in {path.parent}")
    return config


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
    return write_lora(read_lora(source).qualified(component), check_target(path))


def write_lora(file: LoraFile, path: Path) -> Path:
    """Write a file as safetensors, whole or not at all; the same tensors give the same bytes."""
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


def check_target(path: str | Path) -> Path:
    """Return where a LoRA is to be written.

    Raises:
        ValueError: for another suffix than safetensors'.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"a LoRA is saved as *.safetensors, got {path.name!r}; change the suffix")
    return path
