"""Moved to ``sdeblend.reward``."""

from sdeblend.reward import Reward as Reward
from sdeblend.reward import WeightedReward as WeightedReward
