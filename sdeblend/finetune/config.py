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

A backend is an entry point of the group ``sdeblend.tunables``: a kind and a function, ``Builder``. A trainer is a
class of ``sdeblend.finetune`` and a dataclass of settings, whose fields are the keys of its table. What the table
leaves out has the dataclass's default, unless the backend's module has another: a function ``trainer_defaults`` from
the ``[model]`` table to defaults by key.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, get_type_hints

import torch

from sdeblend.config import REQUIRED, Spec, check_keys, load_toml
from sdeblend.finetune.model import Tunable
from sdeblend.finetune.trainer import Settings, Trainer
from sdeblend.reward import RewardFunction

GROUP = "sdeblend.tunables"

# Name -> module, trainer, settings. Imported when asked for, so that one trainer's needs are not another's.
TRAINERS: Mapping[str, tuple[str, str, str]] = {
    "regression": ("regression", "RewardRegression", "RegressionSettings"),
    "ddpo": ("ddpo", "DDPO", "DDPOSettings"),
    "dpok": ("dpok", "DPOK", "DPOKSettings"),
    "backprop": ("backprop", "RewardBackprop", "BackpropSettings"),
    "adjoint": ("adjoint", "AdjointMatching", "AdjointSettings"),
}

_TOP: Spec = {
    "model": (dict, REQUIRED),
    "rewards": (dict, REQUIRED),
    "trainer": (dict, {}),
    "output": (dict, REQUIRED),
}
_OUTPUT: Spec = {"folder": (str, REQUIRED), "checkpoint_every": (int, 10)}
_RUN: Spec = {
    "name": (Literal[tuple(TRAINERS)], "regression"),
    "iterations": (int, 100),
    "precision": (Literal["no", "bf16", "fp16"], "no"),
}


class Builder(Protocol):
    """What a backend offers under its kind: it makes the model of a ``[model]`` table, and the rewards named."""

    def __call__(
        self, table: Mapping[str, Any], rewards: Sequence[str], /, *, file: Path, seed: int, device: torch.device
    ) -> tuple[Tunable, dict[str, RewardFunction]]:
        """Build a model and its rewards.

        Args:
            table: the ``[model]`` table without ``kind``, as read; the backend checks it (``check_keys``).
            rewards: the names in ``[rewards]``, each once; exactly these are returned.
            file: the settings file, for messages. Paths in the table are relative to the working folder.
            seed: of the trainable part's first values, so that every process starts from the same.
            device: where to compute: this process's own.

        Returns:
            the model, its trainable part at a start where it changes nothing, and name -> reward.

        Raises:
            ValueError: for a key or a reward that does not exist, naming those that do.
        """


@dataclass(frozen=True)
class Plan:
    """One settings file, checked as far as it can be without building the model.

    Attributes:
        file: where it came from.
        kind: the backend's name.
        model: the ``[model]`` table without ``kind``.
        rewards: name -> weight.
        trainer: the trainer's name.
        settings: the trainer's settings.
        iterations: rounds to do in all.
        precision: in which networks are evaluated: "no" (as they are), "bf16", "fp16".
        folder: where everything is written.
        checkpoint_every: iterations between checkpoints; the last is always one.
    """

    file: Path
    kind: str
    model: Mapping[str, Any]
    rewards: Mapping[str, float]
    trainer: str
    settings: Settings
    iterations: int
    precision: str
    folder: Path
    checkpoint_every: int

    # May change between an interrupted run and its resumption: what they are changes no number of an iteration.
    free: ClassVar[tuple[str, ...]] = ("trainer.iterations", "output.folder", "output.checkpoint_every")

    def fixed(self) -> dict[str, Any]:
        """Return what decides the result, "table.key" -> value as JSON has it; a resumed run must agree in all."""
        flat = {f"model.{key}": value for key, value in self.model.items()} | {"model.kind": self.kind}
        flat |= {f"rewards.{name}": weight for name, weight in self.rewards.items()}
        flat |= {f"trainer.{key}": value for key, value in dataclasses.asdict(self.settings).items()}
        flat |= {"trainer.name": self.trainer, "trainer.precision": self.precision}
        # Not JSON, which would be the one setting that no strict reader takes.
        return {key: "inf" if value == math.inf else value for key, value in sorted(flat.items())}


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Read and check a settings file; see the module's docstring.

    Raises:
        ValueError: for what cannot be used: file, table, key, and what is allowed.
        OSError: if it cannot be read.
    """
    file = Path(path)
    top = check_keys(load_toml(file), _TOP, file=file)
    kind = check_keys({k: v for k, v in top["model"].items() if k == "kind"}, {"kind": (str, REQUIRED)}, file=file,
                      section="[model]")["kind"]
    weights = check_keys(top["rewards"], dict.fromkeys(top["rewards"], (float, REQUIRED)), file=file,
                         section="[rewards]")
    if not any(weights.values()):
        raise ValueError(f"{file}: [rewards] needs at least one reward = weight with a weight other than 0; add one")
    output = check_keys(top["output"], _OUTPUT, file=file, section="[output]")
    known = {name: value for name, value in top["trainer"].items() if name in _RUN}
    run = check_keys(known, _RUN, file=file, section="[trainer]")
    for section, table, key in (("[trainer]", run, "iterations"), ("[output]", output, "checkpoint_every")):
        if table[key] < 1:
            raise ValueError(f"{file}: {section} {key} must be at least 1, got {table[key]}")
    rest = {key: value for key, value in top["trainer"].items() if key not in _RUN}
    model = {key: value for key, value in top["model"].items() if key != "kind"}
    return Plan(
        file=file,
        kind=kind,
        model=model,
        rewards=weights,
        trainer=run["name"],
        settings=read_settings(rest, trainer_of(run["name"])[1], file=file, defaults=defaults_of(kind, model)),
        iterations=run["iterations"],
        precision=run["precision"],
        folder=Path(output["folder"]),
        checkpoint_every=output["checkpoint_every"],
    )


def defaults_of(kind: str, model: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the trainers' defaults of a backend for a ``[model]`` table without ``kind``; of an unknown one, none."""
    for entry in entry_points(group=GROUP):
        if entry.name == kind:
            own = getattr(importlib.import_module(entry.module), "trainer_defaults", None)
            return {} if own is None else dict(own(model))
    return {}


def read_settings(
    table: Mapping[str, Any], kind: type[Settings], *, file: Path, defaults: Mapping[str, Any] | None = None
) -> Settings:
    """Return a trainer's settings from its table.

    A class whose defaults depend on ``mode`` has them in ``presets``, mode -> defaults.

    Args:
        table: the ``[trainer]`` table without the keys of the run.
        kind: the trainer's dataclass.
        file: for messages.
        defaults: in place of the class's own, but not of its presets; keys that it lacks do not count.

    Raises:
        ValueError: for an unknown key or a value that cannot be used.
    """
    hints = get_type_hints(kind)
    own = {f.name: f.default for f in dataclasses.fields(kind)}
    defaults = own | {key: value for key, value in (defaults or {}).items() if key in own}
    spec: dict[str, tuple[Any, Any]] = {key: (hints[key], value) for key, value in defaults.items()}
    # The one number that may be infinite.
    free = table.get("clip_norm") == math.inf
    given = {key: value for key, value in table.items() if not (free and key == "clip_norm")}
    values = check_keys(given, spec | {"clip_norm": (float, 1.0)}, file=file, section="[trainer]")
    presets: Mapping[str, Mapping[str, Any]] = getattr(kind, "presets", {})
    values |= {key: v for key, v in presets.get(values.get("mode", ""), {}).items() if key not in table}
    try:
        return kind(**(values | ({"clip_norm": math.inf} if free else {})))
    except ValueError as error:
        raise ValueError(f"{file}: [trainer] {error}") from None


def trainer_of(name: str) -> tuple[type[Trainer], type[Settings]]:
    """Return a trainer and its settings by name.

    Raises:
        ValueError: if there is none of this name.
    """
    if name not in TRAINERS:
        raise ValueError(f"there is no trainer {name!r}; the trainers are {', '.join(TRAINERS)}")
    module, trainer, settings = TRAINERS[name]
    loaded = importlib.import_module(f"sdeblend.finetune.trainers.{module}")
    return getattr(loaded, trainer), getattr(loaded, settings)


def build(plan: Plan, device: torch.device) -> tuple[Tunable, dict[str, RewardFunction]]:
    """Build the model and the rewards of a plan with the backend that it names.

    Raises:
        ValueError: if no installed package offers the kind, or for what the backend cannot use.
    """
    known = {entry.name: entry for entry in entry_points(group=GROUP)}
    if plan.kind not in known:
        raise ValueError(
            f"{plan.file}: [model] kind must be one of {', '.join(sorted(known)) or 'none (no backend is installed)'}, "
            f"got {plan.kind!r}"
        )
    builder: Builder = known[plan.kind].load()
    return builder(plan.model, tuple(plan.rewards), file=plan.file, seed=plan.settings.seed, device=device)
