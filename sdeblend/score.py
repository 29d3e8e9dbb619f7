"""Scores, stacks of scores, and the parametrisations that networks predict instead.

The score is S_t(x) = grad log p_t(x). A network may predict any of

    score = -eps / sigma,   eps,   x0,   v = alpha eps - sigma x0,   flow u = alpha' x0 + sigma' eps,

all of the form ``c x0 + d eps`` with x = alpha x0 + sigma eps. Given x and one of them, the other is

    target = [ (c' d - d' c) x + (d' alpha - c' sigma) value ] / (alpha d - sigma c),

affine in the prediction with a slope that does not depend on x. So a combination with coefficients that
sum to one means the same in every parametrisation; this one fact carries the whole library.

A ``ScoreFunction`` takes (x, t), x of shape (B, *event) and t a 0-dim float64 tensor, and has everything
else (prompt, adapter, guidance) bound. Any callable is one: there is no module in the core. A ``ScoreStack`` gives K
members in one evaluation, so that one mixture kernel or one UNet pass can serve all, and knows their names.

Source: Salimans and Ho 2202.00512 (v); Lipman et al. 2210.02747 (flow).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal, Self, TypeVar, get_args

import torch
from torch import Tensor

from sdeblend.schedule import NoiseSchedule, Time

Parametrisation = Literal["score", "eps", "x0", "v", "flow"]
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


def member_scores(stack: ScoreStack, x: Tensor, t: Tensor, member: Tensor) -> Tensor:
    """Evaluate each row by one member of its own: one evaluation a row, whatever K is.

    Args:
        stack: K members.
        x: state (B, *event).
        t: time, 0-dim.
        member: which member serves each row, long (B,).

    Returns:
        scores (B, *event).
    """
    used = member.unique().tolist()
    if len(used) == 1:
        return stack(x, t, used)[0]
    out = torch.empty_like(x)
    for k in used:
        index = (member == k).nonzero().flatten()
        out[index] = restrict_rows(stack, index)(x[index], t, [k])[0]
    return out


def _clean_and_noise(schedule: NoiseSchedule, t: Time, name: str) -> tuple[Tensor, Tensor]:
    """Return (c, d) with ``name = c x0 + d eps``."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    if name == "score":
        return zero, -1 / sigma
    if name == "eps":
        return zero, one
    if name == "x0":
        return one, zero
    if name == "v":
        return -sigma, alpha
    if name == "flow":
        return schedule.alpha_rate(t), schedule.sigma_rate(t)
    raise ValueError(f"a parametrisation must be one of {', '.join(get_args(Parametrisation))}, got {name!r}")


def conversion(
    schedule: NoiseSchedule, t: Time, source: Parametrisation, target: Parametrisation
) -> tuple[Tensor, Tensor]:
    """Return float64 (p, q) with ``target = p x + q source`` at time t, shaped as t.

    Args:
        schedule: the forward process.
        t: time, t > 0.
        source: what is given.
        target: what is wanted.

    Raises:
        ValueError: for an unknown name.

    Source: module docstring; Salimans and Ho 2202.00512, appendix D.
    """
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    c, d = _clean_and_noise(schedule, t, source)
    c2, d2 = _clean_and_noise(schedule, t, target)
    determinant = alpha * d - sigma * c
    return (c2 * d - d2 * c) / determinant, (d2 * alpha - c2 * sigma) / determinant


def convert(
    value: Tensor,
    x: Tensor,
    t: Time,
    schedule: NoiseSchedule,
    *,
    source: Parametrisation,
    target: Parametrisation,
) -> Tensor:
    """Convert a prediction from one parametrisation to another.

    Args:
        value: the prediction, (B, *event), or (K, B, *event) for a stack.
        x: the state it was made at, (B, *event).
        t: time, 0-dim, t > 0.
        schedule: the forward process.
        source: what ``value`` is: "score", "eps", "x0", "v" or "flow".
        target: what is wanted.

    Returns:
        the same prediction as ``target``, shaped as ``value``.
    """
    if source == target:
        return value
    p, q = conversion(schedule, t, source, target)
    return float(p) * x + float(q) * value
