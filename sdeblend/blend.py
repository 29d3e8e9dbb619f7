"""Diffusion Blend: one affine combination of member scores (DB-MPA, DB-KLA, and both at once).

A member i is the pre-trained model ("base") tuned for a reward r_i at KL weight alpha, that is the tilt
p_i = p_base exp(r_i / alpha) / Z_i. For preference weights w and strength lambda the wanted target is
p_base exp(lambda sum_i w_i r_i / alpha) / Z, and the blend replaces its score by

    S = (1 - lambda sum_i w_i) S_base + lambda sum_i w_i S_i.

* DB-MPA: sum w = 1, lambda = 1.   * DB-KLA: one member, any lambda (0 base, 1 member, > 1 beyond).

The coefficients over {base, members} always sum to one, so the combination means the same for scores,
eps, x0, v and flow velocities, and commutes with classifier-free guidance. Blends of blends are blends:
a nested blend is flattened to its leaves, each evaluated once.

The spread sum_i c_i |S_i|^2 - |S|^2 comes with every evaluation at no further one; it is what the
certificate and the correction are made of (``sdeblend.correct``).

Source: Diffusion Blend 2505.18547, Lemma 2 and Algorithms 1 and 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdeblend.score import Concatenated, ScoreFunction, ScoreStack, Stack, prepare_times, restrict_rows

SUM_TOLERANCE = 1e-6
CoefficientRule = Callable[[Tensor], Tensor]


class Preference:
    """What the user wants: a weight for each reward, and how strongly.

    Args:
        weights: reward or member name -> weight w_i, or a plain sequence (named "0", "1", ...). They need
            not sum to one: the base takes the rest. A weight may be an array (B,), one a sample.
        strength: lambda, the target's inverse KL weight relative to the members'; 0 base, 1 as tuned. May be (B,).

    Raises:
        ValueError: no weight, one that is not finite, or arrays of different lengths.
        TypeError: weights that are not numbers.
    """

    def __init__(
        self, weights: Mapping[str, float | Tensor] | Sequence[float | Tensor], strength: float | Tensor = 1.0
    ) -> None:
        if not isinstance(weights, (Mapping, Sequence, Tensor)) or isinstance(weights, str):
            raise TypeError(f"a preference needs weights by name or in order, got {weights!r}; give {{'name': weight}}")
        named = dict(weights) if isinstance(weights, Mapping) else {str(i): w for i, w in enumerate(weights)}
        if not named:
            raise ValueError("a preference needs at least one weight, got none; give {'name': weight}")
        self.weights = {name: _number(value, f"the weight of {name!r}") for name, value in named.items()}
        self.strength = _number(strength, "the strength")
        batches = sorted({len(w) for w in (*self.weights.values(), self.strength) if w.ndim})
        if len(batches) > 1:
            raise ValueError(f"weights and strength must fit one batch, got {batches[0]} and {batches[-1]} rows")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the rewards or members, in the order given."""
        return tuple(self.weights)

    def coefficients(self, names: Sequence[str] | None = None) -> Tensor:
        """Return the coefficients over (base, members), which sum to one.

        Args:
            names: members in the order wanted; those without a weight get 0. Default: ``self.names``.

        Returns:
            float64 (1 + m,), or (B, 1 + m) if a weight or the strength is given per sample.

        Raises:
            ValueError: if a weight names no member.
        """
        order = self.names if names is None else tuple(names)
        unknown = [name for name in self.names if name not in order]
        if unknown:
            raise ValueError(
                f"a preference can weigh only {', '.join(order)}, got {', '.join(unknown)}; load it or drop it"
            )
        zero = torch.zeros((), dtype=torch.float64)
        columns = torch.broadcast_tensors(*[self.strength * self.weights.get(name, zero) for name in order])
        members = torch.stack(list(columns), dim=-1)
        return torch.cat([1 - members.sum(-1, keepdim=True), members], dim=-1)

    def __repr__(self) -> str:
        weights = {name: w.tolist() for name, w in self.weights.items()}
        return f"Preference({weights}, strength={self.strength.tolist()})"


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation of a blend gives.

    Attributes:
        score: the blended score (B, *event).
        members: scores of the members with a non-zero coefficient (Ka, B, *event).
        coefficients: theirs, float64 (Ka,) or (B, Ka).
        active: their positions in the stack.
    """

    score: Tensor
    members: Tensor
    coefficients: Tensor
    active: tuple[int, ...]

    def spread(self) -> Tensor:
        """Return sum_i c_i |S_i|^2 - |S|^2, float64 (B,), non-negative if no coefficient is negative."""
        return spread(self.members, self.coefficients, self.score)

    def pair_spread(self) -> Tensor:
        """Return c_i c_j |S_i - S_j|^2 / 2, float64 (B, Ka, Ka); its sum over i, j is the spread."""
        flat = self.members.flatten(2).double()
        centred = (flat - flat.mean(0)).movedim(0, 1)
        gram = centred @ centred.mT
        norm = gram.diagonal(dim1=1, dim2=2)
        distance = norm[:, :, None] + norm[:, None, :] - 2 * gram
        c = self.coefficients.to(distance.device)
        return c[..., :, None] * c[..., None, :] * distance / 2


def combine(members: Tensor, coefficients: Tensor) -> Tensor:
    """Return sum_i c_i member_i: the one place where anything is blended.

    Args:
        members: (K, B, *event), scores or any parametrisation.
        coefficients: (K,) or (B, K), summing to one over K.

    Returns:
        (B, *event), dtype and memory layout of the members.
    """
    if coefficients.ndim == 1:
        factors: list[float] = coefficients.tolist()
        first, *others = members.unbind()
        out = first * factors[0]
        for member, factor in zip(others, factors[1:], strict=True):
            out.add_(member, alpha=factor)
        return out
    columns = coefficients.to(members).T.reshape(coefficients.shape[::-1] + (1,) * (members.ndim - 2))
    out = members[0] * columns[0]
    for member, column in zip(members[1:], columns[1:], strict=True):
        out.addcmul_(member, column)
    return out


def spread(members: Tensor, coefficients: Tensor, blended: Tensor) -> Tensor:
    """Return the c-weighted variance of the members, sum_i c_i |m_i - blended|^2.

    Equal to sum_i c_i |m_i|^2 - |blended|^2 because the coefficients sum to one, without the cancellation.

    Args:
        members: (K, B, *event).
        coefficients: (K,) or (B, K).
        blended: their combination (B, *event).

    Returns:
        float64 (B,).
    """
    if len(members) == 1:
        return torch.zeros(len(blended), dtype=torch.float64, device=blended.device)
    squares = (members - blended).flatten(2).square().sum(2).double()
    c = coefficients.to(squares)
    return c @ squares if c.ndim == 1 else (c.T * squares).sum(0)


class Blend:
    """A blend of member scores; itself a score function.

    Args:
        stack: K members, (x, t) -> (K, B, *event); or a sequence of score functions, blends among them.
        coefficients: a ``Preference`` (then member 0 of the stack is the base; a stack with ``names`` of its other
            members is weighed by name, any other in the order given), or numbers (K,), or one row a
            sample (B, K), or a function of the time t that returns either. Rows sum to one; signs are free.
            A member whose coefficient is exactly zero in every row is not evaluated.

    Raises:
        ValueError: coefficients that do not sum to one, are not finite, or do not fit the stack.

    Source: Diffusion Blend 2505.18547, Lemma 2.
    """

    def __init__(
        self,
        stack: ScoreStack | Sequence[ScoreFunction],
        coefficients: Preference | Tensor | Sequence[float] | CoefficientRule,
    ) -> None:
        outer: ScoreStack = Stack(stack) if isinstance(stack, (list, tuple)) else stack  # type: ignore[assignment]
        if not (callable(outer) and hasattr(outer, "__len__")):
            raise TypeError(f"Blend needs a score stack or a list of score functions, got {type(stack).__name__}")
        rule: Tensor | CoefficientRule
        if isinstance(coefficients, Preference):
            rule = coefficients.coefficients(getattr(outer, "names", None))
            if rule.shape[-1] != len(outer):
                raise ValueError(
                    f"a preference over {len(coefficients.names)} members needs a stack of the base and these, "
                    f"{rule.shape[-1]} scores, got {len(outer)}; put the base first"
                )
        else:
            rule = coefficients if callable(coefficients) else _numbers(coefficients)
        if not callable(rule):
            rule = check_coefficients(rule, len(outer))
        nested = isinstance(outer, Stack) and any(isinstance(f, Blend) for f in outer.functions)
        self.stack, self._rule = _flatten(outer, rule) if nested else (outer, rule)  # type: ignore[arg-type]
        self._constant = None if callable(self._rule) else _active(self._rule)

    @property
    def constant(self) -> bool:
        """Whether the coefficients are the same at all times (needed for certificate and correction)."""
        return self._constant is not None

    @property
    def coefficients(self) -> Tensor:
        """The coefficients over the stack, float64 (K,) or (B, K); only for constant ones."""
        if callable(self._rule):
            raise ValueError("the coefficients of this blend depend on time; ask coefficients_at(t)")
        return self._rule

    def coefficients_at(self, t: Tensor) -> Tensor:
        """Return the coefficients over the stack at time t, float64 (K,) or (B, K), checked."""
        if callable(self._rule):
            return check_coefficients(_numbers(self._rule(t)), len(self.stack))
        return self._rule

    def evaluate(self, x: Tensor, t: Tensor) -> Evaluation:
        """Evaluate the members that count, once each, and blend them.

        Args:
            x: state (B, *event).
            t: time, 0-dim float64.
        """
        active, chosen = self._constant or _active(self.coefficients_at(t))
        if chosen.ndim == 2 and len(chosen) != len(x):
            raise ValueError(f"coefficients for {len(chosen)} samples need a batch of as many, got {len(x)}")
        members = self.stack(x, t, active)
        score = members[0] if len(active) == 1 else combine(members, chosen)
        return Evaluation(score, members, chosen, active)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the blended score (B, *event)."""
        return self.evaluate(x, t).score

    def prepare(self, times: Tensor) -> None:
        """Let the stack prepare for the times of a run."""
        prepare_times(self.stack, times)

    def rows(self, index: Tensor) -> Blend:
        """Return the blend for the batch rows ``index``."""
        part, rule = object.__new__(Blend), self._rule

        def take(c: Tensor) -> Tensor:
            return c[index.to(c.device)] if c.ndim == 2 else c

        part.stack = restrict_rows(self.stack, index)
        part._rule = (lambda t: take(_numbers(rule(t)))) if callable(rule) else take(rule)
        part._constant = None if callable(part._rule) else _active(part._rule)
        return part


def check_coefficients(coefficients: Tensor, count: int) -> Tensor:
    """Return float64 coefficients (count,) or (B, count), or raise unless finite and summing to one.

    Raises:
        ValueError: wrong shape, not finite, or a row that does not sum to one (tolerance 1e-6).
    """
    c = coefficients
    if c.ndim not in (1, 2) or c.shape[-1] != count:
        raise ValueError(
            f"a blend of {count} members needs coefficients of shape ({count},) or (B, {count}), got {tuple(c.shape)}"
        )
    if not bool(c.isfinite().all()):
        raise ValueError(f"blend coefficients must be finite, got {_show(c)}; remove the member or give it 0")
    excess = c.sum(-1) - 1
    if bool((excess.abs() > SUM_TOLERANCE).any()):
        row = c if c.ndim == 1 else c[int(excess.abs().argmax())]
        total = float(row.sum())
        raise ValueError(
            f"blend coefficients must sum to 1, got {total:g} ({_show(row)}); give the base model "
            f"{float(row[0]) + 1 - total:g}, or rescale"
        )
    return c


def _show(c: Tensor) -> str:
    return "[" + ", ".join(f"{value:g}" for value in c.flatten()[:8].tolist()) + (", ...]" if c.numel() > 8 else "]")


def _number(value: float | Tensor, what: str) -> Tensor:
    if isinstance(value, (str, bool)):
        raise TypeError(f"{what} must be a number, got {value!r}")
    number = _numbers(value)
    if number.ndim > 1:
        raise ValueError(f"{what} must be a number or one a sample, got shape {tuple(number.shape)}")
    if not bool(number.isfinite().all()):
        raise ValueError(f"{what} must be finite, got {number.tolist()}")
    return number


def _numbers(values: float | Tensor | Sequence[float]) -> Tensor:
    try:
        return torch.as_tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"coefficients must be numbers, got {values!r}") from error


def _active(coefficients: Tensor) -> tuple[tuple[int, ...], Tensor]:
    """Return the positions whose coefficient is not zero in every row, and their coefficients."""
    used = (coefficients != 0) if coefficients.ndim == 1 else (coefficients != 0).any(0)
    active = tuple(used.nonzero().flatten().tolist())
    return active, coefficients[..., list(active)]


def _flatten(outer: Stack, rule: Tensor | CoefficientRule) -> tuple[ScoreStack, Tensor | CoefficientRule]:
    """Return the leaves of nested blends as one stack, and the rule of their coefficients.

    A leaf that several blends share is one leaf. The leaf coefficients are the outer ones times the matrix
    ``mix`` (outer member, leaf) of the inner ones.
    """
    functions: list[ScoreFunction] = []
    stacks: list[ScoreStack] = []
    places: list[list[tuple[int, int]]] = []  # per outer member: (group, position); group -1 is `functions`

    def place_function(function: ScoreFunction) -> tuple[int, int]:
        known = [i for i, other in enumerate(functions) if other is function]
        if not known:
            functions.append(function)
        return -1, known[0] if known else len(functions) - 1

    for member in outer.functions:
        if not isinstance(member, Blend):
            places.append([place_function(member)])
        elif isinstance(member.stack, Stack):
            places.append([place_function(function) for function in member.stack.functions])
        else:
            known = [i for i, other in enumerate(stacks) if other is member.stack]
            if not known:
                stacks.append(member.stack)
            group = known[0] if known else len(stacks) - 1
            places.append([(group, k) for k in range(len(member.stack))])

    parts: list[ScoreStack] = ([Stack(functions)] if functions else []) + stacks
    starts, total = {}, 0
    for group, part in zip(([-1] if functions else []) + list(range(len(stacks))), parts, strict=True):
        starts[group] = total
        total += len(part)
    leaves = [[starts[group] + k for group, k in member] for member in places]

    def mix(t: Tensor | None) -> Tensor:
        rows = []
        for member, index in zip(outer.functions, leaves, strict=True):
            inner = torch.ones(1, dtype=torch.float64)
            if isinstance(member, Blend):
                inner = member.coefficients if t is None else member.coefficients_at(t)
            row = torch.zeros(*inner.shape[:-1], total, dtype=torch.float64)
            row.index_add_(-1, torch.tensor(index), inner)  # a leaf named twice counts twice
            rows.append(row)
        return torch.stack(torch.broadcast_tensors(*rows), dim=-2)

    def apply(c: Tensor, matrix: Tensor) -> Tensor:
        return (c.unsqueeze(-2) @ matrix).squeeze(-2)

    flat: ScoreStack = parts[0] if len(parts) == 1 else Concatenated(parts)
    if not callable(rule) and all(f.constant for f in outer.functions if isinstance(f, Blend)):
        return flat, apply(rule, mix(None))
    outer_rule: CoefficientRule = rule if callable(rule) else (lambda t: rule)
    return flat, lambda t: apply(check_coefficients(_numbers(outer_rule(t)), len(outer)), mix(t))
