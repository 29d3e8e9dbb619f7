"""What the tests of the core share: seeded generators, z scores, runs on one Brownian path, least-squares slopes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Z = 5.0
"""An estimate may be this many standard errors from the exact value; a control must be further."""


def seeded(seed: int = 0) -> torch.Generator:
    """Return a generator of its own."""
    return torch.Generator().manual_seed(seed)


def relative(got: Tensor, expected: Tensor) -> float:
    """Return the largest error relative to the largest entry expected."""
    return float((got.double() - expected.double()).abs().max() / expected.double().abs().max())


def moment_z(samples: Tensor, mean: Tensor, covariance: Tensor, log_weights: Tensor | None = None) -> float:
    """Return the largest z score of the (weighted) first and second moments of samples (B, d).

    The second moments are taken about the exact mean, so that each is a mean of independent terms.
    """
    x = samples.double() - mean
    d = x.shape[1]
    pairs = [(i, j) for i in range(d) for j in range(i, d)]
    terms = torch.cat([x, torch.stack([x[:, i] * x[:, j] for i, j in pairs], 1)], 1)
    exact = torch.cat([torch.zeros(d, dtype=torch.float64), torch.stack([covariance[i, j] for i, j in pairs])])
    w = torch.full((len(x),), 1 / len(x), dtype=torch.float64) if log_weights is None else log_weights.softmax(0)
    estimate = w @ terms
    error = (w.square() @ (terms - estimate).square()).sqrt()
    return float(((estimate - exact) / error).abs().max())


def mean_z(values: Tensor, exact: float) -> float:
    """Return how many standard errors the mean of values (B,) is from ``exact``."""
    return abs(float(values.double().mean()) - exact) / (float(values.double().std()) / math.sqrt(len(values)))


def slope(steps: Sequence[int], errors: Sequence[float]) -> float:
    """Return the order p of errors ~ steps^-p, by least squares on logarithms."""
    x = torch.tensor(steps, dtype=torch.float64).log()
    y = torch.tensor(errors, dtype=torch.float64).log()
    x, y = x - x.mean(), y - y.mean()
    return -float((x * y).sum() / x.square().sum())


def gauss_legendre(edges: Tensor, order: int = 12) -> tuple[Tensor, Tensor]:
    """Return nodes and weights (panels, order) of Gauss-Legendre quadrature on the panels between ``edges``."""
    import numpy as np

    node, weight = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(order))
    half = edges.diff() / 2
    return (edges[:-1] + half)[:, None] + half[:, None] * node, half[:, None] * weight
