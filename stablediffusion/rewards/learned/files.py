"""Weights and settings of learned rewards: a folder, or a hub id fetched to one; safetensors and JSON, never a pickle.

A network is built without memory of its own, and takes the tensors of the file as they are once all are there and of
the right shape: nothing is left at random values, which would score images as smoothly as the real weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

_SETTINGS = ("*.json", "merges.txt", "vocab.txt")
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors")
_INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def fetch(name: str, model: str, revision: str | None = None, *, weights: tuple[str, ...] = WEIGHTS) -> Path:
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
            f"reward {name!r} needs a folder or hub id with config.json and {WEIGHTS[0]}, got {model!r}{at}, which is "
            f"no folder and cannot be fetched ({type(error).__name__}); check it, or download it first"
        ) from error


@dataclass(frozen=True)
class Model:
    """The folder of a model, and how it is to compute. What cannot be used in it is a ValueError.

    Attributes:
        name: of the reward, for messages.
        folder: where the files are.
        device: where to compute.
        dtype: of the weights.
        batch: images at a time.
    """

    name: str
    folder: Path
    device: torch.device
    dtype: torch.dtype
    batch: int

    def wrong(self, text: str) -> ValueError:
        """Return an error that begins with the reward's name."""
        return ValueError(f"reward {self.name!r} {text}")

    def with_either(self, wanted: Sequence[str], instead: str) -> Model:
        """Return the model if its folder has one of the files wanted, else that of the hub id ``instead``."""
        if any((self.folder / file).is_file() for file in wanted):
            return self
        try:
            return replace(self, folder=fetch(self.name, instead, weights=()))
        except ValueError as error:
            raise self.wrong(
                f"needs {' or '.join(wanted)} in {self.folder}, got none, nor from {instead}; copy it there"
            ) from error

    def table(self, file: str) -> dict[str, Any]:
        """Return a JSON file's table."""
        try:
            table = json.loads((self.folder / file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise self.wrong(
                f"needs a readable {file} in {self.folder}, got none ({type(error).__name__}); download the whole model"
            ) from error
        if not isinstance(table, dict):
            raise self.wrong(f"needs a table in {self.folder / file}, got {type(table).__name__}; replace it")
        return table

    def tensors(self, file: str = WEIGHTS[0], *, convert: str = "") -> dict[str, Tensor]:
        """Return the weights, in one file or several, on the CPU.

        Args:
            file: the name of the one file.
            convert: how to make the file from a pickle, for messages.
        """
        files = [self.folder / file]
        if not files[0].is_file() and (self.folder / _INDEX).is_file():
            parts = self.table(_INDEX).get("weight_map")
            names = sorted(set(parts.values() if isinstance(parts, dict) else ()))
            files = [self.folder / Path(part).name for part in names]
        missing = [path.name for path in files if not path.is_file()]
        if missing or not files:
            pickles = sorted(path.name for path in self.folder.iterdir() if path.suffix in _PICKLES)
            what = f"{pickles[0]}, a pickle, which is never read" if pickles else "no such file"
            how = convert or "transformers.CLIPModel.from_pretrained(OLD).save_pretrained(NEW)"
            raise self.wrong(
                f"needs {missing[0] if missing else file} in {self.folder}, got {what}; "
                f"{f'convert it: {how}' if pickles else 'give a folder or hub id that has it'}"
            )
        try:
            return {key: value for path in files for key, value in load_file(path).items()}
        except (OSError, SafetensorError) as error:
            raise self.wrong(
                f"needs readable weights in {self.folder}, got a damaged file ({type(error).__name__}); "
                "download it again"
            ) from error

    def network(self, build: Callable[[], nn.Module], state: Mapping[str, Tensor]) -> Any:
        """Return a network with its weights, on the CPU in float32, frozen, for evaluation.

        Args:
            build: makes the network.
            state: its tensors by name; ``position_ids`` of older files are ignored.
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
            raise self.wrong(
                f"needs weights of {type(network).__name__}, got others in {self.folder} ({wrong[0]}"
                f"{f' and {len(wrong) - 1} more' if len(wrong) > 1 else ''}); give the model that this reward names"
            )
        network.load_state_dict({key: value.float() for key, value in given.items()}, assign=True)
        # counted, never stored
        for module in network.modules():
            for key, value in module.named_buffers(recurse=False):
                if value.is_meta:
                    setattr(module, key, torch.arange(value.shape[-1]).expand(value.shape))
        return network.requires_grad_(False).eval()

    def tokenizer(self, kind: Any, embedded: int, special: Sequence[str], **options: Any) -> Any:
        """Return the folder's tokenizer, all of whose tokens have an embedding.

        Args:
            kind: its class.
            embedded: tokens that the network knows.
            special: tokens that must be there: a folder without a vocabulary gives a tokenizer without complaint.
            options: of its class.
        """
        try:
            tokenizer = kind.from_pretrained(self.folder, local_files_only=True, **options)
        except Exception as error:
            raise self.wrong(
                f"needs a {kind.__name__} in {self.folder}, got one that cannot be read ({type(error).__name__}); "
                "copy tokenizer.json of the same model there"
            ) from error
        known = tokenizer.get_vocab()
        lacking = [token for token in special if token not in known]
        if lacking or max(known.values()) >= embedded or len(known) <= len(special) + 1:
            what = f"{len(known)} tokens{f' without {lacking[0]}' if lacking else ''}"
            raise self.wrong(
                f"needs a tokenizer of at most {embedded} tokens with {' and '.join(special)}, got {what} in "
                f"{self.folder}; copy the files of the same model's tokenizer there"
            )
        return tokenizer
