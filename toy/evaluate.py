"""Mixtures as a backend of ``sdeblend evaluate``: every target is known, so every method is measured against it.

    [backend]
    kind = "mixture"
    problems = ["ring8"]            # of toy.problems, "das-grid", "das-ring" or "random"
    kl_weights = [0.25]             # alpha of the members, one variant each; the problem's own if left out
    rewards = [2, 3]                # "random" only: how many, nested: the first two are those of 2
    draws = [0, 1, 2]               # "random" only: its seeds; the draws of one size are replicates of each other
    dim = 2                         # "random" and "high_dimension"
    solver = "dpm-2m-sde"           # a name of sdeblend.STEPS, with spacing and steps
    scores = "exact"                # or "learned": networks with low-rank members (toy.learned), with rank, train_steps
    trainings = [0, 1, 2]           # "learned" only: seeds of the networks, which are replicates of each other

Distances to the exact target: total variation of the mode weights, sliced W2 to a large exact sample, and on a line
KL(samples || target) over 40 bins of equal probability under the target; each with what exact samples give.

Source: Kim et al. (DAS) 2501.05803 for "das-grid" and "das-ring"; their reward is split in two, x and y, whose members
are tuned at half the KL weight, so that the equal blend of the two has the published target.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Final, Literal

import torch
from torch import Tensor

from sdeblend.baselines.drawn import Drawn, Reward
from sdeblend.baselines.interpolation import PAIR
from sdeblend.config import REQUIRED, Spec, check_keys
from sdeblend.evaluate.backend import Case, Distance, Variant, Wanted
from sdeblend.grid import time_grid
from sdeblend.schedule import SCHEDULES, NoiseSchedule
from sdeblend.score import ScoreFunction
from sdeblend.steps import STEPS
from toy import metrics
from toy.mixtures.mixture import GaussianMixture
from toy.mixtures.rewards import QuadraticReward
from toy.problems import PROBLEMS, Problem, grid9, high_dimension, random_problem, ring8_das
from toy.scores.stack import MixtureStack, mixture_score

BINS: Final = 40
PROJECTIONS: Final = 64
REFERENCE: Final = 4
REPEATS: Final = 16
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
            from toy.learned import LearnedCase  # which builds on this module

            posed = self.posed[variant]
            return LearnedCase(posed, variant, self.settings, self.seed + posed.training, self._bases)
        return MixtureCase(self.posed[variant], variant, self.settings)


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


class Yardstick:
    """Distances of n samples to a law, and what exact samples have: the floor.

    Sliced W2 is taken to one exact sample of four times the size, the same for every method and for the floor, which
    is therefore that of this very sample. Weighted samples have the floor of as many as they are worth.

    Args:
        law: to measure against.
        n: number of samples.
        generator: draws directions, the exact sample and those of the floor.
    """

    def __init__(self, law: GaussianMixture, n: int, generator: torch.Generator) -> None:
        self.law = law
        self._floors: dict[int, dict[str, tuple[float, float]]] = {}
        directions = torch.randn(law.dim, PROJECTIONS if law.dim > 1 else 1, generator=generator, dtype=torch.float64)
        self.directions = directions / directions.norm(dim=0)
        self.quantiles = (law.sample(REFERENCE * n, generator=generator) @ self.directions).T.sort(-1).values
        self._seed = int(torch.randint(2**62, (1,), generator=generator))

    def floors(self, n: int) -> dict[str, tuple[float, float]]:
        """Return the mean and the standard deviation of each distance of n exact samples."""
        if n not in self._floors:
            generator = torch.Generator().manual_seed(self._seed + n)
            draws = [self.distances(self.law.sample(n, generator=generator), None) for _ in range(REPEATS)]
            self._floors[n] = {k: (mean(d[k] for d in draws), stdev(d[k] for d in draws)) for k in draws[0]}
        return self._floors[n]

    def distances(self, x: Tensor, log_weights: Tensor | None) -> dict[str, float]:
        """Return each distance by name, of samples (n, d) float64 and log weights (n,) or none."""
        values = {
            "mode TV": float(metrics.mode_weight_tv(x, self.law, log_weights=log_weights).value),
            "sliced W2": self._sliced_w2(x, log_weights),
        }
        if self.law.dim == 1:
            values["KL"] = self._binned_kl(x, log_weights)
        return values

    def _sliced_w2(self, x: Tensor, log_weights: Tensor | None) -> float:
        ordered, order = (x @ self.directions).T.contiguous().sort(-1)
        count, levels = len(x), self.quantiles.shape[1]
        if log_weights is None:
            at = (torch.arange(levels) * count // levels).expand(len(ordered), -1)
        else:
            top = log_weights.double().softmax(0)[order].cumsum(-1)
            middle = (torch.arange(levels, dtype=torch.float64) + 0.5) / levels
            at = torch.searchsorted(top / top[:, -1:], middle.expand(len(ordered), -1).contiguous())
        return float((ordered.gather(-1, at.clamp(max=count - 1)) - self.quantiles).square().mean().sqrt())

    def _binned_kl(self, x: Tensor, log_weights: Tensor | None) -> float:
        """Return KL(samples || law) over bins of equal probability under the law."""
        weights = torch.full((len(x),), 1 / len(x)).double() if log_weights is None else log_weights.double().softmax(0)
        scales = self.law.covariances[:, 0, 0].sqrt()
        level = torch.special.ndtr((x - self.law.means[:, 0]) / scales) @ self.law.weights
        bins = (level * BINS).long().clamp(0, BINS - 1)
        share = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, weights)
        return float(torch.special.xlogy(share, share * BINS).sum())


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
