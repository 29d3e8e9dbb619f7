"""The parametrisations that networks predict instead of the score.

A network may predict any of

    score = -eps / sigma,   eps,   x0,   v = alpha eps - sigma x0,   flow u = alpha' x0 + sigma' eps,

all of the form ``c x0 + d eps`` with x = alpha x0 + sigma eps. Given x and one of them, the other is

    target = [ (c' d - d' c) x + (d' alpha - c' sigma) value ] / (alpha d - sigma c),

affine in the prediction with a slope that does not depend on x. So a combination with coefficients that
sum to one means the same in every parametrisation; this one fact carries the whole library.

Source: Salimans and Ho 2202.00512 (v); Lipman et al. 2210.02747 (flow).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from sdeblend.schedule import NoiseSchedule, Time

Parametrisation = Literal["score", "eps", "x0", "v", "flow"]


def _clean_and_noise(schedule: NoiseSchedule, t: Time, name: str) -> tuple[Tensor, Tensor]:
    """Return (c, d) with ``name = c x0 + d eps``."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    if name == "score":
        return zero, -1 / sigma
    if name == "eps":
        return zero, one
    if name == "x0":
        return one, zero
    if name == "v":
        return -sigma, alpha
    if name == "flow":
        return schedule.alpha_rate(t), schedule.sigma_rate(t)
    raise ValueError(f"a parametrisation must be one of {', '.join(get_args(Parametrisation))}, got {name!r}")


def conversion(
    schedule: NoiseSchedule, t: Time, source: Parametrisation, target: Parametrisation
) -> tuple[Tensor, Tensor]:
    """Return float64 (p, q) with ``target = p x + q source`` at time t, shaped as t.

    Args:
        schedule: the forward process.
        t: time, t > 0.
        source: what is given.
        target: what is wanted.

    Raises:
        ValueError: for an unknown name.

    Source: module docstring; Salimans and Ho 2202.00512, appendix D.
    """
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    c, d = _clean_and_noise(schedule, t, source)
    c2, d2 = _clean_and_noise(schedule, t, target)
    determinant = alpha * d - sigma * c
    return (c2 * d - d2 * c) / determinant, (d2 * alpha - c2 * sigma) / determinant


def convert(
    value: Tensor,
    x: Tensor,
    t: Time,
    schedule: NoiseSchedule,
    *,
    source: Parametrisation,
    target: Parametrisation,
) -> Tensor:
    """Convert a prediction from one parametrisation to another.

    Args:
        value: the prediction, (B, *event), or (K, B, *event) for a stack.
        x: the state it was made at, (B, *event).
        t: time, 0-dim, t > 0.
        schedule: the forward process.
        source: what ``value`` is: "score", "eps", "x0", "v" or "flow".
        target: what is wanted.

    Returns:
        the same prediction as ``target``, shaped as ``value``.
    """
    if source == target:
        return value
    p, q = conversion(schedule, t, source, target)
    return float(p) * x + float(q) * value
