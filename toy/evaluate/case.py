"""A problem as it is evaluated, ready to be sampled by any method: scores, rewards and target in closed form."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdeblend.baselines.drawn import Drawn, Reward
from sdeblend.baselines.interpolation import PAIR
from sdeblend.evaluate.backend import Case, Distance, Wanted
from sdeblend.grid import time_grid
from sdeblend.schedule import SCHEDULES, NoiseSchedule
from sdeblend.score import ScoreFunction
from sdeblend.steps import STEPS
from toy.evaluate.yardstick import Yardstick
from toy.mixtures.mixture import GaussianMixture
from toy.mixtures.rewards import QuadraticReward
from toy.problems import Problem
from toy.scores.stack import MixtureStack, mixture_score


@dataclass(frozen=True)
class Posed:
    """A problem as it is evaluated.

    Attributes:
        problem: base, rewards of the members, KL weight.
        reported: further rewards, by name.
        training: seed of networks, if scores are learned.
    """

    problem: Problem
    reported: Mapping[str, QuadraticReward]
    training: int = 0


class MixtureCase(Case):
    """A problem with its sampler; scores, rewards and target in closed form.

    Args:
        posed: the problem.
        variant: its name, which seeds the exact samples that others are measured against.
        settings: schedule, solver, spacing and steps.
    """

    def __init__(self, posed: Posed, variant: str, settings: Mapping[str, Any]) -> None:
        self.problem, self.variant, self.reported = posed.problem, variant, posed.reported
        self.names, self.kl_weight = self.problem.names, self.problem.kl_weight
        self.schedule: NoiseSchedule = SCHEDULES[settings["schedule"]]()
        self.step = STEPS[settings["solver"]]()
        self.grid = time_grid(self.schedule, settings["steps"], settings["spacing"])
        self.like = torch.zeros(self.problem.base.dim)
        self._known: dict[tuple[Any, ...], Yardstick] = {}

    @cached_property
    def _stack(self) -> MixtureStack:
        return self.problem.stack(self.schedule)

    def stack(self, batch: int) -> MixtureStack:
        return self._stack

    def rewards(self, samples: Tensor) -> dict[str, Tensor]:
        x = samples.double()
        return {name: reward(x) for name, reward in {**self.problem.rewards, **self.reported}.items()}

    def reward(self, name: str) -> Reward:
        return self.problem.rewards[name]

    def differentiable_base(self, batch: int) -> ScoreFunction:
        base = self.problem.base
        # The stack's closed form, in float64: its kernels work in place and know no gradient.
        return lambda x, t: base.noised(self.schedule, t).score(x).to(x)

    def score(self, role: str, wanted: Wanted, batch: int) -> ScoreFunction | None:
        return mixture_score(self.target(wanted), self.schedule) if role == "exact" else None

    def higher_order(self, role: str, wanted: Wanted, batch: int) -> tuple[MixtureStack, tuple[str, ...]]:
        problem, alpha = self.problem, self.problem.kl_weight
        laws = {"base": problem.base}
        for name in self.names if role == "half" else ():
            laws |= {f"half:{name}": problem.member(name, 2 * alpha), f"full:{name}": problem.member(name)}
        if role == "pairs":
            laws |= {name: problem.member(name) for name in self.names}
            for i, a in enumerate(self.names):
                for b in self.names[i + 1 :]:
                    both = (problem.rewards[a] + problem.rewards[b]) / 2
                    laws[a + PAIR + b] = problem.base.tilt(both, kl_weight=alpha)
        return MixtureStack(list(laws.values()), self.schedule), tuple(laws)

    def union_weights(self, wanted: Wanted) -> list[float]:
        logs = [self.problem.base.log_normalizer(r, kl_weight=self.problem.kl_weight)
                for r in self.problem.rewards.values()]
        top = max(logs)
        return [wanted.weights[name] * math.exp(z - top) for name, z in zip(self.names, logs, strict=True)]

    def target(self, wanted: Wanted) -> GaussianMixture:
        """Return p_base exp(lambda r(w) / alpha) / Z."""
        return self.problem.target(dict(wanted.weights), wanted.strength)

    def measure(self, drawn: Drawn, wanted: Wanted) -> dict[str, Distance]:
        x, log_w = drawn.samples.double().cpu(), drawn.log_weights
        found = self._reference(wanted, len(x))
        floors = found.floors(drawn.effective)
        return {name: Distance(v, *floors[name]) for name, v in found.distances(x, log_w).items()}

    def expected(self, wanted: Wanted) -> dict[str, float]:
        target = self.target(wanted)
        return {name: target.mean_reward(r) for name, r in {**self.problem.rewards, **self.reported}.items()}

    def keep(self, samples: Tensor, folder: Path, stem: str) -> dict[str, list[list[float]]]:
        if samples.shape[1] > 2:
            return {}
        return {"x": [[float(f"{v:.6g}") for v in row] for row in samples.tolist()]}

    def _reference(self, wanted: Wanted, n: int) -> Yardstick:
        # The word keeps the draws that stored results were measured with.
        key = ("target", tuple(wanted.weights.items()), wanted.strength, n)
        if key not in self._known:
            yardstick = Yardstick(self.target(wanted), n, self._generator(str(key)))
            self._known = {**dict(list(self._known.items())[-3:]), key: yardstick}
        return self._known[key]

    def _generator(self, stream: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self.variant}|{stream}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
