"""Moved to ``sdeblend.reward``."""

from sdeblend.reward import RewardFunction as Reward
from sdeblend.reward import WeightedReward

__all__ = ["Reward", "WeightedReward"]
