"""What most people write: the peers that the benchmarks race against."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdeblend.schedule import NoiseSchedule
from sdeblend.score import ScoreFunction
from toy import GaussianMixture


def broadcast_score(
    mixture: GaussianMixture, schedule: NoiseSchedule, dtype: torch.dtype = torch.float32
) -> ScoreFunction:
    """Return the textbook mixture score: differences (N, K, d), one einsum, softmax.

    Precisions are formed anew at each time, as the covariance a^2 C + s^2 I changes with it.
    """
    weights, means = mixture.log_weights.to(dtype), mixture.means
    covariances, eye = mixture.covariances, torch.eye(mixture.dim, dtype=torch.float64)

    def score(x: Tensor, t: Tensor) -> Tensor:
        alpha, variance = schedule.alpha(t), schedule.sigma(t).square()
        noised = alpha.square() * covariances + variance * eye
        precision = torch.linalg.inv(noised).to(dtype)
        log_det = torch.logdet(noised).to(dtype)
        difference = x[:, None, :] - (alpha * means).to(dtype)
        pulled = torch.einsum("kij,nkj->nki", precision, difference)
        logits = weights - log_det / 2 - (pulled * difference).sum(-1) / 2 - mixture.dim * math.log(2 * math.pi) / 2
        return -(logits.softmax(1)[..., None] * pulled).sum(1)

    return score
