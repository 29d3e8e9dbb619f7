"""A problem as it is evaluated, ready to be sampled by any method: scores, rewards and target in closed form."""

from __future__ import annotations

import hashlib
import math
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdeblend.evaluate.backend import MeasuredCase
from sdeblend.evaluate.results import Distance
from sdeblend.methods.case import Drawn, MoreMembers, OneModel, StateReward
from sdeblend.methods.interpolation import PAIR
from sdeblend.preference import Preference
from sdeblend.score import ScoreFunction
from toy.evaluate.yardstick import Yardstick
from toy.mixtures.mixture import GaussianMixture
from toy.problems import Problem
from toy.scores.stack import MixtureStack, mixture_score
from toy.tables import Solver


class MixtureCase(MeasuredCase):
    """A problem with its sampler; scores, rewards and target in closed form.

    Args:
        problem: base, rewards and KL weight.
        solver: schedule, step and grid.
        variant: name of the case, which seeds the exact samples that others are measured against.
    """

    def __init__(self, problem: Problem, solver: Solver, variant: str) -> None:
        self.problem, self.variant = problem, variant
        self.names, self.kl_weight = problem.names, problem.kl_weight
        self.schedule, self.step, self.grid = solver.process(), solver.step(), solver.grid()
        self.like = torch.zeros(problem.base.dim)
        self._known: dict[tuple[Any, ...], Yardstick] = {}

    @cached_property
    def _stack(self) -> MixtureStack:
        return self.problem.stack(self.schedule)

    def stack(self, batch: int) -> MixtureStack:
        return self._stack

    def rewards(self, samples: Tensor) -> dict[str, Tensor]:
        x = samples.double()
        return {name: reward(x) for name, reward in self.problem.measured.items()}

    def reward(self, name: str) -> StateReward:
        return self.problem.rewards[name]

    def differentiable_base(self, batch: int) -> ScoreFunction:
        base = self.problem.base
        # The stack's closed form, in float64: its kernels work in place and know no gradient.
        return lambda x, t: base.noised(self.schedule, t).score(x).to(x)

    def score(self, role: OneModel, preference: Preference, batch: int) -> ScoreFunction | None:
        return mixture_score(self.target(preference), self.schedule) if role == "exact" else None

    def higher_order(
        self, role: MoreMembers, preference: Preference, batch: int
    ) -> tuple[MixtureStack, tuple[str, ...]]:
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

    def union_weights(self, preference: Preference) -> list[float]:
        base, alpha = self.problem.base, self.problem.kl_weight
        logs = [base.log_normalizer(reward, kl_weight=alpha) for reward in self.problem.rewards.values()]
        top = max(logs)
        return [w * math.exp(z - top) for w, z in zip(self.weights(preference).values(), logs, strict=True)]

    def target(self, preference: Preference) -> GaussianMixture:
        """Return p_base exp(lambda r(w) / alpha) / Z."""
        return self.problem.target(preference)

    def measure(self, drawn: Drawn, preference: Preference) -> dict[str, Distance]:
        x, log_w = drawn.samples.double().cpu(), drawn.log_weights
        found = self._reference(preference, len(x))
        floors = found.floors(drawn.effective)
        return {name: Distance(v, *floors[name]) for name, v in found.distances(x, log_w).items()}

    def expected(self, preference: Preference) -> dict[str, float]:
        target = self.target(preference)
        return {name: target.mean_reward(r) for name, r in self.problem.measured.items()}

    def keep(self, samples: Tensor, folder: Path, stem: str) -> dict[str, list[list[float]]]:
        if samples.shape[1] > 2:
            return {}
        return {"x": [[float(f"{v:.6g}") for v in row] for row in samples.tolist()]}

    def _reference(self, preference: Preference, n: int) -> Yardstick:
        # The word keeps the draws that stored results were measured with.
        key = ("target", tuple(self.weights(preference).items()), preference.strength, n)
        if key not in self._known:
            yardstick = Yardstick(self.target(preference), n, self._generator(str(key)))
            self._known = {**dict(list(self._known.items())[-3:]), key: yardstick}
        return self._known[key]

    def _generator(self, stream: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self.variant}|{stream}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
