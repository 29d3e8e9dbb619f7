"""Diffusion Blend: one affine combination of member scores (DB-MPA, DB-KLA, and both at once).

A member i is the pre-trained model ("base") tuned for a reward r_i at KL weight alpha, that is the tilt
p_i = p_base exp(r_i / alpha) / Z_i. For preference weights w and strength lambda the wanted target is
p_base exp(lambda sum_i w_i r_i / alpha) / Z, and the blend replaces its score by

    S = (1 - lambda sum_i w_i) S_base + lambda sum_i w_i S_i.

The coefficients over {base, members} always sum to one, so the combination means the same for scores,
eps, x0, v and flow velocities, and commutes with classifier-free guidance. Blends of blends are blends:
a nested blend is flattened to its leaves, each evaluated once.

The spread sum_i c_i |S_i|^2 - |S|^2 comes with every evaluation at no further one; it is what the
certificate and the correction are made of (``sdeblend.correct``).

Source: Diffusion Blend 2505.18547, Lemma 2 and Algorithms 1 and 2.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdeblend.preference import SUM_TOLERANCE, Preference, numbers
from sdeblend.score import Bound, ScoreFunction, ScoreStack, Stack, prepare_times, restrict_rows
from sdeblend.stacks import Concatenated

CoefficientRule = Callable[[Tensor], Tensor]


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
        flat = in_float64(self.members.flatten(2))
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
    if coefficients.ndim == 1 and not coefficients.requires_grad:
        factors: list[float] = coefficients.tolist()
        first, *others = members.unbind()
        out = first * factors[0]
        for member, factor in zip(others, factors[1:], strict=True):
            out.add_(member, alpha=factor)
        return out
    columns = coefficients.to(members).movedim(-1, 0)
    columns = columns.reshape(*columns.shape, *[1] * (members.ndim - columns.ndim))
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
        return in_float64(blended.new_zeros(len(blended)))
    squares = in_float64((members - blended).flatten(2).square().sum(2))
    c = coefficients.to(squares)
    return c @ squares if c.ndim == 1 else (c.T * squares).sum(0)


def in_float64(values: Tensor) -> Tensor:
    """Return values in float64: where they are, or on the CPU if their device has none (Apple's)."""
    return values.cpu().double() if values.device.type == "mps" else values.to(values.device, torch.float64)


class Blend(Bound):
    """A blend of member scores; itself a score function.

    Args:
        stack: K members, (x, t) -> (K, B, *event); or a sequence of score functions, blends among them.
        coefficients: a ``Preference`` (then member 0 of the stack is the base; weights by name need a stack with
            names), or numbers (K,), or one row a sample (B, K), or a function of the time t that returns either.
            Rows sum to one; signs are free. A member whose coefficient is exactly zero in every row is not evaluated,
            unless its gradient is wanted.

    Raises:
        ValueError: coefficients that do not sum to one, are not finite, or do not fit the stack and its names.
        TypeError: a stack that is none.

    Source: Diffusion Blend 2505.18547, Lemma 2.
    """

    def __init__(
        self,
        stack: ScoreStack | Iterable[ScoreFunction],
        coefficients: Preference | Tensor | Sequence[float] | CoefficientRule,
    ) -> None:
        if isinstance(stack, ScoreStack):
            outer = stack
        elif isinstance(stack, Iterable):
            outer = Stack(tuple(stack))
        else:
            raise TypeError(
                f"Blend needs a ScoreStack or a list of score functions, got {type(stack).__name__}; a stack of one's "
                "own inherits from sdeblend.ScoreStack"
            )
        rule: Tensor | CoefficientRule
        if isinstance(coefficients, Preference):
            rule = coefficients.over(outer)
        else:
            rule = coefficients if callable(coefficients) else numbers(coefficients)
        if not callable(rule):
            rule = check_coefficients(rule, len(outer))
        if isinstance(outer, Stack) and any(isinstance(f, Blend) for f in outer.functions):
            outer, rule = _flatten(outer, rule)
        self.stack, self._rule = outer, rule
        self._constant = None if callable(self._rule) else _active(self._rule)

    @property
    def constant(self) -> bool:
        """Whether the coefficients are the same at all times (needed for certificate and correction)."""
        return self._constant is not None

    @property
    def requires_grad(self) -> bool:
        """Whether constant coefficients ask for their gradient."""
        return self._constant is not None and self._constant[1].requires_grad

    @property
    def coefficients(self) -> Tensor:
        """The coefficients over the stack, float64 (K,) or (B, K); only for constant ones."""
        if callable(self._rule):
            raise ValueError("the coefficients of this blend depend on time; ask coefficients_at(t)")
        return self._rule

    def coefficients_at(self, t: Tensor) -> Tensor:
        """Return the coefficients over the stack at time t, float64 (K,) or (B, K), checked."""
        if callable(self._rule):
            return check_coefficients(numbers(self._rule(t)), len(self.stack))
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
        prepare_times(self.stack, times)

    def rows(self, index: Tensor) -> Blend:
        part, rule = copy.copy(self), self._rule

        def take(c: Tensor) -> Tensor:
            return c[index.to(c.device)] if c.ndim == 2 else c

        part.stack = restrict_rows(self.stack, index)
        part._rule = (lambda t: take(numbers(rule(t)))) if callable(rule) else take(rule)
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


def _active(coefficients: Tensor) -> tuple[tuple[int, ...], Tensor]:
    """Return the positions whose coefficient is not zero in every row, and their coefficients."""
    if coefficients.requires_grad:  # one that is zero has a gradient all the same
        return tuple(range(coefficients.shape[-1])), coefficients
    used = (coefficients != 0) if coefficients.ndim == 1 else (coefficients != 0).any(0)
    active = tuple(used.nonzero().flatten().tolist())
    return active, coefficients[..., list(active)]


def _flatten(outer: Stack, rule: Tensor | CoefficientRule) -> tuple[ScoreStack, Tensor | CoefficientRule]:
    """Return the leaves of nested blends as one stack, and the rule of their coefficients.

    A leaf that several blends share is one leaf. The leaf coefficients are the outer ones times the matrix
    ``mix`` (outer member, leaf) of the inner ones.
    """
    parts: dict[int, ScoreStack] = {}  # by identity of the function or stack that it is
    members: list[list[tuple[int, int]]] = []  # the leaves of each: (part, position in it)
    for member in outer.functions:
        inner = member.stack if isinstance(member, Blend) else Stack([member])
        alone = inner.functions if isinstance(inner, Stack) else ()
        for source in alone or (inner,):
            parts.setdefault(id(source), Stack([source]) if alone else inner)
        members.append([(id(f), 0) for f in alone] or [(id(inner), k) for k in range(len(inner))])
    place = {leaf: n for n, leaf in enumerate((key, k) for key, part in parts.items() for k in range(len(part)))}

    def mix(t: Tensor | None) -> Tensor:
        rows = []
        for member, leaves in zip(outer.functions, members, strict=True):
            inner = torch.ones(1, dtype=torch.float64)
            if isinstance(member, Blend):
                inner = member.coefficients if t is None else member.coefficients_at(t)
            row = torch.zeros(*inner.shape[:-1], len(place), dtype=torch.float64)
            # a leaf named twice counts twice
            rows.append(row.index_add(-1, torch.tensor([place[leaf] for leaf in leaves]), inner))
        return torch.stack(torch.broadcast_tensors(*rows), dim=-2)

    def apply(c: Tensor, matrix: Tensor) -> Tensor:
        return (c.unsqueeze(-2) @ matrix).squeeze(-2)

    flat = Concatenated(list(parts.values()))
    if not callable(rule) and all(f.constant for f in outer.functions if isinstance(f, Blend)):
        return flat, apply(rule, mix(None))
    outer_rule: CoefficientRule = rule if callable(rule) else (lambda t: rule)
    return flat, lambda t: apply(check_coefficients(numbers(outer_rule(t)), len(outer)), mix(t))
