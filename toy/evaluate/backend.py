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

    [backend.mixtures.NAME]         # a problem of one's own: tables base and rewards as in a file of ``sdeblend toy``
    kl_weight = 0.25

Source: Kim et al. (DAS) 2501.05803 for "das-grid" and "das-ring"; their reward is split in two, x and y, whose members
are tuned at half the KL weight, so that the equal blend of the two has the published target.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from typing import Annotated, Any, Final, Literal

import torch
from pydantic import Field

from sdeblend.evaluate.backend import Backend
from sdeblend.evaluate.results import Variant
from sdeblend.grid import Spacing
from sdeblend.shell.settings import OneOf, parse
from toy.evaluate.case import MixtureCase
from toy.evaluate.learned import LearnedCase
from toy.mixtures.rewards import QuadraticReward
from toy.networks.network import Network
from toy.problems import PROBLEMS, Problem, grid9, high_dimension, random_problem, ring8_das
from toy.tables import MixtureTables, Solver

_DAS: Final = {"das-grid": grid9, "das-ring": ring8_das}
_RANDOM: Final = "random"


class OwnProblem(MixtureTables):
    """A problem of one's own.

    Attributes:
        kl_weight: alpha of the members.
    """

    kl_weight: float = Field(gt=0)


class MixtureBackendSettings(Solver):
    """The table ``[backend]`` of kind "mixture".

    Attributes:
        problems: of ``toy.problems``, "das-grid", "das-ring" or "random".
        mixtures: problems of one's own by name, beside these.
        kl_weights: alpha of the members, one variant each; by default each problem's own.
        rewards: how many, of random problems; nested: the first two are those of 2.
        draws: seeds of random problems; those of one size are replicates of each other.
        dim: of random and high-dimensional problems; 0 leaves it to them.
        components: likewise.
        scores: in closed form, or of networks with low-rank members.
        rank: of such members.
        train_steps: of such networks.
        trainings: seeds of such networks, which are replicates of each other.
    """

    problems: tuple[Annotated[str, OneOf((*PROBLEMS, *_DAS, _RANDOM))], ...] = ()
    mixtures: dict[str, OwnProblem] = Field(default_factory=dict)
    kl_weights: tuple[float, ...] = ()
    rewards: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(2,), min_length=1)
    draws: tuple[int, ...] = Field(default=(0,), min_length=1)
    dim: int = Field(default=0, ge=0)
    components: int = Field(default=0, ge=0)
    spacing: Spacing | None = "log-snr"
    scores: Literal["exact", "learned"] = "exact"
    rank: int = Field(default=8, ge=1)
    train_steps: int = Field(default=2000, ge=10)
    trainings: tuple[int, ...] = Field(default=(0,), min_length=1)

    def problem(self, name: str, rewards: int, draw: int) -> Problem:
        """Return a problem by name.

        Args:
            name: one of ``problems`` or of ``mixtures``.
            rewards, draw: of a random problem.
        """
        if name in self.mixtures:
            return self.mixtures[name].problem(name, self.mixtures[name].kl_weight)
        if name in _DAS:
            return _split(_DAS[name]())
        if name == _RANDOM:
            generator, most = torch.Generator().manual_seed(draw), max(self.rewards)
            problem = random_problem(generator, self.dim or 2, self.components or 6, most, kl_weight=0.5)
            return replace(problem, rewards=dict(list(problem.rewards.items())[:rewards]))
        if name == "high_dimension" and self.dim:
            return high_dimension(self.dim, self.components or 16)
        return PROBLEMS[name]()


class MixtureBackend(Backend):
    """Problems on mixtures.

    Args:
        settings: which problems, and how they are sampled.
        seed: of networks.

    Attributes:
        problems: by variant.
        trainings: seeds of networks by variant.

    Raises:
        ValueError: a variant that is named twice, or a KL weight at which a member does not exist.
    """

    def __init__(self, settings: MixtureBackendSettings, seed: int = 0) -> None:
        self.settings, self.seed = settings, seed
        self.problems: dict[str, Problem] = {}
        self.trainings: dict[str, int] = {}
        self.variants: list[Variant] = []
        self._bases: dict[bytes, Network] = {}
        for name in (*settings.problems, *settings.mixtures):
            self._add(name)
        if not self.variants:
            raise ValueError("needs at least one problem or mixture, got none; name some")

    def case(self, variant: str, prompt: str) -> MixtureCase:
        """Return a problem by name; there are no prompts."""
        problem, settings = self.problems[variant], self.settings
        if settings.scores == "exact":
            return MixtureCase(problem, settings, variant)
        return LearnedCase(
            problem, settings, variant, rank=settings.rank, train_steps=settings.train_steps,
            seed=self.seed + self.trainings[variant], bases=self._bases,
        )  # fmt: skip

    def _add(self, name: str) -> None:
        """Add the variants of a problem."""
        settings = self.settings
        random, learned = name == _RANDOM and name not in settings.mixtures, settings.scores == "learned"
        for count, kl_weight, draw, training in product(
            settings.rewards if random else [0],
            settings.kl_weights or [None],
            settings.draws if random else [0],
            settings.trainings if learned else [0],
        ):
            problem = settings.problem(name, count, draw)
            together = f"random, {count} rewards" if random else name
            together += "" if kl_weight is None else f", kl_weight {kl_weight:g}"
            try:
                problem = problem if kl_weight is None else problem.with_kl_weight(kl_weight)
                problem.members()
            except ValueError as error:
                raise ValueError(f"{together}: {error}") from None
            variant = together + (f", draw {draw}" if random else "")
            variant += f", training {training}" if learned and len(settings.trainings) > 1 else ""
            if variant in self.problems:
                raise ValueError(
                    f"must name no problem, KL weight, reward count, draw or training twice, got {variant!r}"
                )
            values = {"kl_weight": problem.kl_weight, **({"rewards": float(count)} if random else {})}
            self.problems[variant], self.trainings[variant] = problem, training
            self.variants.append(Variant(variant, problem.names, values, together))


def _split(problem: Problem) -> Problem:
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
    return replace(problem, rewards=parts, kl_weight=problem.kl_weight / 2, reported={"r": reward})


def build(table: Mapping[str, Any], /, *, file: str, seed: int, device: torch.device) -> MixtureBackend:
    """Build the backend from its table; see the module's docstring and ``sdeblend.evaluate.backend.Builder``."""
    settings = parse(MixtureBackendSettings, table, file=file, section="[backend]")
    try:
        return MixtureBackend(settings, seed)
    except ValueError as error:
        raise ValueError(f"{file}: [backend] {error}") from None
