"""Scores, stacks of scores, and the parametrisations that networks predict instead.

The score is S_t(x) = grad log p_t(x). A network may predict any of

    score = -eps / sigma,   eps,   x0,   v = alpha eps - sigma x0,   flow u = alpha' x0 + sigma' eps,

all of the form ``c x0 + d eps`` with x = alpha x0 + sigma eps. Given x and one of them, the other is

    target = [ (c' d - d' c) x + (d' alpha - c' sigma) value ] / (alpha d - sigma c),

affine in the prediction with a slope that does not depend on x. So a combination with coefficients that
sum to one means the same in every parametrisation; this one fact carries the whole library.

A ``ScoreFunction`` takes (x, t), x of shape (B, *event) and t a 0-dim float64 tensor, and has everything
else (prompt, adapter, guidance) bound. A ``ScoreStack`` gives K members in one evaluation, so that one
mixture kernel or one UNet pass can serve all. Any callable is a score: there is no module in the core.

Source: Salimans and Ho 2202.00512 (v); Lipman et al. 2210.02747 (flow).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

from sdeblend.schedule import NoiseSchedule, Time

Parametrisation = Literal["score", "eps", "x0", "v", "flow"]
ScoreFunction = Callable[[Tensor, Tensor], Tensor]


@runtime_checkable
class ScoreStack(Protocol):
    """K scores in one evaluation.

    ``stack(x, t)`` returns (K, B, *event); ``stack(x, t, active)`` only the members named by the
    positions in ``active``, in that order, and evaluates no other. A stack that is bound to its batch
    (one prompt a row) also has ``rows(index)``, which restricts it to these rows. One that can compute the
    coefficients of many times at once has ``prepare(times)``, which a run calls with its grid.
    """

    def __len__(self) -> int: ...

    def __call__(self, x: Tensor, t: Tensor, active: Sequence[int] | None = None, /) -> Tensor: ...


def restrict_rows(function: Any, index: Tensor) -> Any:  # a score function or a stack, as given
    """Return ``function`` for the batch rows ``index`` only: itself unless it is bound to its batch."""
    rows = getattr(function, "rows", None)
    return function if rows is None else rows(index)


def prepare_times(function: object, times: Tensor) -> None:
    """Let a score or stack that can prepare for the times of a run do so; it saves time and changes no result."""
    prepare = getattr(function, "prepare", None)
    if prepare is not None:
        prepare(times)


class Stack:
    """A ``ScoreStack`` of separate score functions, evaluated one after the other.

    Args:
        functions: K score functions, (x, t) -> (B, *event).

    Raises:
        TypeError: if one of them is not callable.
    """

    def __init__(self, functions: Sequence[ScoreFunction]) -> None:
        self.functions = tuple(functions)
        for i, function in enumerate(self.functions):
            if not callable(function):
                raise TypeError(f"a stack needs score functions (x, t) -> score, got {type(function).__name__} at {i}")
        if not self.functions:
            raise ValueError("a stack needs at least one score function, got none")

    def __len__(self) -> int:
        return len(self.functions)

    def __call__(self, x: Tensor, t: Tensor, active: Sequence[int] | None = None) -> Tensor:
        chosen = range(len(self)) if active is None else active
        return torch.stack([self.functions[k](x, t) for k in chosen])

    def prepare(self, times: Tensor) -> None:
        """Let the functions prepare for these times."""
        for function in self.functions:
            prepare_times(function, times)

    def rows(self, index: Tensor) -> Stack:
        """Return the stack for the batch rows ``index``."""
        return Stack([restrict_rows(function, index) for function in self.functions])


class Concatenated:
    """Several stacks seen as one: members of the first, then of the second, and so on.

    Args:
        stacks: the parts; each is called at most once an evaluation, with its own active members.
    """

    def __init__(self, stacks: Sequence[ScoreStack]) -> None:
        self.stacks = tuple(stacks)
        self._owner = [(s, k) for s, stack in enumerate(self.stacks) for k in range(len(stack))]

    def __len__(self) -> int:
        return len(self._owner)

    def __call__(self, x: Tensor, t: Tensor, active: Sequence[int] | None = None) -> Tensor:
        chosen = list(range(len(self))) if active is None else list(active)
        out: list[Tensor | None] = [None] * len(chosen)
        for s, stack in enumerate(self.stacks):
            places = [place for place, k in enumerate(chosen) if self._owner[k][0] == s]
            if places:
                values = stack(x, t, [self._owner[chosen[place]][1] for place in places])
                for place, value in zip(places, values, strict=True):
                    out[place] = value
        return torch.stack([value for value in out if value is not None])

    def prepare(self, times: Tensor) -> None:
        """Let the stacks prepare for these times."""
        for stack in self.stacks:
            prepare_times(stack, times)

    def rows(self, index: Tensor) -> Concatenated:
        """Return the stacks for the batch rows ``index``."""
        return Concatenated([restrict_rows(stack, index) for stack in self.stacks])


class CountingStack:
    """A stack that counts what it evaluates: ``evaluations`` is members times rows, ``calls`` the passes.

    Args:
        stack: the stack to count.
    """

    def __init__(self, stack: ScoreStack) -> None:
        self.stack, self.evaluations, self.calls = stack, 0, 0

    def __len__(self) -> int:
        return len(self.stack)

    def __call__(self, x: Tensor, t: Tensor, active: Sequence[int] | None = None) -> Tensor:
        self.evaluations += (len(self) if active is None else len(active)) * len(x)
        self.calls += 1
        return self.stack(x, t, active)

    def rows(self, index: Tensor) -> _CountingRows:
        """Return the stack for the batch rows ``index``; what it evaluates is counted here."""
        return _CountingRows(self, index)


class _CountingRows:
    def __init__(self, counter: CountingStack, index: Tensor) -> None:
        self.counter, self.stack = counter, restrict_rows(counter.stack, index)

    def __len__(self) -> int:
        return len(self.stack)

    def __call__(self, x: Tensor, t: Tensor, active: Sequence[int] | None = None) -> Tensor:
        self.counter.evaluations += (len(self) if active is None else len(active)) * len(x)
        self.counter.calls += 1
        return self.stack(x, t, active)


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
