"""Mixtures, rewards and solvers as tables of a file: one format for ``sdeblend toy`` and ``sdeblend evaluate``.

    [base]          weights, means, and either covariances or variances (isotropic)
    [[rewards]]     name, linear, quadratic, constant: r(x) = constant + linear.x - x'quadratic x / 2

Every message names the file, the table and what is allowed.

Source: TOML 1.0.0.
"""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Final

from pydantic import Field, model_validator
from torch import Tensor

from sdeblend.grid import Spacing, time_grid
from sdeblend.schedule import SCHEDULES, NoiseSchedule
from sdeblend.shell.settings import OneOf, Settings
from sdeblend.steps import STEPS, Step
from toy.mixtures.mixture import GaussianMixture
from toy.mixtures.rewards import QuadraticReward
from toy.problems import Problem

MAX_STEPS: Final = 10_000
Row = tuple[float, ...]
Matrix = tuple[Row, ...]
# Exponential integrators run on the clock in which they are exact; the others on the time of the schedule.
_SPACINGS: Final[dict[str, Spacing]] = {"dpm-2m-sde": "log-snr", "dpm-2m": "log-snr", "heun": "log-snr"}


class BaseTable(Settings):
    """A mixture.

    Attributes:
        weights: of the components, which sum to 1.
        means: one a component.
        covariances: one matrix a component; or give variances.
        variances: one number a component, which is isotropic.
    """

    weights: Row
    means: Matrix
    covariances: tuple[Matrix, ...] | None = None
    variances: Row | None = None

    @cached_property
    def mixture(self) -> GaussianMixture:
        """The mixture."""
        given = [key for key in ("covariances", "variances") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"needs either covariances or variances, got {' and '.join(given) or 'neither'}; give one")
        return GaussianMixture(self.weights, self.means, getattr(self, given[0]))

    @model_validator(mode="after")
    def _exists(self) -> BaseTable:
        _built(self, "mixture")
        return self


class RewardTable(Settings):
    """A linear or quadratic reward, at least one of the two.

    Attributes:
        name: of the reward and of the member tuned for it.
        linear: b, one number a dimension.
        quadratic: Q, symmetric.
        constant: c.
    """

    name: str
    linear: Row | None = None
    quadratic: Matrix | None = None
    constant: float = 0.0

    @cached_property
    def reward(self) -> QuadraticReward:
        """The reward."""
        return QuadraticReward(self.linear, self.quadratic, self.constant)

    @model_validator(mode="after")
    def _exists(self) -> RewardTable:
        _built(self, "reward")
        return self


class MixtureTables(Settings):
    """A mixture and rewards on it.

    Attributes:
        base: the pre-trained law.
        rewards: at least one.
    """

    base: BaseTable
    rewards: tuple[RewardTable, ...]

    @model_validator(mode="after")
    def _fits(self) -> MixtureTables:
        if not self.rewards:
            raise ValueError("a problem needs at least one reward, got none; add a table [[rewards]]")
        names = [table.name for table in self.rewards]
        for place, table in enumerate(self.rewards):
            head = f"[[rewards]] {place + 1}:"
            if not table.name.strip() or table.name in names[:place]:
                raise ValueError(f"{head} name must be neither empty nor taken, got {table.name!r}; choose another")
            if table.reward.dim != self.base.mixture.dim:
                raise ValueError(
                    f"{head} the base has dimension {self.base.mixture.dim}, got a reward in {table.reward.dim}; make "
                    "them fit"
                )
        return self

    def problem(self, name: str, kl_weight: float) -> Problem:
        """Return the problem of these tables.

        Args:
            name: of the problem.
            kl_weight: alpha of the members.

        Raises:
            ValueError: kl_weight not above 0.
        """
        return Problem(name, self.base.mixture, {table.name: table.reward for table in self.rewards}, kl_weight)


class Solver(Settings):
    """What all methods run on.

    Attributes:
        schedule: the forward process.
        solver: the step.
        spacing: of the grid; by default what suits the solver.
        steps: how many.
    """

    schedule: Annotated[str, OneOf(SCHEDULES)] = "vp-linear"
    solver: Annotated[str, OneOf(STEPS)] = "dpm-2m-sde"
    spacing: Spacing | None = None
    steps: int = Field(default=50, ge=2, le=MAX_STEPS)

    def process(self) -> NoiseSchedule:
        """Return the forward process."""
        return SCHEDULES[self.schedule]()

    def step(self) -> Step:
        """Return the step."""
        return STEPS[self.solver]()

    def grid(self) -> Tensor:
        """Return the times, (steps + 1,)."""
        return time_grid(self.process(), self.steps, self.spacing or _SPACINGS.get(self.solver, "uniform"))


def _built(table: Settings, what: str) -> None:
    """Let a table make what it holds, so that what cannot be is refused where it is read."""
    try:
        getattr(table, what)
    except TypeError as error:
        raise ValueError(str(error)) from error
