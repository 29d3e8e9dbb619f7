"""Mixtures as a backend of ``sdeblend evaluate``: every target is known, so every method is measured against it.

    [backend]
    kind = "mixture"
    problems = ["ring8"]            # of toy.problems, "das-grid", "das-ring" or "random"
    kl_weights = [0.25]             # alpha of the members, one variant each; the problem's own if left out
    rewards = [2, 3]                # "random" only: how many, nested: the first two are those of 2
    draws = [0, 1, 2]               # "random" only: its seeds; the draws of one size are replicates of each other
    dim = 2                         # "random" and "high_dimension"
    solver = "dpm-2m-sde"           # a name of sdeblend.STEPS, with spacing and steps
    scores = "exact"                # or "learned": networks with low-rank members, with rank, train_steps
    trainings = [0, 1, 2]           # "learned" only: seeds of the networks, which are replicates of each other

Source: Kim et al. (DAS) 2501.05803 for "das-grid" and "das-ring"; their reward is split in two, x and y, whose members
are tuned at half the KL weight, so that the equal blend of the two has the published target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, Final, Literal

import torch

from sdeblend.config import REQUIRED, Spec, check_keys
from sdeblend.evaluate.backend import Variant
from sdeblend.schedule import SCHEDULES
from sdeblend.steps import STEPS
from toy.evaluate.case import MixtureCase, Posed
from toy.evaluate.learned import LearnedCase
from toy.mixtures.rewards import QuadraticReward
from toy.problems import PROBLEMS, Problem, grid9, high_dimension, random_problem, ring8_das

_DAS: Final = ("das-grid", "das-ring")
_RANDOM: Final = "random"
_SPACINGS: Any = Literal["uniform", "log-snr", "karras"]
_TABLE: Spec = {
    "problems": (list[str], REQUIRED),
    "kl_weights": (list[float], []),
    "rewards": (list[int], [2]),
    "draws": (list[int], [0]),
    "dim": (int, 0),
    "components": (int, 0),
    "schedule": (Literal[tuple(SCHEDULES)], "vp-linear"),
    "solver": (Literal[tuple(STEPS)], "dpm-2m-sde"),
    "spacing": (_SPACINGS, "log-snr"),
    "steps": (int, 50),
    "scores": (Literal["exact", "learned"], "exact"),
    "rank": (int, 8),
    "train_steps": (int, 2000),
    "trainings": (list[int], [0]),
}


class MixtureBackend:
    """Problems on mixtures.

    Args:
        posed: by variant.
        variants: what tells them apart.
        settings: schedule, solver, spacing, steps, and what scores are.
        seed: of networks.
    """

    prompts: Sequence[str] = ("",)
    identity: Mapping[str, Any] = {}

    def __init__(
        self, posed: Mapping[str, Posed], variants: Sequence[Variant], settings: Mapping[str, Any], seed: int = 0
    ) -> None:
        self.posed, self.variants, self.settings, self.seed = dict(posed), list(variants), dict(settings), seed
        self._bases: dict[bytes, Any] = {}

    def case(self, variant: str, prompt: str) -> MixtureCase:
        """Return a problem by name; there are no prompts."""
        if self.settings["scores"] == "learned":
            posed = self.posed[variant]
            return LearnedCase(posed, variant, self.settings, self.seed + posed.training, self._bases)
        return MixtureCase(self.posed[variant], variant, self.settings)


def _split(problem: Problem) -> Posed:
    """Return a problem of one reward r = r_x + r_y with two members, at half the KL weight: the same target."""
    (reward,) = problem.rewards.values()
    q, b = reward.quadratic, reward.linear
    parts = {
        name: QuadraticReward(b * keep, torch.diag(q.diagonal() * keep), constant)
        for name, keep, constant in (
            ("x", torch.tensor([1.0, 0.0]).double(), 0.0),
            ("y", torch.tensor([0.0, 1.0]).double(), reward.constant),
        )
    }
    return Posed(replace(problem, rewards=parts, kl_weight=problem.kl_weight / 2), {"r": reward})


def _pose(name: str, settings: Mapping[str, Any], rewards: int, draw: int) -> Posed:
    if name in _DAS:
        return _split(grid9() if name == "das-grid" else ring8_das())
    if name == _RANDOM:
        generator = torch.Generator().manual_seed(draw)
        problem = random_problem(
            generator, settings["dim"] or 2, settings["components"] or 6, max(settings["rewards"]), kl_weight=0.5
        )
        return Posed(replace(problem, rewards=dict(list(problem.rewards.items())[:rewards])), {})
    if name == "high_dimension" and settings["dim"]:
        return Posed(high_dimension(settings["dim"], settings["components"] or 16), {})
    return Posed(PROBLEMS[name](), {})


def build(table: Mapping[str, Any], /, *, file: str, seed: int, device: torch.device) -> MixtureBackend:
    """Build the backend from its table; see the module's docstring and ``sdeblend.evaluate.backend.Builder``."""
    settings = check_keys(table, _TABLE, file=file, section="[backend]")
    known = (*PROBLEMS, *_DAS, _RANDOM)
    for name in settings["problems"]:
        if name not in known:
            raise ValueError(f"{file}: [backend] problems must be of {', '.join(known)}, got {name!r}")
    for key, low in (("steps", 2), ("dim", 0), ("components", 0), ("rank", 1), ("train_steps", 10)):
        if settings[key] < low:
            raise ValueError(f"{file}: [backend] {key} must be at least {low}, got {settings[key]}")
    if not settings["problems"] or not settings["rewards"] or not settings["draws"] or min(settings["rewards"]) < 1:
        raise ValueError(f"{file}: [backend] needs at least one problem, one draw and one reward; name some")
    posed: dict[str, Posed] = {}
    variants = []
    learned = settings["scores"] == "learned"
    for name in settings["problems"]:
        random = name == _RANDOM
        for count, kl_weight, draw, training in product(
            settings["rewards"] if random else [0],
            settings["kl_weights"] or [None],
            settings["draws"] if random else [0],
            settings["trainings"] if learned else [0],
        ):
            one = replace(_pose(name, settings, count, draw), training=training)
            if kl_weight is not None:
                one = replace(one, problem=_at(one.problem, kl_weight, file))
            together = f"random, {count} rewards" if random else name
            values = {"kl_weight": one.problem.kl_weight, **({"rewards": float(count)} if random else {})}
            if kl_weight is not None:
                together += f", kl_weight {kl_weight:g}"
            variant = together + (f", draw {draw}" if random else "")
            variant += f", training {training}" if learned and len(settings["trainings"]) > 1 else ""
            posed[variant] = one
            variants.append(Variant(variant, one.problem.names, values, together))
    if len(posed) != len(variants):
        raise ValueError(f"{file}: [backend] must name no problem, KL weight, reward count, draw or training twice")
    return MixtureBackend(posed, variants, settings, seed)


def _at(problem: Problem, kl_weight: float, file: str) -> Problem:
    try:
        problem = problem.with_kl_weight(kl_weight)
        problem.members()
    except ValueError as error:
        raise ValueError(f"{file}: [backend] kl_weights: {error}") from None
    return problem
