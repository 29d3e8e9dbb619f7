"""Weights and settings of learned rewards: a folder, or a hub id fetched to one; safetensors and JSON, never a pickle.

A network is built without memory of its own, and takes the tensors of the file as they are once all are there and of
the right shape: nothing is left at random values, which would score images as smoothly as the real weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

_SETTINGS = ("*.json", "merges.txt", "vocab.txt")
_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors")
_INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def fetch(name: str, model: str, revision: str | None = None, *, weights: tuple[str, ...] = _WEIGHTS) -> Path:
    """Return the folder of a model, downloaded if it is a hub id.

    Args:
        name: of the reward, for messages.
        model: folder or hub id.
        revision: branch, tag or commit on the hub.
        weights: patterns of the files of weights to download; none for tokenizers and settings alone.

    Raises:
        ValueError: if there is neither such a folder nor such a model on the hub, or a revision of a folder.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ValueError(
                f"reward {name!r}: a revision is of a hub id, got {revision!r} with the folder {model}; leave it out"
            )
        return folder
    try:
        return Path(huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=[*_SETTINGS, *weights]))
    except (OSError, ValueError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise ValueError(
            f"reward {name!r} needs a folder or hub id with config.json and {_WEIGHTS[0]}, got {model!r}{at}, which is "
            f"no folder and cannot be fetched ({type(error).__name__}); check it, or download it first"
        ) from error


def with_files(name: str, folder: Path, wanted: tuple[str, ...], instead: str) -> Path:
    """Return the folder if it has one of the files wanted, else that of the hub id ``instead``."""
    if any((folder / file).is_file() for file in wanted):
        return folder
    try:
        return fetch(name, instead, weights=())
    except ValueError as error:
        raise ValueError(
            f"reward {name!r} needs {' or '.join(wanted)} in {folder}, got none, nor from {instead}; copy it there"
        ) from error


def settings_of(name: str, folder: Path, file: str) -> dict[str, Any]:
    """Return a JSON file's table.

    Raises:
        ValueError: if it is missing, or no table.
    """
    try:
        table = json.loads((folder / file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"reward {name!r} needs a readable {file} in {folder}, got none ({type(error).__name__}); "
            "download the whole model"
        ) from error
    if not isinstance(table, dict):
        raise ValueError(f"reward {name!r} needs a table in {folder / file}, got {type(table).__name__}; replace it")
    return table


def tensors_of(name: str, folder: Path, *, file: str = _WEIGHTS[0], convert: str = "") -> dict[str, Tensor]:
    """Return the weights in a folder, in one file or several, on the CPU.

    Args:
        name: of the reward, for messages.
        folder: where they are.
        file: the name of the one file.
        convert: how to make the file from a pickle, for messages.

    Raises:
        ValueError: if there are none, or they cannot be read.
    """
    files = [folder / file]
    if not files[0].is_file() and (folder / _INDEX).is_file():
        parts = settings_of(name, folder, _INDEX).get("weight_map")
        files = [folder / Path(part).name for part in sorted(set(parts.values() if isinstance(parts, dict) else ()))]
    missing = [path.name for path in files if not path.is_file()]
    if missing or not files:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
        what = f"{pickles[0]}, a pickle, which is never read" if pickles else "no such file"
        how = convert or "transformers.CLIPModel.from_pretrained(OLD).save_pretrained(NEW)"
        raise ValueError(
            f"reward {name!r} needs {missing[0] if missing else file} in {folder}, got {what}; "
            f"{f'convert it: {how}' if pickles else 'give a folder or hub id that has it'}"
        )
    try:
        return {key: value for path in files for key, value in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"reward {name!r} needs readable weights in {folder}, got a damaged file ({type(error).__name__}); "
            "download it again"
        ) from error


def filled(name: str, build: Callable[[], nn.Module], state: Mapping[str, Tensor], source: Path) -> nn.Module:
    """Return a network with its weights, frozen, for evaluation.

    Args:
        name: of the reward, for messages.
        build: makes the network.
        state: its tensors by name; ``position_ids`` of older files are ignored.
        source: where they are from, for messages.

    Raises:
        ValueError: for tensors that are missing, too many, or of another shape.
    """
    with torch.device("meta"):
        network = build()
    given = {key: value for key, value in state.items() if not key.endswith("position_ids")}
    needed = network.state_dict()
    wrong = (
        [f"{key} is missing" for key in needed if key not in given]
        + [f"{key} is unknown" for key in given if key not in needed]
        + [f"{key} has shape {tuple(given[key].shape)} for {tuple(needed[key].shape)}"
           for key in needed if key in given and given[key].shape != needed[key].shape]
    )  # fmt: skip
    if wrong:
        raise ValueError(
            f"reward {name!r} needs weights of {type(network).__name__}, got others in {source} ({wrong[0]}"
            f"{f' and {len(wrong) - 1} more' if len(wrong) > 1 else ''}); give the model that this reward names"
        )
    network.load_state_dict({key: value.float() for key, value in given.items()}, assign=True)
    # counted, never stored
    for module in network.modules():
        for key, value in module.named_buffers(recurse=False):
            if value.is_meta:
                setattr(module, key, torch.arange(value.shape[-1]).expand(value.shape))
    return network.requires_grad_(False).eval()
