"""Learned rewards of images; none yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stablediffusion.rewards import ImageReward

SCORERS: Mapping[str, str] = {}


def load_scorer(name: str, model: str | None = None, **options: Any) -> ImageReward:
    """Return a learned reward by name."""
    raise ValueError(f"there is no learned reward {name!r}")
