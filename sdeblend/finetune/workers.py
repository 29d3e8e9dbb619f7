"""Several processes, GPUs or machines, and networks in half precision, by way of accelerate.

Each process computes its rows of every batch (drawn whole by all, so that nothing depends on their number but the
order of sums), gradients are added up, and the main process alone writes files. Every process starts from the same
parameters, takes the same steps, and so keeps the same ones.

Half precision is for the networks only: states, losses and parameters keep theirs. fp16 adds a scale on the loss.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdeblend.finetune.model import Condition, Tunable
from sdeblend.finetune.trainer import LossScale, Workers

if TYPE_CHECKING:
    from accelerate import Accelerator

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Distributed(Workers):
    """The processes that ``accelerate launch`` started, or the only one.

    Args:
        accelerator: knows them.
        precision: "no", "bf16" or "fp16"; the last scales the loss.
    """

    def __init__(self, accelerator: Accelerator, precision: str = "no") -> None:
        self.accelerator = accelerator
        self.index, self.count = accelerator.process_index, accelerator.num_processes
        self.scaler = LossScale() if precision == "fp16" else None

    def add(self, tensors: list[Tensor]) -> None:
        if self.count == 1:
            return
        # One message a kind of number, not one a tensor.
        for dtype in sorted({t.dtype for t in tensors}, key=str):
            same = [t for t in tensors if t.dtype == dtype]
            flat = torch.cat([t.detach().reshape(-1).to(self.accelerator.device) for t in same])
            summed = self.accelerator.reduce(flat, reduction="sum")
            for tensor, part in zip(same, summed.split([t.numel() for t in same]), strict=True):
                tensor.detach().copy_(part.reshape(tensor.shape))

    def gather(self, tensor: Tensor) -> Tensor:
        if self.count == 1:
            return tensor
        gathered: Tensor = self.accelerator.gather(tensor.detach().contiguous().to(self.accelerator.device))
        return gathered.to(tensor.device)

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()


class HalfPrecision:
    """A model whose networks are evaluated in half precision; predictions come back in the dtype of the state.

    Args:
        model: what is tuned; everything but ``tuned`` and ``base`` is its own.
        dtype: bfloat16 or float16.
    """

    def __init__(self, model: Tunable, dtype: torch.dtype) -> None:
        self._model, self._dtype = model, dtype

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def tuned(self, x: Tensor, t: Tensor, condition: Condition | None, /) -> Tensor:
        with torch.autocast(x.device.type, self._dtype):
            return self._model.tuned(x, t, condition).to(x.dtype)

    def base(self, x: Tensor, t: Tensor, condition: Condition | None, /) -> Tensor:
        with torch.autocast(x.device.type, self._dtype):
            return self._model.base(x, t, condition).to(x.dtype)


def in_precision(model: Tunable, precision: str) -> Tunable:
    """Return the model evaluated in "bf16" or "fp16", or as it is for "no".

    Raises:
        ValueError: for another precision.
    """
    if precision == "no":
        return model
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of no, {', '.join(PRECISIONS)}, got {precision!r}")
    half: Any = HalfPrecision(model, PRECISIONS[precision])
    return half
