"""What an evaluation needs of a backend: problems, rewards and scores, by one protocol for mixtures and for images.

A backend is an entry point of the group ``sdeblend.backends``: a kind and a function, ``Builder``, which makes it from
the ``[backend]`` table. It offers variants (problems, or one problem at several KL weights, ...) and prompts; a
``MeasuredCase`` is one variant and one prompt, ready to be sampled by any method, and its samples to be measured. What
a backend cannot do it leaves out: a method that needs it is then left out with a reason, and the rest runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import JsonValue
from torch import Tensor

from sdeblend.evaluate.results import Distance, Scale, Variant
from sdeblend.methods.case import Case, Drawn
from sdeblend.methods.draws import Draws
from sdeblend.preference import Preference


class MeasuredCase(Case):
    """One variant and one prompt, ready to be sampled and measured.

    Attributes:
        failures: sentences on samples that a reward failed on, since the cell began.
        kept_at: the results folder, below which these samples are kept, and how their names begin; None keeps none.
    """

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
    def rewards(self, samples: Tensor) -> Mapping[str, Tensor]:
        """Return every reward that is reported, (B,) by name: the members' and others; NaN where it failed.

        Args:
            samples: (B, *event).
        """

    def measure(self, drawn: Drawn, preference: Preference) -> Mapping[str, Distance]:
        """Return distances of the samples of one cell to the exact target p_base exp(lambda r(w) / alpha).

        Args:
            drawn: samples and weights.
            preference: what was asked for.
        """
        return {}

    def expected(self, preference: Preference) -> Mapping[str, float]:
        """Return the mean of rewards under the exact target, by name; none where it is not known."""
        return {}

    def describe(self, drawn: Drawn, draws: Draws) -> Mapping[str, float]:
        """Return further numbers on the samples of one cell, by name; means of them over cells are reported.

        Here what ``moved`` returns.

        Args:
            drawn: samples and weights.
            draws: what they were drawn with.
        """
        return moved(drawn, drawn.samples, self.base_samples(draws))

    def base_samples(self, draws: Draws) -> Tensor:
        """Return the base's samples (B, *event); those of the last draws are remembered."""
        if self._base is None or self._base[0] is not draws:
            self._base = draws, self.solve(self.base(len(draws)), draws).samples
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


class Backend(ABC):
    """Problems to be evaluated on.

    Attributes:
        variants: at least one.
        prompts: at least one; ("",) where there is nothing to say.
        identity: what pins results besides the settings (versions or hashes of weights), as JSON has it.
        scales: of rewards that are reported in units of one.
    """

    variants: Sequence[Variant]
    prompts: Sequence[str] = ("",)

    @property
    def identity(self) -> Mapping[str, JsonValue]:
        return {}

    @property
    def scales(self) -> Sequence[Scale]:
        return ()

    @abstractmethod
    def case(self, variant: str, prompt: str) -> MeasuredCase:
        """Return one variant and prompt, by name."""


class Builder(Protocol):
    """What a package offers as an entry point of the group ``sdeblend.backends``, under a kind."""

    def __call__(self, table: Mapping[str, Any], /, *, file: str, seed: int, device: torch.device) -> Backend:
        """Build a backend; models load when a case is asked for.

        Args:
            table: the ``[backend]`` table without ``kind``, as read; the backend checks it.
            file: the settings file, for messages.
            seed: of the run.
            device: where to compute: this process's own.

        Raises:
            ValueError: for a key or a value that cannot be used.
        """
