"""Linear and quadratic rewards, the ones whose tilts of a Gaussian mixture are Gaussian mixtures.

    r(x) = c + b.x - x'Qx / 2,        grad r(x) = b - Q x,

with Q symmetric, not necessarily positive: Q > 0 prefers a place, Q < 0 repels. The family is closed under
sums and scaling, so a preference sum_i w_i r_i over rewards is again a reward of this kind.

Source: Diffusion Blend 2505.18547, section 4 (rewards); the algebra is elementary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

Numbers = Tensor | Sequence[float] | Sequence[Sequence[float]]


class Law(Protocol):
    """What a reward can vary under."""

    def reward_variance(self, reward: QuadraticReward, /) -> float:
        """Return Var(reward(x))."""


class QuadraticReward:
    """The reward r(x) = constant + linear.x - x' quadratic x / 2.

    Args:
        linear: b, (d,); zero if left out.
        quadratic: Q, symmetric (d, d); zero if left out. Give at least one of the two.
        constant: c, in units of the reward.

    Raises:
        ValueError: neither given, shapes that do not fit, an entry that is not finite, Q not symmetric.
    """

    def __init__(self, linear: Numbers | None = None, quadratic: Numbers | None = None, constant: float = 0.0) -> None:
        if linear is None and quadratic is None:
            raise ValueError("a reward needs linear (d,), quadratic (d, d) or both, got neither; give one to fix d")
        b = None if linear is None else finite(linear, "linear", 1)
        q = None if quadratic is None else finite(quadratic, "quadratic", 2)
        dim = len(b) if b is not None else len(q)  # type: ignore[arg-type]
        self.linear = torch.zeros(dim, dtype=torch.float64) if b is None else b
        if q is None:
            q = torch.zeros(dim, dim, dtype=torch.float64)
        if q.shape != (dim, dim) or dim == 0:
            raise ValueError(
                f"a reward in d dimensions needs linear (d,) and quadratic (d, d), got {tuple(self.linear.shape)} "
                f"and {tuple(q.shape)}; make them fit"
            )
        skew = float((q - q.T).abs().max())
        if skew > 1e-9 * max(float(q.abs().max()), 1e-300):
            raise ValueError(f"quadratic must be symmetric, got entries that differ by {skew:g}; give (Q + Q') / 2")
        self.quadratic = (q + q.T) / 2
        self.constant = number(constant, "constant")

    @property
    def dim(self) -> int:
        """Dimension d of what is rewarded."""
        return len(self.linear)

    @property
    def is_linear(self) -> bool:
        """Whether Q vanishes; then a tilt moves components and leaves their covariances."""
        return not bool(self.quadratic.any())

    def __call__(self, x: Tensor) -> Tensor:
        """Return r(x).

        Args:
            x: (..., d), float32 or float64.

        Returns:
            rewards (...), in the dtype of x.
        """
        x = self._check(x)
        b, q = self.linear.to(x), self.quadratic.to(x)
        return self.constant + x @ b - ((x @ q) * x).sum(-1) / 2

    def grad(self, x: Tensor) -> Tensor:
        """Return the gradient b - Q x, shaped as x (..., d)."""
        x = self._check(x)
        return self.linear.to(x) - x @ self.quadratic.to(x)

    def normalized(self, base: Law) -> QuadraticReward:
        """Return the reward divided by its standard deviation under ``base``.

        Raises:
            ValueError: if it does not vary under ``base``.
        """
        variance = base.reward_variance(self)
        if not variance > 0:
            raise ValueError("a reward can be normalised only if it varies under the base, got variance 0; drop it")
        return self / math.sqrt(variance)

    def __add__(self, other: QuadraticReward) -> QuadraticReward:
        if not isinstance(other, QuadraticReward):
            return NotImplemented
        if other.dim != self.dim:
            raise ValueError(f"rewards must share their dimension to be added, got {self.dim} and {other.dim}")
        return QuadraticReward(
            self.linear + other.linear, self.quadratic + other.quadratic, self.constant + other.constant
        )

    def __mul__(self, factor: float) -> QuadraticReward:
        if isinstance(factor, QuadraticReward):
            return NotImplemented
        factor = number(factor, "the factor of a reward")
        return QuadraticReward(self.linear * factor, self.quadratic * factor, self.constant * factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> QuadraticReward:
        divisor = number(divisor, "the divisor of a reward")
        if divisor == 0:
            raise ValueError("a reward cannot be divided by 0; give a non-zero scale")
        return QuadraticReward(self.linear / divisor, self.quadratic / divisor, self.constant / divisor)

    def __neg__(self) -> QuadraticReward:
        return self * -1.0

    def __sub__(self, other: QuadraticReward) -> QuadraticReward:
        if not isinstance(other, QuadraticReward):
            return NotImplemented
        return self + -other

    def __repr__(self) -> str:
        quadratic = "" if self.is_linear else f", quadratic={self.quadratic.tolist()}"
        return f"QuadraticReward(linear={self.linear.tolist()}{quadratic}, constant={self.constant:g})"

    def _check(self, x: Tensor) -> Tensor:
        if x.ndim < 1 or x.shape[-1] != self.dim:
            raise ValueError(f"a reward in {self.dim} dimensions needs points (..., {self.dim}), got {tuple(x.shape)}")
        if not x.dtype.is_floating_point:
            raise TypeError(f"a reward needs points of floating dtype, got {x.dtype}; call .double() on them")
        return x


def combine(
    rewards: Mapping[str, QuadraticReward] | Sequence[QuadraticReward],
    weights: Mapping[str, float] | Sequence[float],
) -> QuadraticReward:
    """Return r(w) = sum_i w_i r_i.

    Args:
        rewards: by name, or in order.
        weights: w, by name (rewards without one get 0) or in the order of the rewards, one each.

    Returns:
        the scalarised reward.

    Raises:
        ValueError: a weight for no reward, another number of weights than rewards, or rewards of different
            dimensions.

    Source: Diffusion Blend 2505.18547, equation for r(w).
    """
    terms = [reward * weight for weight, reward in weighted_pairs(rewards, weights)]
    return sum(terms[1:], start=terms[0])


def weighted_pairs(
    rewards: Mapping[str, QuadraticReward] | Sequence[QuadraticReward],
    weights: Mapping[str, float] | Sequence[float],
) -> list[tuple[float, QuadraticReward]]:
    """Return (w_i, r_i) in the order of the rewards; arguments and errors as ``combine``."""
    named = dict(rewards) if isinstance(rewards, Mapping) else {str(i): r for i, r in enumerate(rewards)}
    if not named:
        raise ValueError("a combination needs at least one reward, got none")
    if isinstance(weights, Mapping):
        unknown = [name for name in weights if name not in named]
        if unknown:
            raise ValueError(f"weights can name only {', '.join(named)}, got {', '.join(unknown)}; drop these")
        return [(weights.get(name, 0.0), reward) for name, reward in named.items()]
    if len(weights) != len(named):
        raise ValueError(f"{len(named)} rewards need as many weights, got {len(weights)}; give one a reward")
    return list(zip(weights, named.values(), strict=True))


def finite(values: object, what: str, ndim: int | None = None) -> Tensor:
    """Return numbers as float64, or raise unless they are finite and of that many dimensions.

    Args:
        values: in rows of equal length.
        what: they are, for messages.
        ndim: 1 for (d,), 2 for (d, d); any if left out.
    """
    try:
        tensor = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{what} must be numbers in rows of equal length, got {values!r}") from error
    if ndim not in (None, tensor.ndim):
        raise ValueError(f"{what} must have shape {'(d,)' if ndim == 1 else '(d, d)'}, got {tuple(tensor.shape)}")
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{what} must be finite, got {float(tensor[~tensor.isfinite()][0])}; check what made them")
    return tensor


def number(value: float, what: str, above: float = -math.inf) -> float:
    """Return a finite number above some bound as a float, or raise."""
    try:
        result = math.nan if isinstance(value, (str, bool)) else float(value)
    except (TypeError, ValueError):
        result = math.nan
    if not (math.isfinite(result) and result > above):
        bound = "" if above == -math.inf else f" above {above:g}"
        raise ValueError(f"{what} must be a finite number{bound}, got {value!r}")
    return result
