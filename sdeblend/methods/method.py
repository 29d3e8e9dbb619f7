"""A method: how it samples a case, where it is from, what it costs, and which options it has.

Cost is counted, not assumed: forward passes of one member a returned sample, how many of them are differentiated too,
and evaluations of r(w). A method that cannot serve a case raises ``NotApplicable`` with the reason, one phrase.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sdeblend.methods.case import Case, Drawn
from sdeblend.methods.draws import Draws
from sdeblend.preference import Preference
from sdeblend.shell.settings import Settings

# (case, preference, draws, options) -> samples and cost; the options are a method's own.
Sampler = Callable[[Case, Preference, Draws, Any], Drawn]


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        name: in settings, tables and on the command line; unique.
        label: what people call it.
        sample: (case, preference, draws, options) -> samples and cost, all on the case's own grid and step, from the
            same start and step noise of a seed (``draws``).
        source: where it is from.
        cost: calls of one model a step and what else, in words; K members of non-zero coefficient.
        options: model of its options; ``options()`` has the defaults.
        aims: whether p_base exp(lambda r(w) / alpha), which all samples are measured against, is its limit as steps and
            particles grow and members are exact, or its stated approximation; False for methods of another law by
            construction.
    """

    name: str
    label: str
    sample: Sampler
    source: str
    cost: str
    options: type[Settings] = Settings
    aims: bool = True

    def __call__(self, case: Case, preference: Preference, draws: Draws, **options: object) -> Drawn:
        """Sample a case with options by name, the others at their defaults.

        Raises:
            ValueError: for an option that there is not, or a value that it cannot have.
            NotApplicable: if the method does not serve the case.
        """
        return self.sample(case, preference, draws, self.options(**options))
