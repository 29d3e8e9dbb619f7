"""The exact target of a caption of the bundled model: drawings of it, tilted by exp(lambda r(w) / alpha).

``W1 of r(w)`` is the Wasserstein distance between the law of r(w) of the images and of these, caption by caption,
beside what exact samples have.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from scipy.stats import wasserstein_distance
from torch import Tensor

from sdeblend.evaluate.results import Distance
from stablediffusion.scenes.captions import parse
from stablediffusion.small.candidates import SCORED, draw_candidates

# Sets of exact samples, for what distances they have.
FLOORS: Final = 32


@dataclass(frozen=True)
class Target:
    """The rewards of drawings of a caption.

    Attributes:
        rewards: name -> in units of its scale, float64 (J,).
        kl_weight: alpha of the members.
    """

    rewards: Mapping[str, Tensor]
    kl_weight: float

    def law(self, shares: Mapping[str, float]) -> tuple[np.ndarray, np.ndarray]:
        """Return lambda r(w) of the drawings, (J,), and their probabilities; ``shares`` is lambda w by name."""
        exact = torch.stack([share * self.rewards[name] for name, share in shares.items()]).sum(0)
        return exact.numpy(), (exact / self.kl_weight).softmax(0).numpy()

    def means(self, shares: Mapping[str, float]) -> dict[str, float]:
        """Return the mean of each reward."""
        _, law = self.law(shares)
        return {name: float(law @ reward.numpy()) for name, reward in self.rewards.items()}

    def distance(
        self, found: np.ndarray, shares: Mapping[str, float], log_weights: Tensor | None, count: int
    ) -> Distance:
        """Return the distance of samples.

        Args:
            found: lambda r(w) of them, (B,).
            shares: lambda w by name.
            log_weights: of the samples, (B,), or None.
            count: how many independent samples of equal weight they are worth.
        """
        if not np.isfinite(found).all():
            return Distance(float("nan"))
        exact, law = self.law(shares)
        weights = None if log_weights is None else log_weights.double().softmax(0).cpu().numpy()
        rng = np.random.default_rng(0)
        floors = [wasserstein_distance(rng.choice(exact, count, p=law), exact, None, law) for _ in range(FLOORS)]
        distance = wasserstein_distance(found, exact, weights, law)
        return Distance(float(distance), float(np.mean(floors)), float(np.std(floors, ddof=1)))


def target_of(
    pipe: Any, prompt: str, names: Sequence[str], scale: Callable[[str], float], kl_weight: float | None, count: int
) -> Target | None:
    """Return the target of a prompt; None for what is no caption, or rewards that drawings are not scored by.

    Args:
        pipe: the bundled pipeline.
        prompt: what is drawn.
        names: of the rewards.
        scale: what a reward is divided by, by its name.
        kl_weight: alpha of the members, None if not known.
        count: J.
    """
    if kl_weight is None or not set(names) <= set(SCORED):
        return None
    try:
        parse(prompt)
    except ValueError:
        return None
    seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "little")
    drawn = draw_candidates(pipe, [prompt], count=count, generator=torch.Generator().manual_seed(seed))
    return Target({name: drawn.rewards[name][0].double() / scale(name) for name in names}, kl_weight)
