"""The file that says what to tune, for which reward, how: CONFIG.toml.

    [model]                     # what is tuned: `kind` names a backend, the other keys are the backend's own
    kind = "pipeline"
    [rewards]                   # name = weight in r = sum_i w_i r_i; which names exist is the backend's
    compress = 1.0
    [trainer]                   # how: `name` chooses the trainer, the other keys are its settings
    name = "regression"
    kl_weight = 0.5             # the alpha of the optimum p_base exp(r / alpha) / Z
    iterations = 100
    [output]
    folder = "out/compress"
    checkpoint_every = 10

A backend is a class of ``ModelSettings``, installed as an entry point of the group ``sdeblend.tunables``; a trainer is
listed in ``sdeblend.finetune.trainers``. What the ``[trainer]`` table leaves out is the preset that the table chooses,
if any, or else the backend's default, or else the trainer's own.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from sdeblend.finetune.model import ModelSettings, Tunable
from sdeblend.finetune.trainer import Trainer, TrainerSettings
from sdeblend.finetune.trainers import TRAINERS
from sdeblend.finetune.workers import Precision
from sdeblend.reward import Reward
from sdeblend.shell import registry
from sdeblend.shell.settings import OneOf, Settings, parse, read_toml


class RunSettings(Settings):
    """The keys of ``[trainer]`` that all trainers share.

    Attributes:
        name: of the trainer.
        iterations: rounds to do in all.
        precision: in which networks are evaluated; "no" leaves them as they are.
    """

    name: Annotated[str, OneOf(TRAINERS)] = "regression"
    iterations: int = Field(default=100, ge=1)
    precision: Precision = "no"


class Output(Settings):
    """Where the run is written.

    Attributes:
        folder: of everything that is written.
        checkpoint_every: iterations between checkpoints; the last is always one.
    """

    folder: Path
    checkpoint_every: int = Field(default=10, ge=1)


class _Kind(Settings):
    kind: str


class _File(Settings):
    model: dict[str, Any]
    rewards: dict[str, float]
    trainer: dict[str, Any] = Field(default_factory=dict)
    output: Output


@dataclass(frozen=True)
class Tuning:
    """One settings file, checked as far as it can be without building the model.

    Attributes:
        file: where it came from.
        model: the ``[model]`` table.
        rewards: name -> weight.
        trainer: how to tune.
        settings: of the trainer.
        run, output: see there.
        given: the ``[model]`` table as it was read, with its kind.
    """

    file: Path
    model: ModelSettings
    rewards: Mapping[str, float]
    trainer: type[Trainer]
    settings: TrainerSettings
    run: RunSettings
    output: Output
    given: Mapping[str, object]

    def fixed(self) -> dict[str, object]:
        """Return what decides the result, "table.key" -> value as JSON has it; a resumed run must agree in all.

        Iterations and output may change: what they are changes no number of an iteration.
        """
        flat = {f"model.{key}": "inf" if value == math.inf else value for key, value in self.given.items()}
        flat |= configuration(self.settings, self.rewards, self.run.name) | {"trainer.precision": self.run.precision}
        return dict(sorted(flat.items()))

    def build(self, device: torch.device) -> tuple[Tunable, Mapping[str, Reward]]:
        """Build model and rewards; see ``ModelSettings``."""
        return self.model.build(tuple(self.rewards), file=self.file, seed=self.settings.seed, device=device)


def configuration(settings: TrainerSettings, rewards: Mapping[str, float], name: str) -> dict[str, object]:
    """Return settings and name of a trainer and weights of rewards, "table.key" -> value as JSON has it."""
    flat = {f"trainer.{key}": value for key, value in settings.to_json().items()}
    return flat | {f"rewards.{key}": weight for key, weight in rewards.items()} | {"trainer.name": name}


def load_tuning(path: str | os.PathLike[str]) -> Tuning:
    """Read and check a settings file; see the module's docstring.

    Raises:
        ValueError: for what cannot be used: file, table, key, and what is allowed.
        OSError: if it cannot be read.
    """
    file = Path(path)
    tables = parse(_File, read_toml(file), file=file)
    given, trainer = dict(tables.model), dict(tables.trainer)
    kind = parse(_Kind, _taken(given, _Kind), file=file, section="[model]").kind
    found: type[ModelSettings] = registry.load(registry.TUNABLES, kind, what=f"{file}: [model] kind")
    model = parse(found, given, file=file, section="[model]")
    if not any(tables.rewards.values()):
        raise ValueError(f"{file}: [rewards] needs at least one reward = weight with a weight other than 0; add one")
    run = parse(RunSettings, _taken(trainer, RunSettings), file=file, section="[trainer]")
    form = TRAINERS[run.name].settings_class
    defaults = {key: value for key, value in model.trainer_defaults().items() if key in form.model_fields}
    settings = parse(form, {**defaults, **form.preset(trainer), **trainer}, file=file, section="[trainer]")
    return Tuning(
        file, model, tables.rewards, TRAINERS[run.name], settings, run, tables.output, {**given, "kind": kind}
    )


def forms() -> dict[str, type[Settings]]:
    """Return what each table of a settings file may hold, by its heading; imports every backend that is installed."""
    kinds = registry.offered(registry.TUNABLES)
    found: dict[str, type[Settings]] = {f'[model], kind = "{kind}"': entry.load() for kind, entry in kinds.items()}
    found |= {"[trainer]": RunSettings}
    found |= {f'[trainer], name = "{name}"': trainer.settings_class for name, trainer in TRAINERS.items()}
    return found | {"[output]": Output}


def _taken(table: dict[str, Any], form: type[Settings]) -> dict[str, Any]:
    """Take the keys of a form out of a table."""
    return {key: table.pop(key) for key in list(table) if key in form.model_fields}
