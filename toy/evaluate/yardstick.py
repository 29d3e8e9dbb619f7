"""Distances of samples to a law that is known, and what exact samples have.

Total variation of the mode weights, sliced W2 to a large exact sample, and on a line KL(samples || law) over 40 bins of
equal probability under the law; each with its floor, what as many exact samples give.
"""

from __future__ import annotations

from statistics import mean, stdev
from typing import Final

import torch
from torch import Tensor

from toy import metrics
from toy.mixtures.mixture import GaussianMixture

BINS: Final = 40
PROJECTIONS: Final = 64
REFERENCE: Final = 4
REPEATS: Final = 16


class Yardstick:
    """Distances of n samples to a law, and what exact samples have: the floor.

    Sliced W2 is taken to one exact sample of four times the size, the same for every method and for the floor, which
    is therefore that of this very sample. Weighted samples have the floor of as many as they are worth.

    Args:
        law: to measure against.
        n: number of samples.
        generator: draws directions, the exact sample and those of the floor.
    """

    def __init__(self, law: GaussianMixture, n: int, generator: torch.Generator) -> None:
        self.law = law
        self._floors: dict[int, dict[str, tuple[float, float]]] = {}
        directions = torch.randn(law.dim, PROJECTIONS if law.dim > 1 else 1, generator=generator, dtype=torch.float64)
        self.directions = directions / directions.norm(dim=0)
        self.quantiles = (law.sample(REFERENCE * n, generator=generator) @ self.directions).T.sort(-1).values
        self._seed = int(torch.randint(2**62, (1,), generator=generator))

    def floors(self, n: int) -> dict[str, tuple[float, float]]:
        """Return the mean and the standard deviation of each distance of n exact samples."""
        if n not in self._floors:
            generator = torch.Generator().manual_seed(self._seed + n)
            draws = [self.distances(self.law.sample(n, generator=generator), None) for _ in range(REPEATS)]
            self._floors[n] = {k: (mean(d[k] for d in draws), stdev(d[k] for d in draws)) for k in draws[0]}
        return self._floors[n]

    def distances(self, x: Tensor, log_weights: Tensor | None) -> dict[str, float]:
        """Return each distance by name, of samples (n, d) float64 and log weights (n,) or none."""
        values = {
            "mode TV": float(metrics.mode_weight_tv(x, self.law, log_weights=log_weights).value),
            "sliced W2": self._sliced_w2(x, log_weights),
        }
        if self.law.dim == 1:
            values["KL"] = self._binned_kl(x, log_weights)
        return values

    def _sliced_w2(self, x: Tensor, log_weights: Tensor | None) -> float:
        ordered, order = (x @ self.directions).T.contiguous().sort(-1)
        count, levels = len(x), self.quantiles.shape[1]
        if log_weights is None:
            at = (torch.arange(levels) * count // levels).expand(len(ordered), -1)
        else:
            top = log_weights.double().softmax(0)[order].cumsum(-1)
            middle = (torch.arange(levels, dtype=torch.float64) + 0.5) / levels
            at = torch.searchsorted(top / top[:, -1:], middle.expand(len(ordered), -1).contiguous())
        return float((ordered.gather(-1, at.clamp(max=count - 1)) - self.quantiles).square().mean().sqrt())

    def _binned_kl(self, x: Tensor, log_weights: Tensor | None) -> float:
        """Return KL(samples || law) over bins of equal probability under the law."""
        weights = torch.full((len(x),), 1 / len(x)).double() if log_weights is None else log_weights.double().softmax(0)
        scales = self.law.covariances[:, 0, 0].sqrt()
        level = torch.special.ndtr((x - self.law.means[:, 0]) / scales) @ self.law.weights
        bins = (level * BINS).long().clamp(0, BINS - 1)
        share = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, weights)
        return float(torch.special.xlogy(share, share * BINS).sum())
