"""Rewards of images: formulas and learned ones in one registry, and scores that one bad image does not spoil.

To add one, add it to ``formulas.FORMULAS`` or ``learned.LEARNED``; ``image_reward`` finds it, or a function of one's
own, by name.
"""

from stablediffusion.rewards.formulas import colourfulness, jpeg_estimate, jpeg_size
from stablediffusion.rewards.registry import REWARDS, image_reward, image_rewards
from stablediffusion.rewards.scoring import Prompts, score_each

__all__ = [
    "REWARDS",
    "Prompts",
    "colourfulness",
    "image_reward",
    "image_rewards",
    "jpeg_estimate",
    "jpeg_size",
    "score_each",
]
