"""The processes of a run: one, or those that ``accelerate launch`` started on several GPUs or machines.

Every process has the same plan, does its own share of it, and the first alone writes files and speaks to the user.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate.state import PartialState


class Processes:
    """This process and the others; here it is the only one.

    Args:
        index: this process's number.
        count: how many there are.
        device: this process's.
    """

    def __init__(self, index: int = 0, count: int = 1, device: torch.device | str = "cpu") -> None:
        self.index, self.count, self.device = index, count, torch.device(device)

    @property
    def main(self) -> bool:
        """Whether this process writes files and speaks to the user."""
        return self.index == 0

    def wait(self) -> None:
        """Wait until all processes have come here."""

    def rows(self, total: int) -> slice:
        """Return the rows of this process in a batch of ``total``.

        Raises:
            ValueError: if the batch cannot be shared out evenly.
        """
        if total % self.count:
            raise ValueError(f"{self.count} processes need a batch they divide, got {total}; change groups")
        share = total // self.count
        return slice(self.index * share, (self.index + 1) * share)

    def add(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by its sum over the processes."""

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the rows of all processes, in order."""
        return tensor


class Launched(Processes):
    """The processes that ``accelerate launch`` started, or the only one on an accelerator.

    Args:
        state: accelerate's record of them, shared by all who ask in this process.
    """

    def __init__(self, state: PartialState) -> None:
        super().__init__(state.process_index, state.num_processes, state.device)
        self._state = state

    def wait(self) -> None:
        self._state.wait_for_everyone()

    def add(self, tensors: list[Tensor]) -> None:
        if self.count == 1:
            return
        from accelerate.utils import reduce

        # One message a kind of number, not one a tensor.
        for dtype in sorted({t.dtype for t in tensors}, key=str):
            same = [t for t in tensors if t.dtype == dtype]
            flat = torch.cat([t.detach().reshape(-1).to(self.device) for t in same])
            summed = reduce(flat, reduction="sum")
            for tensor, part in zip(same, summed.split([t.numel() for t in same]), strict=True):
                tensor.detach().copy_(part.reshape(tensor.shape))

    def gather(self, tensor: Tensor) -> Tensor:
        if self.count == 1:
            return tensor
        from accelerate.utils import gather

        gathered: Tensor = gather(tensor.detach().contiguous().to(self.device))
        return gathered.to(tensor.device)


def processes() -> Processes:
    """Return the processes that ``accelerate launch`` started, or this one alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and not torch.cuda.is_available():
        return Processes()
    from accelerate.state import PartialState

    return Launched(PartialState())
