"""A first in, first out buffer of steps of the chain, shared out over the processes that drew them.

Steps are numbered in the order in which they were drawn, path by path, over all processes, so that which of them are
replayed does not depend on how many processes there are. The conditions are not stored: they are drawn again from the
generator's state before the iteration, which any backend can.

Source: Fan et al. 2305.16381 (replay of a thousand steps).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sdeblend.finetune.model import Condition
from sdeblend.finetune.trainer import Workers
from sdeblend.finetune.trainers.policy import Paths

STORED = ("states", "predictions", "base", "noise")


@dataclass(frozen=True)
class Block:
    """The steps of one iteration: this process's rows.

    Attributes:
        tensors: of ``STORED``, (B, m, *event), and "returns", (B, m).
        condition: of the B rows.
        state: of the generator before the conditions were drawn.
        rows: which rows of the whole batch these are.
    """

    tensors: dict[str, Tensor]
    condition: Condition | None
    state: Tensor
    rows: slice


@dataclass(frozen=True)
class Steps:
    """Some steps, in the order of their blocks.

    Attributes:
        states, predictions, base, noise: (N, *event).
        returns: (N,).
        k: which step of the chain, long (N,).
        prompts: of the N steps; None without conditions.
        pieces: for each block the rows here that are its own, its condition, and their rows in that.
    """

    states: Tensor
    predictions: Tensor
    base: Tensor
    noise: Tensor
    returns: Tensor
    k: Tensor
    prompts: tuple[str, ...] | None
    pieces: tuple[tuple[slice, Condition | None, Tensor], ...]


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
        tensors = {name: getattr(paths, name) for name in STORED} | {"returns": returns}
        self.blocks.append(Block(tensors, paths.condition, state, paths.rows))

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

    def take(self, index: Tensor) -> Steps:
        """Return the steps (block, row, step), long (N, 3), ordered by block."""
        parts: dict[str, list[Tensor]] = {name: [] for name in (*STORED, "returns")}
        pieces: list[tuple[slice, Condition | None, Tensor]] = []
        prompts: list[str] | None = []
        start = 0
        blocks, counts = index[:, 0].unique_consecutive(return_counts=True)
        for block, count in zip(blocks.tolist(), counts.tolist(), strict=True):
            row, k = index[start : start + count, 1], index[start : start + count, 2]
            held = self.blocks[block]
            for name, values in parts.items():
                values.append(held.tensors[name][row, k])
            pieces.append((slice(start, start + count), held.condition, row))
            if held.condition is None or prompts is None:
                prompts = None
            else:
                prompts += [held.condition.prompts[i] for i in row.tolist()]
            start += count
        if not pieces:
            # None of the drawn steps is here: empty tensors of the right kind.
            parts = {name: [values[:0, 0]] for name, values in self.blocks[-1].tensors.items()}
            prompts = None
        joined = {name: torch.cat(values) for name, values in parts.items()}
        return Steps(**joined, k=index[:, 2], prompts=None if prompts is None else tuple(prompts),
                     pieces=tuple(pieces))

    def state(self, workers: Workers) -> dict[str, Tensor]:
        """Return everything that is kept, of all processes, by name; every process must call it."""
        out: dict[str, Tensor] = {}
        for i, block in enumerate(self.blocks):
            out |= {f"{i}.{name}": workers.gather(tensor) for name, tensor in block.tensors.items()}
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
            tensors = {name: state[f"{i}.{name}"][rows].to(device) for name in (*STORED, "returns")}
            self.blocks.append(Block(tensors, conditions(generator), drawn, rows))
