"""Problem files: a mixture, rewards and a blend in TOML, checked before anything is computed.

    [base]          weights, means, and either covariances or variances (isotropic)
    [[rewards]]     name, linear, quadratic, constant: r(x) = constant + linear.x - x'quadratic x / 2
    [blend]         kl_weight, weights (one a reward); strength, methods, schedule, solver, spacing, steps,
                    samples, seed have defaults (``toy.experiment.settings.Settings``)

Every message names the file, the table and what is allowed.

Source: TOML 1.0.0.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args

from sdeblend.config import REQUIRED, Kind, check_keys, load_toml
from sdeblend.grid import Spacing
from sdeblend.schedule import SCHEDULES
from sdeblend.steps import STEPS
from toy.experiment.settings import METHODS, Settings, prepare
from toy.mixtures.mixture import GaussianMixture
from toy.mixtures.rewards import QuadraticReward
from toy.problems import Problem


def _one_of(names: Iterable[str]) -> Kind:
    literal: Any = Literal
    return literal[tuple(names)]


_MATRIX: Kind = list[list[float]]
_DEFAULTS = {field.name: field.default for field in fields(Settings)}
_TOP = {"base": (dict, REQUIRED), "rewards": (list[dict], REQUIRED), "blend": (dict, REQUIRED)}
_BASE = {
    "weights": (list[float], REQUIRED),
    "means": (_MATRIX, REQUIRED),
    "covariances": (list[list[list[float]]], None),
    "variances": (list[float], None),
}
_REWARD = {
    "name": (str, REQUIRED),
    "linear": (list[float], None),
    "quadratic": (_MATRIX, None),
    "constant": (float, 0.0),
}
_BLEND = {
    "kl_weight": (float, REQUIRED),
    "weights": (list[float], REQUIRED),
    "strength": (float, _DEFAULTS["strength"]),
    "methods": (list[_one_of(METHODS)], None),  # type: ignore[misc]
    "schedule": (_one_of(SCHEDULES), _DEFAULTS["schedule"]),
    "solver": (_one_of(STEPS), _DEFAULTS["solver"]),
    "spacing": (_one_of(get_args(Spacing)), None),
    "steps": (int, _DEFAULTS["steps"]),
    "samples": (int, _DEFAULTS["samples"]),
    "seed": (int, _DEFAULTS["seed"]),
}


def load_problem(path: str | os.PathLike[str]) -> tuple[Problem, Settings]:
    """Read a problem file.

    Args:
        path: The TOML file.

    Returns:
        The problem, named after the file, and the settings of its blend; ``toy.experiment.run`` takes both.

    Raises:
        ValueError: If the file is not TOML or something in it cannot be used; names the file, the table and the
            key or the component, and says what is allowed.
        OSError: If it cannot be read.
    """
    top = check_keys(load_toml(path), _TOP, file=path)
    with _told_with(f"{path}: [base]"):
        base = _base(check_keys(top["base"], _BASE, file=path, section="[base]"))
    rewards = _rewards(top["rewards"], base.dim, path)
    blend = check_keys(top["blend"], _BLEND, file=path, section="[blend]")
    with _told_with(f"{path}: [blend]"):
        problem = Problem(Path(path).stem, base, rewards, blend.pop("kl_weight"))
        settings = Settings(**blend)
        prepare(problem, settings)
    return problem, settings


def _base(table: Mapping[str, Any]) -> GaussianMixture:
    given = [key for key in ("covariances", "variances") if table[key] is not None]
    if len(given) != 1:
        raise ValueError(f"needs either covariances or variances, got {' and '.join(given) or 'neither'}; give one")
    return GaussianMixture(table["weights"], table["means"], table[given[0]])


def _rewards(tables: list[dict[str, Any]], dim: int, path: str | os.PathLike[str]) -> dict[str, QuadraticReward]:
    rewards: dict[str, QuadraticReward] = {}
    for place, raw in enumerate(tables, start=1):
        section = f"[[rewards]] {place}"
        with _told_with(f"{path}: {section}"):
            table = check_keys(raw, _REWARD, file=path, section=section)
            name = table["name"]
            if not name.strip() or name in rewards:
                raise ValueError(f"name must be neither empty nor taken, got {name!r}; name every reward differently")
            reward = QuadraticReward(table["linear"], table["quadratic"], table["constant"])
            if reward.dim != dim:
                raise ValueError(f"the base has dimension {dim}, got a reward in {reward.dim}; make them fit")
            rewards[name] = reward
    if not rewards:
        raise ValueError(f"{path}: a problem needs at least one reward, got none; add a table [[rewards]]")
    return rewards


@contextmanager
def _told_with(place: str) -> Iterator[None]:
    """Put ``place`` before the message of what is raised, unless it is there already."""
    try:
        yield
    except (ValueError, TypeError) as error:
        if str(error).startswith(place):
            raise
        raise ValueError(f"{place}: {error}") from error
