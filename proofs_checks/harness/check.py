"""What a check is: a measured number, the bound it must meet, and a control that must not meet it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, computed_field
from pydantic.dataclasses import dataclass
from torch import Tensor

if TYPE_CHECKING:
    from proofs_checks.harness.figures import Figure
else:
    Figure = Any  # matplotlib is imported where something is drawn

# What two sides of an identity may differ by.
ROUNDING = 1e-10


@dataclass(frozen=True)
class Settings:
    """How a run of the checks is done.

    Attributes:
        seed: draws every problem, sample and noise of the run.
        fast: fewer problems and samples, so that all checks end within a minute on two cores.
    """

    seed: int = 0
    fast: bool = False

    def generator(self, name: str) -> torch.Generator:
        """Return the generator of one purpose; the same name and seed give the same draws."""
        digest = np.frombuffer(name.encode(), dtype=np.uint8).astype(np.uint64)
        state = np.random.SeedSequence([self.seed, *digest.tolist()]).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(state) % 2**63)

    def choose(self, fast: int, full: int) -> int:
        """Return a count: ``fast`` or ``full``."""
        return fast if self.fast else full


@dataclass(frozen=True)
class Measurement:
    """One line of the table.

    Attributes:
        what: what was measured, a phrase with its unit.
        value: the measured number.
        relation: "<=" or ">=": what the statement says of value and bound.
        bound: the number it is held against, stated before the measurement.
        control: what was broken on purpose.
        control_value: the same measurement on the broken version; must violate the bound.
    """

    what: str
    value: float
    relation: Literal["<=", ">="]
    bound: float
    control: str
    control_value: float

    @computed_field  # type: ignore[prop-decorator]
    @property
    def margin(self) -> float:
        """How far the number is on the right side, as a factor (1 = on the bound, below 1 = violated)."""
        low, high = (self.value, self.bound) if self.relation == "<=" else (self.bound, self.value)
        if low <= 0:
            return math.inf if high > low else 0.0
        return high / low

    @property
    def holds(self) -> bool:
        """Whether the statement's number meets its bound (never true for NaN)."""
        return self._meets(self.value)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def control_rejected(self) -> bool:
        """Whether the broken version was rejected (never true where there is no number to reject)."""
        known = math.isfinite(self.value) and not math.isnan(self.control_value)
        return known and not self._meets(self.control_value)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def passed(self) -> bool:
        """Whether the number meets the bound and the control does not."""
        return self.holds and self.control_rejected

    def _meets(self, value: float) -> bool:
        return value <= self.bound if self.relation == "<=" else value >= self.bound


@dataclass(frozen=True)
class Outcome:
    """What a check found.

    Attributes:
        measurements: the lines of the table.
        data: arrays and numbers for the figure (numpy, picklable).
        findings: sentences worth reading that no bound covers: how loose, how large, where.
        seconds: how long the check took; set by the runner.
    """

    measurements: list[Measurement]
    data: Annotated[dict[str, Any], Field(exclude=True)] = Field(default_factory=dict)
    findings: list[str] = Field(default_factory=list)
    seconds: float = 0.0

    @computed_field  # type: ignore[prop-decorator]
    @property
    def passed(self) -> bool:
        """Whether every measurement passed; a check that measured nothing has not passed."""
        return bool(self.measurements) and all(m.passed for m in self.measurements)


class Differences:
    """Largest differences by name, of what is checked and of what was broken on purpose.

    Args:
        controls: name -> what its control breaks, in the order of the table.
        bound: what a difference must not exceed.
    """

    def __init__(self, controls: Mapping[str, str], bound: float = ROUNDING) -> None:
        self.controls, self.bound = controls, bound
        self.largest = dict.fromkeys(controls, (0.0, 0.0))
        self.count = dict.fromkeys(controls, 0)

    def add(self, name: str, right: float, wrong: float) -> None:
        """Add one difference of the statement and of its control; a NaN stays."""
        self.count[name] += 1
        old = self.largest[name]
        self.largest[name] = (_larger(right, old[0]), _larger(wrong, old[1]))

    def compare(self, name: str, right: Tensor, wrong: Tensor, reference: Tensor) -> None:
        """Add how far the statement's side and the control's are from the reference, computed another way."""
        self.add(name, worst(right, reference), worst(wrong, reference))

    def measurements(self) -> list[Measurement]:
        """Return one line of the table each; a name without any difference is NaN and fails."""
        return [
            Measurement(
                f"{name}: relative difference", right if self.count[name] else math.nan, "<=", self.bound,
                self.controls[name], wrong,
            )
            for name, (right, wrong) in self.largest.items()
        ]  # fmt: skip

    @property
    def data(self) -> dict[str, Any]:
        """What ``figures.differences`` draws."""
        return {"differences": self.largest, "bound": self.bound}


def _larger(a: float, b: float) -> float:
    # max() drops a NaN that comes second; a difference that is no number must fail the check.
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


def worst(measured: Tensor, reference: Tensor) -> float:
    """Return max |measured - reference| / (1 + |reference|): absolute where small, relative where large."""
    return float(((measured - reference).abs() / (1 + reference.abs())).max())


def slope(x: Sequence[float] | Tensor, y: Sequence[float] | Tensor) -> float:
    """Return the power p of y ~ x^p, by least squares in logarithms."""
    u, v = (torch.as_tensor(values, dtype=torch.float64).log() for values in (x, y))
    u = u - u.mean()
    return float((u @ v) / (u @ u))
