"""Noise from one Brownian path: runs on nested grids see the same path, which is how a strong order is measured.

Source: Kloeden and Platen 1992, section 9.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class BrownianNoise:
    """Increments of a Brownian path, exact on every coarsening of its grid.

    Args:
        grid: the finest times, decreasing (n + 1,).
        shape: (B, *event).
        generator: draws the path, n tensors of this shape in float64.
    """

    def __init__(self, grid: Tensor, shape: Sequence[int], generator: torch.Generator) -> None:
        self._place = {round(float(t), 12): n for n, t in enumerate(grid)}
        h = -grid.diff()
        steps = torch.randn(len(h), *shape, generator=generator, dtype=torch.float64)
        steps *= h.sqrt().reshape(-1, *([1] * len(shape)))
        self.path = torch.cat([torch.zeros(1, *shape, dtype=torch.float64), steps.cumsum(0)])

    def __call__(self, n: int, t: Tensor, s: Tensor, like: Tensor) -> Tensor:
        places = [self._place.get(round(float(u), 12)) for u in (t, s)]
        if places[0] is None or places[1] is None:
            raise ValueError(
                f"a Brownian path is known on its own grid only, got the step {float(t):g} -> {float(s):g}"
            )
        if t == s:
            raise ValueError(f"a Brownian path has no noise for moves at one time, got them at t = {float(t):g}")
        increment = self.path[places[1]] - self.path[places[0]]
        return (increment / (float(t) - float(s)) ** 0.5).to(like)
