"""Gaussian mixtures on which every statement about blending has a closed form."""

from toy.control import blend_gap, control, jensen_control, jensen_gap, log_mean_exp_reward
from toy.mixture import GaussianMixture
from toy.posterior import Posterior
from toy.rewards import QuadraticReward, combine

__all__ = [
    "GaussianMixture",
    "Posterior",
    "QuadraticReward",
    "blend_gap",
    "combine",
    "control",
    "jensen_control",
    "jensen_gap",
    "log_mean_exp_reward",
]
