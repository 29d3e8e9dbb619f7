"""Rewards of images: formulas, learned ones, those of one's own, by name; and scores that one bad image does not spoil.

``formulas`` has file size, colourfulness and the bundled model's scorer, ``learned`` what networks were trained to
judge (CLIPScore, PickScore, ...); ``scoring`` finds a reward of any kind by its name.
"""

from stablediffusion.rewards.formulas import (
    REWARDS,
    ImageReward,
    colourfulness,
    find_reward,
    jpeg_estimate,
    jpeg_size,
)
from stablediffusion.rewards.scoring import Prompts, image_reward, image_rewards, score_each

__all__ = [
    "REWARDS",
    "ImageReward",
    "Prompts",
    "colourfulness",
    "find_reward",
    "image_reward",
    "image_rewards",
    "jpeg_estimate",
    "jpeg_size",
    "score_each",
]
