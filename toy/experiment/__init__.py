"""``sdeblend toy``: one problem, every method, each beside the exact target."""

from toy.experiment.experiment import Outcome, run
from toy.experiment.settings import Settings

__all__ = ["Outcome", "Settings", "run"]
