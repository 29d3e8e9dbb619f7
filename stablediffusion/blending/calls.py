"""One call of a denoiser, read by what it is: its state, its time, which of its arguments have an entry a row.

Families name and nest their arguments as they like (a tensor, a list with a tensor a row, tuples of positions), so
nothing here knows a family. What cannot be read is refused in one sentence.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

_TIMES = ("timestep", "timesteps", "t", "time")
_STATES = ("sample", "hidden_states", "x", "latents")
# Positions of tokens go by the sequence unless they have a dimension for the batch.
_POSITIONS = ("img_ids", "txt_ids", "image_ids", "text_ids", "rotary", "freqs", "rope")
_HALF = (torch.float16, torch.bfloat16)

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Call:
    """A call of a denoiser.

    Attributes:
        positional: arguments without a name, as a wrapper of another network takes them.
        named: the others.
        state: which one is the state: a position, or a name.
    """

    positional: tuple[Any, ...]
    named: Arguments
    state: int | str

    @classmethod
    def read(cls, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """Read a call.

        Args:
            forward: of the denoiser's class, for the names of its arguments; without ``self``.
            args, kwargs: as the pipeline passed them.

        Raises:
            ValueError: no state, or one that is neither a tensor nor a list with a tensor a row.
        """
        names = _names(forward)
        named = dict(zip(names, args, strict=False)) | dict(kwargs)
        positional = tuple(args[len(names) :])
        if args:
            state: int | str = names[0] if names else 0
        else:
            known = [name for name in (*names[:1], *_STATES) if name in named]
            if not known:
                raise ValueError(f"a denoiser's state must be its first argument, got only {', '.join(named)}")
            state = known[0]
        call = cls(positional, named, state)
        call._check()
        return call

    def _check(self) -> None:
        value = self._given
        tensors = [value] if isinstance(value, Tensor) else value
        if not isinstance(tensors, list | tuple) or not tensors or not all(isinstance(v, Tensor) for v in tensors):
            raise ValueError(
                "a blend needs a denoiser whose state is a tensor or a list with a tensor a row, got "
                f"{type(value).__name__}; this pipeline cannot carry one"
            )
        if len({v.shape for v in tensors}) > 1:
            raise ValueError(
                f"a blend needs images of one size in a batch, got {', '.join(str(tuple(v.shape)) for v in tensors)}; "
                "run them one after the other"
            )

    @property
    def _given(self) -> Any:
        return self.positional[self.state] if isinstance(self.state, int) else self.named[self.state]

    @property
    def listed(self) -> bool:
        """Whether the state is a list with a tensor a row; other lists of that length then are so too."""
        return not isinstance(self._given, Tensor)

    @property
    def sample(self) -> Tensor:
        """The state, (R, *event)."""
        return torch.stack(list(self._given)) if self.listed else self._given

    @property
    def rows(self) -> int:
        """R."""
        return len(self._given)

    @property
    def kind(self) -> tuple[Any, ...]:
        """What calls of one kind share: how many rows, and which arguments."""
        return (
            self.rows,
            len(self.positional),
            *sorted(name for name, value in self.named.items() if value is not None),
        )

    @property
    def time(self) -> float:
        """The scheduler's time, as the denoiser is given it; of rows or tokens with several, the latest."""
        given = next((self.named[name] for name in _TIMES if self.named.get(name) is not None), None)
        if given is None and self.state == 0 and len(self.positional) > 1:
            given = self.positional[1]
        if given is None:
            raise ValueError(
                f"a pass through the denoiser needs its time as one of {', '.join(_TIMES)}, got none of them"
            )
        return float(torch.as_tensor(given).max())

    def on(self, sample: Tensor, rows: Tensor | None = None) -> Call:
        """Return the call for a state in place of its own, (N, *event), with own copies of lists (networks pop).

        Args:
            sample: the state.
            rows: which rows of the call its arguments are to be taken of, long (N,); all by default.
        """
        entries = None if rows is None else rows.tolist()

        def taken(name: str, value: Any) -> Any:
            return _regroup(
                name,
                [value],
                self.rows,
                self.listed,
                lambda v: v[0] if rows is None else v[0][rows.to(v[0].device)],
                lambda v: v[0] if entries is None else [v[0][k] for k in entries],
            )

        value = list(sample.unbind()) if self.listed else sample
        positional = tuple(value if k == self.state else taken("", v) for k, v in enumerate(self.positional))
        named = {name: value if name == self.state else taken(name, v) for name, v in self.named.items()}
        return Call(positional, named, self.state)

    @staticmethod
    def joined(calls: Sequence[Call]) -> Call:
        """Return calls of the same rows behind one another as one."""
        first = calls[0]

        def together(name: str, values: list[Any]) -> Any:
            def lists(v: list[Any]) -> list[Any]:
                return [item for part in v for item in part]

            return _regroup(name, values, first.rows, first.listed, torch.cat, lists)

        columns = zip(*(call.positional for call in calls), strict=True)
        positional = tuple(together("", list(values)) for values in columns)
        named = {name: together(name, [call.named[name] for call in calls]) for name in first.named}
        return Call(positional, named, first.state)

    def batched(self) -> list[tuple[str, Tensor]]:
        """Return every tensor with an entry a row (R, ...) and the argument that it is of, the state left out."""
        found: list[tuple[str, Tensor]] = []
        arguments = [*((str(k), v) for k, v in enumerate(self.positional) if k != self.state)]
        arguments += [(name, value) for name, value in self.named.items() if name != self.state]
        for argument, value in arguments:

            def tensors(values: list[Tensor], argument: str = argument) -> Tensor:
                found.append((argument, values[0]))
                return values[0]

            def lists(values: list[Any], argument: str = argument) -> list[Any]:
                if all(isinstance(item, Tensor) for item in values[0]):
                    found.append((argument, pad_sequence(list(values[0]), batch_first=True)))
                return list(values[0])

            _regroup(argument, [value], self.rows, self.listed, tensors, lists)
        return found

    def of(self, forward: Callable[..., Any]) -> Any:
        """Return what a network's forward makes of the call."""
        return forward(*self.positional, **self.named)


@dataclass(frozen=True)
class Output:
    """What a denoiser gave: its prediction, and how to give another one in its place.

    Attributes:
        sample: (R, *event), half precision as float32.
        dtype: the network's.
        like: makes what the network would return of another prediction (R, *event) of its dtype.
    """

    sample: Tensor
    dtype: torch.dtype
    like: Callable[[Tensor], Any]

    @classmethod
    def read(cls, given: Any) -> Output:
        """Read what a network returned: a tensor, a tuple or an output object; a list has a tensor a row.

        Raises:
            ValueError: more than one prediction, or none.
        """
        if isinstance(given, Tensor):
            return cls(_single(given), given.dtype, lambda value: value)
        if isinstance(given, tuple):
            first, *others = given
        else:
            first, *others = [value for value in given.values() if value is not None] or [None]
        if any(other is not None for other in others):
            raise ValueError(
                f"a blend needs a denoiser with one output, got {1 + len(others)} of them (a video's sound, or what is "
                "kept for later calls); this pipeline cannot carry one"
            )
        listed = isinstance(first, list | tuple)
        parts = first if listed else [first]
        if not parts or not all(isinstance(part, Tensor) for part in parts) or len({p.shape for p in parts}) > 1:
            raise ValueError(
                f"a blend needs a denoiser that gives a tensor, or a list with a tensor a row, got "
                f"{type(first).__name__}; this pipeline cannot carry one"
            )

        def like(value: Tensor) -> Any:
            sample = list(value.unbind()) if listed else value
            return (sample, *others) if isinstance(given, tuple) else type(given)(sample=sample)

        return cls(_single(torch.stack(list(first)) if listed else first), parts[0].dtype, like)


@functools.lru_cache(maxsize=64)
def _names(forward: Callable[..., Any]) -> list[str]:
    """Return the names of the arguments that may be given by position, without ``self``."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    named = itertools.takewhile(lambda parameter: parameter.kind is parameter.POSITIONAL_OR_KEYWORD, parameters)
    return [parameter.name for parameter in named]


def _single(value: Tensor) -> Tensor:
    return value.float() if value.dtype in _HALF else value


def _regroup(
    name: str,
    values: list[Any],
    rows: int,
    listed: bool,
    tensors: Callable[[list[Tensor]], Tensor],
    lists: Callable[[list[Any]], list[Any]],
) -> Any:
    """Return one argument of several calls made one, its entries of rows by ``tensors`` and ``lists``.

    A tensor has an entry a row if it is as long as the batch. So has a list, if the state is a list too, or if it holds
    sizes or lengths; containers of tensors are looked into.
    """
    first = values[0]
    position = any(word in name for word in _POSITIONS)
    if isinstance(first, Tensor):
        return tensors(values) if first.ndim > 2 * position and len(first) == rows else first
    if isinstance(first, Mapping):
        return {key: _regroup(str(key), [v[key] for v in values], rows, listed, tensors, lists) for key in first}
    if isinstance(first, list | tuple):
        if len(first) == rows and not position and _by_row(name, first, listed):
            return type(first)(lists(values))
        columns = zip(*values, strict=True)
        return type(first)(_regroup(name, list(items), rows, listed, tensors, lists) for items in columns)
    return first


def _by_row(name: str, value: Sequence[Any], listed: bool) -> bool:
    if any(isinstance(item, Tensor) for item in value):
        return listed
    return listed or "len" in name or all(isinstance(item, list | tuple | str) for item in value)
