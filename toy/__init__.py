"""Gaussian mixtures on which every statement about blending has a closed form.

``GaussianMixture`` and ``QuadraticReward`` make a ``Problem``; its ``MixtureStack`` is what ``sdeblend`` blends. The
closed forms of control and Jensen gap, the bounds, the Fokker-Planck law of a blend and the metrics measure the result.
"""

from toy import metrics, problems
from toy.mixtures.mixture import GaussianMixture
from toy.mixtures.posterior import Posterior
from toy.mixtures.rewards import QuadraticReward, combine
from toy.problems import PROBLEMS, Problem, random_problem
from toy.scores.stack import MixtureStack, mixture_score
from toy.statements.bounds import JensenBounds, jensen_bounds, thermodynamic_gap
from toy.statements.control import blend_gap, control, jensen_control, jensen_gap, log_mean_exp_reward
from toy.statements.fokker_planck import Density, backward_density

__all__ = [
    "PROBLEMS",
    "Density",
    "GaussianMixture",
    "JensenBounds",
    "MixtureStack",
    "Posterior",
    "Problem",
    "QuadraticReward",
    "backward_density",
    "blend_gap",
    "combine",
    "control",
    "jensen_bounds",
    "jensen_control",
    "jensen_gap",
    "log_mean_exp_reward",
    "metrics",
    "mixture_score",
    "problems",
    "random_problem",
    "thermodynamic_gap",
]
