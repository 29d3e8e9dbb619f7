"""Laws with closed forms: Gaussian mixtures, the rewards that keep them mixtures, their tilts and posteriors."""

from toy.mixtures.mixture import GaussianMixture
from toy.mixtures.posterior import Posterior
from toy.mixtures.rewards import QuadraticReward, combine

__all__ = ["GaussianMixture", "Posterior", "QuadraticReward", "combine"]
