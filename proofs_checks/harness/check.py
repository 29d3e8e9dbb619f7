"""What a check is: a measured number, the bound it must meet, and a control that must not meet it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch


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

    @property
    def holds(self) -> bool:
        """Whether the statement's number meets its bound (never true for NaN)."""
        return self._meets(self.value)

    @property
    def has_power(self) -> bool:
        """Whether the broken version was rejected."""
        return math.isfinite(self.value) and not self._meets(self.control_value)

    @property
    def passed(self) -> bool:
        """Whether the number meets the bound and the control does not."""
        return self.holds and self.has_power

    @property
    def margin(self) -> float:
        """How far the number is on the right side, as a factor (1 = on the bound, below 1 = violated)."""
        low, high = (self.value, self.bound) if self.relation == "<=" else (self.bound, self.value)
        if low <= 0:
            return math.inf if high > low else 0.0
        return high / low

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
    data: dict[str, Any] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether every measurement passed; a check that measured nothing has not passed."""
        return bool(self.measurements) and all(m.passed for m in self.measurements)
