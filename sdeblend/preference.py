"""What a user wants of several rewards: a weight each, and how strongly; from it the coefficients of a blend.

For weights w and strength lambda, over {base, members} that are tilts p_base exp(r_i / alpha) / Z_i,

    c = (1 - lambda sum_i w_i, lambda w_1, ..., lambda w_m),     target p_base exp(lambda sum_i w_i r_i / alpha) / Z.

* DB-MPA: sum w = 1, lambda = 1.   * DB-KLA: one member, any lambda (0 base, 1 member, > 1 beyond).

Coefficients sum to one whatever the weights are: the base takes the rest.

Source: Diffusion Blend 2505.18547, Lemma 2 and Algorithms 1 and 2.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sdeblend.score import ScoreStack

SUM_TOLERANCE = 1e-6
Value = float | Tensor  # a tensor (B,) where each sample has its own, or one that asks for its gradient
Plain = float | list[float]


class Preference:
    """What the user wants: a weight for each reward, and how strongly.

    Plain: it is hashable, equals another of the same weights by name, whatever their order, and goes to JSON and back.

    Args:
        weights: reward or member name -> weight w_i; or a sequence, for a stack in its order. They need not sum to
            one: the base takes the rest. A weight may be an array (B,), one a sample.
        strength: lambda, the target's inverse KL weight relative to the members'; 0 base, 1 as tuned. May be (B,).

    Attributes:
        names: of what is weighed, in the order given; None for weights in order.
        weights: by name, or a tuple of those in order; floats, or float64 (B,).
        strength: likewise.

    Raises:
        ValueError: no weight, one that is not finite, or arrays of different lengths.
        TypeError: weights that are not numbers.

    Warns:
        UserWarning: weights that sum to more than one at a strength within (0, 1]: the base's coefficient is negative,
            and the blend goes beyond its members.
    """

    names: tuple[str, ...] | None

    def __init__(self, weights: Mapping[str, Value] | Sequence[Value] | Tensor, strength: Value = 1.0) -> None:
        if not isinstance(weights, (Mapping, Sequence, Tensor)) or isinstance(weights, str):
            raise TypeError(f"a preference needs weights by name or in order, got {weights!r}; give {{'name': weight}}")
        if isinstance(weights, Mapping):
            self.names = tuple(str(name) for name in weights)
            values = [_value(value, f"the weight of {name!r}") for name, value in weights.items()]
        else:
            self.names = None
            values = [_value(value, f"the weight of member {i + 1}") for i, value in enumerate(weights)]
        if not values:
            raise ValueError("a preference needs at least one weight, got none; give {'name': weight}")
        self._values, self.strength = tuple(values), _value(strength, "the strength")
        batches = sorted({len(v) for v in (*values, self.strength) if isinstance(v, Tensor) and v.ndim})
        if len(batches) > 1:
            raise ValueError(f"weights and strength must fit one batch, got {batches[0]} and {batches[-1]} rows")
        self._warn()

    @property
    def weights(self) -> dict[str, Value] | tuple[Value, ...]:
        """The weights by name, or those in order as a tuple."""
        return self._values if self.names is None else dict(zip(self.names, self._values, strict=True))

    def coefficients(self, names: Sequence[str] | None = None) -> Tensor:
        """Return the coefficients over (base, members), which sum to one.

        Args:
            names: members in the order wanted; those without a weight get 0. Weights in order go to them in order.
                Default: the order given.

        Returns:
            float64 (1 + m,), or (B, 1 + m) if a weight or the strength is given per sample.

        Raises:
            ValueError: if a weight names no member, or weights in order are not one a member.
        """
        keys: Sequence[Any] = range(len(self._values)) if self.names is None else self.names
        values = dict(zip(keys, self._values, strict=True))
        order: Sequence[Any] = list(values)
        if names is not None and self.names is None:
            if len(names) != len(values):
                raise ValueError(
                    f"weights in order must be one a member ({', '.join(names)}), got {len(values)}; give {len(names)}"
                )
        elif names is not None:
            order = tuple(names)
            unknown = [name for name in self.names or () if name not in order]
            if unknown:
                raise ValueError(
                    f"a preference can weigh only {', '.join(order)}, got {', '.join(unknown)}; load it or drop it"
                )
        strength = torch.as_tensor(self.strength, dtype=torch.float64)
        columns = [strength * torch.as_tensor(values.get(key, 0.0), dtype=torch.float64) for key in order]
        members = torch.stack(list(torch.broadcast_tensors(*columns)), dim=-1)
        return torch.cat([1 - members.sum(-1, keepdim=True), members], dim=-1)

    def over(self, stack: ScoreStack) -> Tensor:
        """Return the coefficients over a stack whose first score is the base, float64 (K,) or (B, K).

        Raises:
            ValueError: weights by name on a stack without names, a name that it lacks, or not one weight a member.
        """
        if self.names is not None and stack.names is None:
            raise ValueError(
                f"weights by name need a stack with names, got {', '.join(self.names)} on one without; give the "
                "weights as a sequence in the order of the stack, or the stack its names"
            )
        c = self.coefficients(stack.names if self.names is not None else None)
        if c.shape[-1] != len(stack):
            raise ValueError(
                f"a preference over {len(self._values)} members needs a stack of the base and these, "
                f"{c.shape[-1]} scores, got {len(stack)}; put the base first"
            )
        return c

    def normalized(self) -> Preference:
        """Return the preference with weights that sum to one, at the same strength.

        Raises:
            ValueError: weights whose sum is not above 0.
        """
        total = sum(self._values[1:], self._values[0])
        if not bool((torch.as_tensor(total) > 0).all()):
            raise ValueError(f"weights whose sum is not above 0 cannot be rescaled to sum to one, got {self!r}")
        values = [value / total for value in self._values]
        return Preference(values if self.names is None else dict(zip(self.names, values, strict=True)), self.strength)

    def to_json(self) -> dict[str, Any]:
        """Return ``{"weights": {name: weight} or [weight], "strength": strength}``, numbers or lists of numbers."""
        values = [_plain(value) for value in self._values]
        weights = values if self.names is None else dict(zip(self.names, values, strict=True))
        return {"weights": weights, "strength": _plain(self.strength)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Preference:
        """Return the preference that ``to_json`` wrote.

        Raises:
            ValueError, TypeError: something that it did not write.
        """
        if not isinstance(value, Mapping) or not {"weights"} <= set(value) <= {"weights", "strength"}:
            raise ValueError(f'a preference is {{"weights": ..., "strength": ...}}, got {value!r}')
        return cls(value["weights"], value.get("strength", 1.0))

    def _key(self) -> Any:
        told = self.to_json()
        weights, strength = told["weights"], told["strength"]
        items = weights.items() if isinstance(weights, dict) else enumerate(weights)
        return self.names is None, frozenset((key, _hashable(v)) for key, v in items), _hashable(strength)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Preference) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        told = self.to_json()
        return f"Preference({told['weights']}, strength={told['strength']})"

    def _warn(self) -> None:
        base, strength = self.coefficients().detach()[..., 0], torch.as_tensor(self.strength).detach()
        lowest = float(torch.where((strength > 0) & (strength <= 1), base, 0.0).min())
        if lowest < -SUM_TOLERANCE:
            warnings.warn(
                f"weights that sum to more than 1 give the base a negative coefficient, here {lowest:.4g}: the blend "
                "goes beyond its members; Preference.normalized() gives weights that sum to one, and a strength above "
                "1 says that more is meant",
                UserWarning,
                stacklevel=3,
            )


def _value(value: Any, what: str) -> Value:
    if isinstance(value, (str, bool)):
        raise TypeError(f"{what} must be a number, got {value!r}")
    number = numbers(value)
    if number.ndim > 1:
        raise ValueError(f"{what} must be a number or one a sample, got shape {tuple(number.shape)}")
    if not bool(number.isfinite().all()):
        raise ValueError(f"{what} must be finite, got {number.tolist()}")
    if number.ndim or number.requires_grad:
        return number if number.requires_grad else number.clone()
    return float(number)


def numbers(values: Any) -> Tensor:
    """Return coefficients as float64, or raise ``TypeError`` if they are no numbers."""
    try:
        return torch.as_tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"coefficients must be numbers, got {values!r}") from error


def _plain(value: Value) -> Plain:
    return value.tolist() if isinstance(value, Tensor) else value


def _hashable(value: Plain) -> float | tuple[float, ...]:
    return tuple(value) if isinstance(value, list) else value
