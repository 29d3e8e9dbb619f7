"""How far samples are from a law that is known, with standard errors and with the floor of exact samples.

Samples x_1..x_n may carry log weights; with w = softmax(log weights), the self-normalised mean of f and its error are

    mean = sum_i w_i f(x_i),        se^2 = sum_i w_i^2 (f(x_i) - mean)^2,

which without weights is the usual sd / sqrt(n). After resampling samples are not independent, but families of one start
are: with these given, se^2 = sum over families of (sum in the family of w_i (f(x_i) - mean))^2.

* Mode weights: mean responsibility of each component under the target. For samples of the target itself its
  expectation is the component's weight exactly, however much the components overlap.
* Sliced W2: root mean square over random directions of the one-dimensional Wasserstein-2 distance (exact for d = 1).

A distance between samples is never zero; compare it with the floor, what exact samples of the same size give.

Source: Bonneel et al. 2015 (sliced Wasserstein); Lee and Whiteley 2018 (families).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from toy.mixtures.mixture import GaussianMixture

PROJECTIONS = 64


class Estimate(NamedTuple):
    """An estimate and its standard error, float64 tensors of the same shape."""

    value: Tensor
    se: Tensor


class Moments(NamedTuple):
    """Mean (d,) and covariance (d, d) of samples, each with standard errors."""

    mean: Estimate
    covariance: Estimate


def moments(samples: Tensor, *, log_weights: Tensor | None = None, families: Tensor | None = None) -> Moments:
    """Return mean and covariance with standard errors.

    Args:
        samples: (n, d), n >= 2.
        log_weights: (n,), up to a constant; equal weights if left out.
        families: which start each sample descends from, long (n,); each from its own if left out.

    Raises:
        ValueError: samples or weights of another shape, not finite, or with all the weight on one sample.
    """
    x, w = _samples(samples), _weights(log_weights, samples)
    mean = _mean(x, w, families)
    centred = x - mean.value
    spare = 1 - float(w.square().sum())
    if spare <= 1e-12:
        raise ValueError("a covariance needs weight on at least two samples, got all of it on one; draw more")
    if families is not None:  # one row at a time: (n, d, d) would not fit in many dimensions
        rows = [_mean(centred * centred[:, i : i + 1], w, families) for i in range(x.shape[1])]
        return Moments(mean, Estimate(*(torch.stack(part) / spare for part in zip(*rows, strict=True))))
    # As _mean of the products c_i c_j, by matrix products.
    raw, heavy, squares = centred.T @ (w[:, None] * centred), w.square()[:, None], centred.square()
    variance = squares.T @ (heavy * squares) - 2 * raw * (centred.T @ (heavy * centred)) + raw.square() * heavy.sum()
    error = (variance.clamp_min(0) * (len(w) / (len(w) - 1))).sqrt()
    return Moments(mean, Estimate(raw / spare, error / spare))


def mean_reward(
    samples: Tensor,
    reward: Callable[[Tensor], Tensor],
    *,
    log_weights: Tensor | None = None,
    families: Tensor | None = None,
) -> Estimate:
    """Return the mean of a reward, with its standard error.

    Args:
        samples: (n, d).
        reward: (n, d) -> (n,), a ``QuadraticReward`` or any function.
        log_weights, families: as for ``moments``.
    """
    x, w = _samples(samples), _weights(log_weights, samples)
    return _mean(reward(x).to(torch.float64), w, families)


def mode_weights(
    samples: Tensor,
    mixture: GaussianMixture,
    *,
    log_weights: Tensor | None = None,
    families: Tensor | None = None,
) -> Estimate:
    """Return the share of the samples in each component of ``mixture``, (K,), by mean responsibility.

    Args:
        samples: (n, d).
        mixture: whose components count as modes, usually the exact target.
        log_weights, families: as for ``moments``.
    """
    x, w = _samples(samples, mixture.dim), _weights(log_weights, samples)
    return _mean(mixture.responsibilities(x), w, families)


def mode_weight_tv(
    samples: Tensor,
    mixture: GaussianMixture,
    *,
    log_weights: Tensor | None = None,
    families: Tensor | None = None,
) -> Estimate:
    """Return the total variation sum_k |share_k - weight_k| / 2 of the mode weights.

    The standard error is the delta method's; near the floor, where the signs of the differences are noise, compare
    with ``mode_weight_tv_floor`` instead.

    Args:
        samples: (n, d).
        mixture: the exact target.
        log_weights, families: as for ``moments``.

    Returns:
        0-dim estimate, in [0, 1].
    """
    x, w = _samples(samples, mixture.dim), _weights(log_weights, samples)
    shares = mixture.responsibilities(x)
    excess = w @ shares - mixture.weights
    return Estimate(excess.abs().sum() / 2, _mean(shares @ excess.sign() / 2, w, families).se)


def mode_weight_tv_floor(
    mixture: GaussianMixture, n: int, *, generator: torch.Generator, repeats: int = 16
) -> Estimate:
    """Return the mode-weight TV that n exact samples have, averaged over ``repeats`` draws."""
    draws = [mode_weight_tv(mixture.sample(n, generator=generator), mixture).value for _ in range(repeats)]
    return _repeated(draws)


def sliced_w2(
    first: Tensor,
    second: Tensor,
    *,
    generator: torch.Generator,
    projections: int = PROJECTIONS,
    log_weights: Tensor | None = None,
    second_log_weights: Tensor | None = None,
) -> float:
    """Return the sliced Wasserstein-2 distance between two sample sets.

    Args:
        first: (n, d).
        second: (m, d).
        generator: draws the directions; the same seed gives the same directions. Not used for d = 1.
        projections: number of directions.
        log_weights: of ``first``, (n,) or none.
        second_log_weights: of ``second``, (m,) or none.

    Returns:
        the distance, in units of x.

    Raises:
        ValueError: sets of different dimension, fewer than one projection.
    """
    a, b = _samples(first), _samples(second)
    _same_dim(a, b)
    if isinstance(projections, bool) or not isinstance(projections, int) or projections < 1:
        raise ValueError(f"sliced W2 needs a whole number of at least 1 projections, got {projections!r}; 64 is usual")
    wa, wb = (None if log_w is None else _weights(log_w, x) for log_w, x in ((log_weights, a), (second_log_weights, b)))
    dim = a.shape[1]
    directions = torch.ones(1, 1, dtype=torch.float64)
    if dim > 1:
        directions = torch.randn(dim, projections, generator=generator, dtype=torch.float64, device=generator.device)
        directions = directions / directions.norm(dim=0)
    total = 0.0
    for some in directions.to(a.device).split(8, dim=1):
        total += float(_w2_squared((a @ some).T, wa, (b @ some).T, wb).sum())
    return math.sqrt(total / directions.shape[1])


def sliced_w2_floor(
    mixture: GaussianMixture,
    n: int,
    *,
    generator: torch.Generator,
    reference: int | None = None,
    projections: int = PROJECTIONS,
    repeats: int = 4,
) -> Estimate:
    """Return the sliced W2 between two exact sample sets, averaged over ``repeats`` draws.

    Args:
        mixture: the law.
        n: size of the first set.
        generator: draws samples and directions.
        reference: size of the second set; n if left out.
        projections: number of directions.
        repeats: number of draws, at least 2.
    """
    draws = []
    for _ in range(repeats):
        first = mixture.sample(n, generator=generator)
        second = mixture.sample(n if reference is None else reference, generator=generator)
        draws.append(sliced_w2(first, second, generator=generator, projections=projections))
    return _repeated([torch.tensor(draw, dtype=torch.float64) for draw in draws])


def _w2_squared(a: Tensor, wa: Tensor | None, b: Tensor, wb: Tensor | None) -> Tensor:
    """Return the squared one-dimensional W2 of each row of a (P, n) and b (P, m), (P,)."""
    (a, order_a), (b, order_b) = a.sort(-1), b.sort(-1)
    if wa is None and wb is None and a.shape == b.shape:
        return (a - b).square().mean(-1)
    top_a, top_b = _levels(wa, a, order_a), _levels(wb, b, order_b)
    levels = torch.cat([top_a, top_b], -1).sort(-1).values
    lengths = torch.diff(levels, dim=-1, prepend=levels.new_zeros(len(levels), 1))
    middle = levels - lengths / 2
    at_a = a.gather(-1, torch.searchsorted(top_a, middle).clamp_max(a.shape[-1] - 1))
    at_b = b.gather(-1, torch.searchsorted(top_b, middle).clamp_max(b.shape[-1] - 1))
    return (lengths * (at_a - at_b).square()).sum(-1)


def _levels(weights: Tensor | None, values: Tensor, order: Tensor) -> Tensor:
    """Return the distribution function at the sorted values, (P, n), 1 at the last."""
    count = values.shape[-1]
    if weights is None:
        steps = torch.arange(1, count + 1, dtype=torch.float64, device=values.device) / count
        return steps.expand_as(values).contiguous()
    levels = weights[order].cumsum(-1)
    return levels / levels[:, -1:]


def _mean(values: Tensor, weights: Tensor, families: Tensor | None = None) -> Estimate:
    """Return the weighted mean over the first axis, with its standard error."""
    mean = torch.tensordot(weights, values, dims=([0], [0]))
    if families is not None:
        pulls = (weights * (values - mean).movedim(0, -1)).movedim(-1, 0)
        return Estimate(mean, torch.zeros_like(pulls).index_add_(0, families, pulls).square().sum(0).sqrt())
    variance = torch.tensordot(weights.square(), (values - mean).square(), dims=([0], [0]))
    # Of n equal weights, n - 1 are left once the mean is taken.
    count = len(weights)
    return Estimate(mean, (variance * (count / (count - 1))).sqrt() if count > 1 else torch.full_like(mean, torch.inf))


def _repeated(draws: list[Tensor]) -> Estimate:
    if len(draws) < 2:
        raise ValueError(f"a floor needs at least 2 repeats, got {len(draws)}; 4 to 16 are usual")
    values = torch.stack(draws)
    return Estimate(values.mean(), values.std() / math.sqrt(len(draws)))


def _samples(samples: Tensor, dim: int | None = None) -> Tensor:
    wanted = "(n, d)" if dim is None else f"(n, {dim})"
    if not isinstance(samples, Tensor) or samples.ndim != 2 or (dim is not None and samples.shape[1] != dim):
        given = tuple(samples.shape) if isinstance(samples, Tensor) else type(samples).__name__
        raise ValueError(f"samples must have shape {wanted}, got {given}")
    if len(samples) == 0 or not bool(samples.isfinite().all()):
        what = "none" if len(samples) == 0 else "a value that is not"
        raise ValueError(f"samples must be finite and at least one, got {what}; check the run that drew them")
    return samples.detach().to(torch.float64)


def _weights(log_weights: Tensor | None, samples: Tensor) -> Tensor:
    count = len(samples)
    if log_weights is None:
        return torch.full((count,), 1 / count, dtype=torch.float64, device=samples.device)
    if log_weights.shape != (count,):
        raise ValueError(f"{count} samples need log weights ({count},), got {tuple(log_weights.shape)}")
    log_w = log_weights.detach().to(device=samples.device, dtype=torch.float64)
    if bool(log_w.isnan().any()) or not math.isfinite(float(log_w.max())):
        raise ValueError(
            f"log weights must be below infinity and not all zero weight, got maximum {float(log_w.max())}"
        )
    return log_w.softmax(0)


def _same_dim(a: Tensor, b: Tensor) -> None:
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"sample sets must share their dimension, got {a.shape[1]} and {b.shape[1]}")
