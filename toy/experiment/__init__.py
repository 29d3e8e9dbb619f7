"""``sdeblend toy``: one problem, every method, each beside the exact target."""

from toy.experiment.experiment import Experiment, run
from toy.experiment.problem_file import load_problem
from toy.experiment.settings import BlendSettings

__all__ = ["BlendSettings", "Experiment", "load_problem", "run"]
