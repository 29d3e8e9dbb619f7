"""Scores and stacks of scores.

A ``ScoreFunction`` takes (x, t), x of shape (B, *event) and t a 0-dim float64 tensor, gives S_t(x) = grad log p_t(x),
and has everything else (prompt, adapter, guidance) bound. Any callable is one: there is no module in the core. A
``ScoreStack`` gives K members in one evaluation, so that one mixture kernel or one UNet pass can serve all, and knows
their names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Self, TypeVar

import torch
from torch import Tensor

ScoreFunction = Callable[[Tensor, Tensor], Tensor]
Function = TypeVar("Function")


class Bound:
    """What may be bound to a batch (one prompt a row), and may prepare for the times of a run; by default neither.

    Score functions, stacks and rewards inherit it where they are.
    """

    def rows(self, index: Tensor) -> Self:
        """Return this for the batch rows ``index`` (long) only."""
        return self

    def prepare(self, times: Tensor) -> None:
        """Get ready for these times, as a run tells its grid; it saves time and changes no result."""


def restrict_rows(function: Function, index: Tensor) -> Function:
    """Return ``function`` for the batch rows ``index`` only: itself unless it is bound to its batch."""
    return function.rows(index) if isinstance(function, Bound) else function


def prepare_times(function: object, times: Tensor) -> None:
    """Let a score or stack that can prepare for the times of a run do so."""
    if isinstance(function, Bound):
        function.prepare(times)


class ScoreStack(Bound, ABC):
    """K scores in one evaluation; every stack inherits from this.

    Attributes:
        names: of the members after the base, which is the first: K - 1 different ones; None if they have none.
    """

    names: tuple[str, ...] | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __call__(self, x: Tensor, t: Tensor, active: Sequence[int] | None = None, /) -> Tensor:
        """Return (K, B, *event): all scores, or only those at the positions ``active``, in that order."""


class Stack(ScoreStack):
    """Separate score functions, evaluated one after the other.

    Args:
        functions: K score functions, (x, t) -> (B, *event).
        names: of all but the first, so that a preference can weigh them by name; None if they have none.

    Raises:
        TypeError: if one of them is not callable.
        ValueError: no function, or names that do not fit.
    """

    def __init__(self, functions: Sequence[ScoreFunction], names: Sequence[str] | None = None) -> None:
        self.functions = tuple(functions)
        for i, function in enumerate(self.functions):
            if not callable(function):
                raise TypeError(f"a stack needs score functions (x, t) -> score, got {type(function).__name__} at {i}")
        if not self.functions:
            raise ValueError("a stack needs at least one score function, got none")
        self.names = check_names(names, len(self.functions))

    def __len__(self) -> int:
        return len(self.functions)

    def __call__(self, x: Tensor, t: Tensor, active: Sequence[int] | None = None) -> Tensor:
        chosen = range(len(self)) if active is None else active
        return torch.stack([self.functions[k](x, t) for k in chosen])

    def prepare(self, times: Tensor) -> None:
        for function in self.functions:
            prepare_times(function, times)

    def rows(self, index: Tensor) -> Stack:
        return Stack([restrict_rows(function, index) for function in self.functions], self.names)


def check_names(names: Sequence[str] | None, count: int) -> tuple[str, ...] | None:
    """Return the names of a stack of ``count`` scores, those after the base, or raise unless they fit.

    Raises:
        ValueError: not one a member after the base, or a name twice.
    """
    if names is None:
        return None
    out = tuple(names)
    if isinstance(names, str) or len(out) != count - 1 or len(set(out)) != len(out):
        raise ValueError(
            f"a stack of {count} scores needs {count - 1} different names, of the members after the base, "
            f"got {list(out)}"
        )
    return out
