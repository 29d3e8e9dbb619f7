"""What the processes of a run share of an optimiser step, and networks in half precision.

Each process computes its rows of every batch (drawn whole by all, so that nothing depends on their number but the
order of sums), gradients are added up, and the main process alone writes files. Every process starts from the same
parameters, takes the same steps, and so keeps the same ones.

Half precision is for the networks only: states, losses and parameters keep theirs. fp16 adds a scale on the loss.
"""

from __future__ import annotations

from typing import ClassVar, Literal, cast

import torch
from torch import Tensor

from sdeblend.finetune.model import Condition, Tunable

Precision = Literal["no", "bf16", "fp16"]
_DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


class LossScale:
    """A factor on the loss that keeps gradients in half precision from vanishing, found while training.

    It doubles after ``patience`` steps in a row whose gradients were finite, and halves after one whose were not;
    that one is left out.

    Attributes:
        factor: now.
        steps: finite steps since it last changed.

    Source: Micikevicius et al. 1710.03740.
    """

    patience: ClassVar[int] = 2000

    def __init__(self) -> None:
        self.factor, self.steps = 2.0**16, 0

    def accept(self, finite: bool) -> bool:
        """Take note of a step's gradients; return whether to leave the step out.

        Nothing is left out at a factor of 1 or less: then the gradients themselves are not finite.
        """
        if finite:
            self.steps += 1
            if self.steps == self.patience:
                self.factor, self.steps = 2 * self.factor, 0
            return False
        if self.factor <= 1:
            return False
        self.factor, self.steps = self.factor / 2, 0
        return True


class HalfPrecision:
    """A model whose networks are evaluated in half precision; predictions come back in the dtype of the state.

    Args:
        model: what is tuned; everything but ``tuned`` and ``base`` is its own.
        dtype: bfloat16 or float16.
    """

    def __init__(self, model: Tunable, dtype: torch.dtype) -> None:
        self._model, self._dtype = model, dtype

    def __getattr__(self, name: str) -> object:
        return getattr(self._model, name)

    def tuned(self, x: Tensor, t: Tensor, condition: Condition | None, /) -> Tensor:
        with torch.autocast(x.device.type, self._dtype):
            return self._model.tuned(x, t, condition).to(x.dtype)

    def base(self, x: Tensor, t: Tensor, condition: Condition | None, /) -> Tensor:
        with torch.autocast(x.device.type, self._dtype):
            return self._model.base(x, t, condition).to(x.dtype)


def in_precision(model: Tunable, precision: Precision) -> Tunable:
    """Return the model evaluated in "bf16" or "fp16", or as it is for "no".

    Raises:
        ValueError: for another precision.
    """
    if precision == "no":
        return model
    if precision not in _DTYPES:
        raise ValueError(f"precision must be one of no, {', '.join(_DTYPES)}, got {precision!r}")
    return cast(Tunable, HalfPrecision(model, _DTYPES[precision]))
