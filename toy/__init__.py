"""Gaussian mixtures on which every statement about blending has a closed form."""

from toy import problems
from toy.control import blend_gap, control, jensen_control, jensen_gap, log_mean_exp_reward
from toy.mixture import GaussianMixture
from toy.posterior import Posterior
from toy.problems import PROBLEMS, Problem, random_problem
from toy.rewards import QuadraticReward, combine
from toy.stack import MixtureStack, mixture_score

__all__ = [
    "PROBLEMS",
    "GaussianMixture",
    "MixtureStack",
    "Posterior",
    "Problem",
    "QuadraticReward",
    "blend_gap",
    "combine",
    "control",
    "jensen_control",
    "jensen_gap",
    "log_mean_exp_reward",
    "mixture_score",
    "problems",
    "random_problem",
]
