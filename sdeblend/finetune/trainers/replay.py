"""A first in, first out buffer of steps of the chain, shared out over the processes that drew them.

Steps are numbered in the order in which they were drawn, path by path, over all processes, so that which of them are
replayed does not depend on how many processes there are. The conditions are not stored: they are drawn again from the
generator's state before the iteration, which any backend can.

Source: Fan et al. 2305.16381 (replay of a thousand steps).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sdeblend.finetune.model import Condition
from sdeblend.finetune.trainers.policy import Paths, Steps
from sdeblend.shell.processes import Processes


class Block(NamedTuple):
    """The steps of one iteration: this process's rows.

    Attributes:
        steps: (B, m, *event) each.
        returns: (B, m).
        condition: of the B rows.
        state: of the generator before the conditions were drawn.
        rows: which rows of the whole batch these are.
    """

    steps: Steps
    returns: Tensor
    condition: Condition | None
    state: Tensor
    rows: slice


class Replayed(NamedTuple):
    """Some steps, in the order of their blocks.

    Attributes:
        steps: (N, *event) each.
        returns: (N,).
        k: which step of the chain, long (N,).
        prompts: of the N steps; None without conditions.
        pieces: for each block the rows here that are its own, its condition, and their rows in that.
    """

    steps: Steps
    returns: Tensor
    k: Tensor
    prompts: tuple[str, ...] | None
    pieces: list[tuple[slice, Condition | None, Tensor]]


class Replay:
    """The last ``size`` steps.

    Args:
        size: steps kept, over all processes.
        steps: steps of a path.
    """

    def __init__(self, size: int, steps: int) -> None:
        self.size, self.steps = size, steps
        self.blocks: list[Block] = []

    def add(self, paths: Paths, returns: Tensor, state: Tensor) -> None:
        """Add the paths of an iteration and forget blocks of which no step is among the last ``size``."""
        self.blocks.append(Block(paths.steps, returns, paths.condition, state, paths.rows))

    def draw(self, count: int, total: int, generator: torch.Generator) -> Tensor:
        """Draw the numbers of ``count`` steps of all processes, with repetition, long (count,).

        Args:
            count: how many.
            total: paths of an iteration, over all processes.
            generator: draws.
        """
        each = total * self.steps
        spare = len(self.blocks) * each - self.size
        while spare >= each:
            self.blocks.pop(0)
            spare -= each
        low = max(spare, 0)
        return torch.randint(low, len(self.blocks) * each, (count,), generator=generator)

    def own(self, chosen: Tensor, total: int) -> Tensor:
        """Return those of the drawn steps that this process has as (block, row, step), long (N, 3), in that order."""
        each = total * self.steps
        block, rest = chosen // each, chosen % each
        rows = self.blocks[-1].rows
        row = rest // self.steps - rows.start
        here = (row >= 0) & (row < rows.stop - rows.start)
        found = torch.stack([block[here], row[here], rest[here] % self.steps], 1)
        return found[found[:, 0].argsort(stable=True)]

    def take(self, index: Tensor) -> Replayed:
        """Return the steps (block, row, step), long (N, 3), ordered by block."""
        parts: list[Steps] = []
        returns: list[Tensor] = []
        pieces: list[tuple[slice, Condition | None, Tensor]] = []
        prompts: list[str] = []
        # Where none of the drawn steps is here: empty tensors of the right kind.
        for block in index[:, 0].unique_consecutive().tolist() or [-1]:
            here = index[index[:, 0] == block]
            held, row, k = self.blocks[block], here[:, 1], here[:, 2]
            start = sum(map(len, returns))
            parts.append(held.steps.at(row, k))
            returns.append(held.returns[row, k])
            pieces.append((slice(start, start + len(row)), held.condition, row))
            prompts += [] if held.condition is None else [held.condition.prompts[i] for i in row.tolist()]
        steps = Steps(*(torch.cat(column) for column in zip(*parts, strict=True)))
        return Replayed(steps, torch.cat(returns), index[:, 2], tuple(prompts) or None, pieces)

    def state(self, processes: Processes) -> dict[str, Tensor]:
        """Return everything that is kept, of all processes, by name; every process must call it."""
        out: dict[str, Tensor] = {}
        for i, block in enumerate(self.blocks):
            kept = block.steps._asdict() | {"returns": block.returns}
            out |= {f"{i}.{name}": processes.gather(tensor) for name, tensor in kept.items()}
            out[f"{i}.state"] = block.state
        return out

    def load(
        self,
        state: dict[str, Tensor],
        rows: slice,
        conditions: Callable[[torch.Generator], Condition | None],
        device: torch.device,
    ) -> None:
        """Take back what ``state`` returned.

        Args:
            state: by name, of all processes.
            rows: those of this process.
            conditions: draws an iteration's conditions, of these rows.
            device: where samples live.
        """
        self.blocks = []
        for i in range(len({name.partition(".")[0] for name in state})):
            drawn = state[f"{i}.state"]
            generator = torch.Generator()
            generator.set_state(drawn)
            *steps, returns = (state[f"{i}.{name}"][rows].to(device) for name in (*Steps._fields, "returns"))
            self.blocks.append(Block(Steps(*steps), returns, conditions(generator), drawn, rows))
