"""What an evaluation needs of a backend: problems, rewards and scores, by one protocol for mixtures and for images.

A backend is an entry point of the group ``sdeblend.backends``: a kind and a function, ``Builder``, which makes it from
the ``[backend]`` table. It offers variants (problems, or one problem at several KL weights, ...) and prompts; a
``Case`` is one variant and one prompt, ready to be sampled by any method. What a backend cannot do it leaves out: a
method that needs it is then left out with a reason, and the rest runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sdeblend.baselines.drawn import Drawn, Reward
from sdeblend.blend import Blend, Preference
from sdeblend.evaluate.draws import Draws
from sdeblend.schedule import NoiseSchedule
from sdeblend.score import ScoreFunction, ScoreStack
from sdeblend.sde import BackwardSDE
from sdeblend.solve import solve
from sdeblend.steps import Step

GROUP = "sdeblend.backends"


@dataclass(frozen=True)
class Wanted:
    """What is asked for: w by reward, and lambda.

    Attributes:
        weights: w_i by name of the reward, in the order of the members.
        strength: lambda.
    """

    weights: Mapping[str, float]
    strength: float = 1.0

    @property
    def coefficients(self) -> Tensor:
        """Coefficients over (base, members), float64 (1 + m,)."""
        return Preference(dict(self.weights), self.strength).coefficients()


@dataclass(frozen=True)
class Variant:
    """One of a backend's problems.

    Attributes:
        name: unique.
        rewards: names of the members' rewards, in order.
        values: numbers that tell it from the others (``{"kl_weight": .25}``), for the axes of figures.
        group: variants of one group are replicates of each other, and reported together.
    """

    name: str
    rewards: tuple[str, ...]
    values: Mapping[str, float] = field(default_factory=dict)
    group: str = ""

    @property
    def together(self) -> str:
        """The name of the group, or its own."""
        return self.group or self.name


@dataclass(frozen=True)
class Distance:
    """A distance to the exact target.

    Attributes:
        value: of the samples; NaN if it cannot be told.
        floor: what exact samples of the same number have on average; None if not known.
        floor_sd: standard deviation of that from one set of exact samples to another.
    """

    value: float
    floor: float | None = None
    floor_sd: float | None = None


class Case(ABC):
    """One variant and one prompt, ready to be sampled.

    Attributes:
        names: the members' rewards, in the order of ``stack`` after the base.
        schedule, grid, step: the sampler that all methods share.
        like: a tensor (*event) of the dtype and on the device of the state.
        kl_weight: alpha of the members, None if not known.
        failures: sentences on samples that a reward failed on, since the cell began.
        kept_at: the results folder, below which these samples are kept, and how their names begin; None keeps none.
    """

    names: tuple[str, ...]
    schedule: NoiseSchedule
    grid: Tensor
    step: Step
    like: Tensor
    kl_weight: float | None = None
    failures: Sequence[str] = ()
    kept_at: tuple[Path, str] | None = None
    _base: tuple[Draws, Tensor] | None = None

    def begin(self, folder: Path, stem: str) -> None:
        """Begin a cell: forget the failures of the last one.

        Args:
            folder: the results folder.
            stem: of the cell, unique.
        """
        self.kept_at, self.failures = (folder, stem), ()

    @abstractmethod
    def stack(self, batch: int) -> ScoreStack:
        """Return base and members, for a batch of this many rows."""

    @abstractmethod
    def rewards(self, samples: Tensor) -> Mapping[str, Tensor]:
        """Return every reward that is reported, (B,) by name: the members' and others; NaN where it failed.

        Args:
            samples: (B, *event).
        """

    @abstractmethod
    def reward(self, name: str) -> Reward:
        """Return one member's reward as methods see it, clean states (B, *event) -> (B,), NaN where it failed."""

    def differentiable(self, name: str) -> Reward | None:
        """Return one member's reward, or what stands in for it, with a gradient; None if there is none."""
        return self.reward(name)

    def weighted(self, wanted: Wanted) -> Reward:
        """Return strength times r(w) as methods see it."""
        parts = [(wanted.strength * w, self.reward(name)) for name, w in wanted.weights.items() if w]

        def total(x: Tensor) -> Tensor:
            out = torch.zeros(len(x), dtype=x.dtype, device=x.device)
            for weight, reward in parts:
                out = out + weight * reward(x)
            return out

        return total

    def differentiable_base(self, batch: int) -> ScoreFunction | None:
        """Return the base's score as a function that is differentiable in x."""
        return None

    def score(self, role: str, wanted: Wanted, batch: int) -> ScoreFunction | None:
        """Return a score of one model: "exact" (tuned for r(w) itself), "soup-deltas" or "soup-factors"; or None."""
        return None

    def higher_order(self, role: str, wanted: Wanted, batch: int) -> tuple[ScoreStack, tuple[str, ...]] | None:
        """Return more members and their names, the base first.

        Args:
            role: "half": base, then "half:name" and "full:name" of each reward, tuned at twice the KL weight and at
                the KL weight. "pairs": base, members by name, then "a+b" tuned for (r_a + r_b) / 2.
            wanted: what for.
            batch: rows.
        """
        return None

    def union_weights(self, wanted: Wanted) -> Sequence[float]:
        """Return v_i of the mixture of members that p_base sum_i w_i exp(r_i / alpha) is; w_i Z_i, if Z_i is known."""
        return list(wanted.weights.values())

    def measure(self, drawn: Drawn, wanted: Wanted) -> Mapping[str, Distance]:
        """Return distances of the samples of one cell to the exact target p_base exp(lambda r(w) / alpha).

        Args:
            drawn: samples and weights.
            wanted: what was asked for.
        """
        return {}

    def expected(self, wanted: Wanted) -> Mapping[str, float]:
        """Return the mean of rewards under the exact target, by name; none where it is not known."""
        return {}

    def describe(self, drawn: Drawn, draws: Draws) -> Mapping[str, float]:
        """Return further numbers on the samples of one cell, by name; means of them over cells are reported.

        Here what ``moved`` returns.

        Args:
            drawn: samples and weights.
            draws: what they were drawn with.
        """
        return moved(drawn, drawn.samples, self.base(draws))

    def base(self, draws: Draws) -> Tensor:
        """Return the base's samples (B, *event); those of the last draws are remembered."""
        if self._base is None or self._base[0] is not draws:
            c = torch.zeros(1 + len(self.names), dtype=torch.float64)
            c[0] = 1
            sde = BackwardSDE(self.schedule, Blend(self.stack(len(draws)), c))
            x = draws.start(self.like, self.schedule.prior_std())
            self._base = draws, solve(sde, x, self.grid, step=self.step, noise=draws.noise()).samples
        return self._base[1]

    def keep(self, samples: Tensor, folder: Path, stem: str) -> Mapping[str, Sequence[Any]]:
        """Return what rows store of the samples themselves, by column; files go below ``folder``, named from ``stem``.

        Args:
            samples: (B, *event).
            folder: the results folder.
            stem: of the cell, unique.
        """
        return {}


def moved(drawn: Drawn, seen: Tensor, base: Tensor) -> dict[str, float]:
    """Return ``moved``: how far samples are from the base's on the same start and step noise.

    The weighted mean of the root mean square over coordinates. A sample that was resampled on the way is set against
    the base's from the start that it descends from; what chose among starts or noises of its own has no such partner,
    and no ``moved``.

    Args:
        drawn: samples and weights.
        seen: the samples as they are compared, (B, ...).
        base: the base's, (B, ...), one a start.
    """
    if not drawn.paired:
        return {}
    partners = base if drawn.ancestors is None else base[drawn.ancestors.to(base.device)]
    each = (seen - partners).flatten(1).square().mean(1).sqrt().double()
    if drawn.log_weights is None:
        return {"moved": float(each.mean())}
    return {"moved": float(drawn.log_weights.to(each).softmax(0) @ each)}


class Backend(Protocol):
    """Problems to be evaluated on.

    Attributes:
        variants: at least one.
        prompts: at least one; ("",) where there is nothing to say.
        identity: what pins results besides the settings (versions or hashes of weights), as JSON has it.
    """

    variants: Sequence[Variant]
    prompts: Sequence[str]
    identity: Mapping[str, Any]

    def case(self, variant: str, prompt: str) -> Case:
        """Return one variant and prompt, by name."""


class Builder(Protocol):
    """What a backend offers under its kind."""

    def __call__(self, table: Mapping[str, Any], /, *, file: str, seed: int, device: torch.device) -> Backend:
        """Build a backend; models load when a case is asked for.

        Args:
            table: the ``[backend]`` table without ``kind``, as read; the backend checks it (``check_keys``).
            file: the settings file, for messages.
            seed: of the run.
            device: where to compute: this process's own.

        Raises:
            ValueError: for a key or a value that cannot be used.
        """


def build(kind: str, table: Mapping[str, Any], *, file: str, seed: int, device: torch.device) -> Backend:
    """Build the backend of a kind.

    Raises:
        ValueError: if no installed package offers the kind, or for what the backend cannot use.
    """
    known = {entry.name: entry for entry in entry_points(group=GROUP)}
    if kind not in known:
        raise ValueError(
            f"{file}: [backend] kind must be one of {', '.join(sorted(known)) or 'none (no backend is installed)'}, "
            f"got {kind!r}"
        )
    builder: Builder = known[kind].load()
    return builder(table, file=file, seed=seed, device=device)
