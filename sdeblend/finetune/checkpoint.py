"""A run in one file: everything that decides what the next iteration does.

Parameters, their average, AdamW's moments, what the trainer keeps (value function, replay buffer), the generator, the
position, and the configuration it all belongs to. One safetensors file, tensors and JSON, no pickle. It is replaced
by renaming, so a run that is killed, or a disk that fills up, at any moment leaves the last good one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdeblend.finetune.state import load_optimizer, optimizer_state, safetensors_bytes
from sdeblend.finetune.trainer import Trainer
from sdeblend.shell.files import write_atomically
from sdeblend.shell.settings import Settings, parse

FORMAT = "sdeblend checkpoint 1"


class Position(Settings):
    """Where a run is: rounds done, rewards asked for, factor and finite steps of the loss scale, if there is one."""

    iteration: int
    reward_calls: int
    scale: tuple[float, int] | None


def state_of(trainer: Trainer) -> tuple[dict[str, Tensor], Position]:
    """Return a trainer's whole state as tensors by name and its position; all processes must call it.

    Raises:
        FloatingPointError: if a parameter is not finite: nothing that is not good is ever kept.
    """
    tensors: dict[str, Tensor] = {f"parameter.{name}": v for name, v in trainer.model.trainable().items()}
    bad = [name for name, value in tensors.items() if not bool(value.isfinite().all())]
    if bad:
        raise FloatingPointError(
            f"parameters must stay finite, got others in {bad[0].partition('.')[2]} after iteration "
            f"{trainer.iteration}; lower learning_rate"
        )
    tensors |= {f"average.{i}": value for i, value in enumerate(trainer.average or ())}
    tensors |= optimizer_state(trainer.optimizer)
    tensors |= {f"buffer.{name}": value for name, value in trainer.buffers().items()}
    tensors["generator"] = trainer.generator.get_state()
    scale = None if trainer.scale is None else (trainer.scale.factor, trainer.scale.steps)
    return tensors, Position(iteration=trainer.iteration, reward_calls=trainer.reward_calls, scale=scale)


def restore(trainer: Trainer, tensors: Mapping[str, Tensor], position: Position) -> None:
    """Put a trainer into the state that ``state_of`` returned.

    Raises:
        ValueError: for tensors of another model, naming the first that does not fit.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        head, _, rest = name.partition(".")
        parts.setdefault(head, {})[rest] = value
    own = {name: tuple(value.shape) for name, value in trainer.model.trainable().items()}
    given = {name: tuple(value.shape) for name, value in parts.get("parameter", {}).items()}
    odd = sorted(name for name in {*own, *given} if own.get(name) != given.get(name))
    if odd:
        raise ValueError(f"the checkpoint's trainable part is of another model: it differs in {odd[0]}")
    trainer.set_parameters([parts["parameter"][name] for name in sorted(own)])
    for i, value in enumerate(trainer.average or ()):
        value.copy_(parts["average"][str(i)])
    load_optimizer(trainer.optimizer, {f"optimizer.{name}": v for name, v in parts.get("optimizer", {}).items()})
    trainer.load_buffers(parts.get("buffer", {}))
    trainer.generator.set_state(parts["generator"][""])
    trainer.iteration, trainer.reward_calls = position.iteration, position.reward_calls
    if trainer.scale is not None and position.scale is not None:
        trainer.scale.factor, trainer.scale.steps = position.scale


def write(path: Path, trainer: Trainer, configuration: Mapping[str, object]) -> None:
    """Write a checkpoint; every process must call it, the main one writes.

    Args:
        path: the file to replace.
        trainer: between two iterations.
        configuration: what decides the result, as JSON has it.

    Raises:
        OSError: if it cannot be written; what was there before is then still there.
        FloatingPointError: if the state is not finite; likewise.
    """
    tensors, position = state_of(trainer)
    if not trainer.processes.main:
        return
    about = {"format": FORMAT, "configuration": json.dumps(dict(configuration))}
    about["numbers"] = position.model_dump_json()
    kept = "the one before it is kept" if path.exists() else "there is none before it"
    with naming(path, f"the checkpoint of iteration {trainer.iteration}; {kept}"):
        write_atomically(path, safetensors_bytes(tensors, about))


@contextmanager
def naming(path: Path, words: str) -> Iterator[None]:
    """Give an error of the system the file and what it was to hold: of a full disk it says neither."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror or error}, at {words}", str(path)) from error


def read(path: Path, trainer: Trainer, configuration: Mapping[str, object]) -> None:
    """Put a trainer where a checkpoint left off.

    Raises:
        ValueError: for what is no checkpoint, or one of another configuration, naming the key that differs.
        OSError: if it cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(2, "no such file", str(path))
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a checkpoint, or a damaged one ({error}); start anew elsewhere") from None
    if about.get("format") != FORMAT:
        raise ValueError(f"{path}: not a checkpoint of this version ({FORMAT}); start anew in another folder")
    check_same(path, json.loads(about["configuration"]), configuration)
    position = parse(Position, json.loads(about["numbers"]), file=path)
    try:
        restore(trainer, tensors, position)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def check_same(path: Path, before: Mapping[str, object], now: Mapping[str, object]) -> None:
    """Raise a ValueError that names the first key in which two configurations differ, if one does."""
    # By way of JSON, which knows no tuples.
    now = json.loads(json.dumps(dict(now)))
    for key in sorted({*before, *now}):
        if before.get(key) != now.get(key):
            was, wanted = (repr(table[key]) if key in table else "not set" for table in (before, now))
            raise ValueError(
                f"{path} is a checkpoint of another configuration: {key} was {was} and is {wanted}; set it back, or "
                "name another folder"
            )
