"""Stacks made of stacks: several seen as one, and one that counts what it evaluates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sdeblend.score import ScoreStack, prepare_times, restrict_rows


class Concatenated(ScoreStack):
    """Several stacks seen as one: members of the first, then of the second, and so on; without names.

    Args:
        stacks: the parts; each is called at most once an evaluation, with its own active members.
    """

    def __init__(self, stacks: Sequence[ScoreStack]) -> None:
        self.stacks = tuple(stacks)
        self._owner = [(s, k) for s, stack in enumerate(self.stacks) for k in range(len(stack))]

    def __len__(self) -> int:
        return len(self._owner)

    def __call__(self, x: Tensor, t: Tensor, active: Sequence[int] | None = None) -> Tensor:
        chosen = [self._owner[k] for k in (range(len(self)) if active is None else active)]
        found: dict[tuple[int, int], Tensor] = {}
        for s, stack in enumerate(self.stacks):
            own = [k for owner, k in dict.fromkeys(chosen) if owner == s]
            if own:
                found |= zip([(s, k) for k in own], stack(x, t, own), strict=True)
        return torch.stack([found[place] for place in chosen])

    def prepare(self, times: Tensor) -> None:
        for stack in self.stacks:
            prepare_times(stack, times)

    def rows(self, index: Tensor) -> Concatenated:
        return Concatenated([restrict_rows(stack, index) for stack in self.stacks])


class CountingStack(ScoreStack):
    """A stack that counts what it evaluates: ``evaluations`` is members times rows, ``calls`` the passes.

    Args:
        stack: the stack to count.
        counter: where to count; itself if left out. The parts that ``rows`` returns count where the whole does.
    """

    def __init__(self, stack: ScoreStack, counter: CountingStack | None = None) -> None:
        self.stack, self.names, self.evaluations, self.calls = stack, stack.names, 0, 0
        self._counter = self if counter is None else counter

    def __len__(self) -> int:
        return len(self.stack)

    def __call__(self, x: Tensor, t: Tensor, active: Sequence[int] | None = None) -> Tensor:
        self._counter.evaluations += (len(self) if active is None else len(active)) * len(x)
        self._counter.calls += 1
        return self.stack(x, t, active)

    def prepare(self, times: Tensor) -> None:
        self.stack.prepare(times)

    def rows(self, index: Tensor) -> CountingStack:
        return CountingStack(self.stack.rows(index), self._counter)
