"""Any ``BackwardSDE`` as an SDE of torchsde, for an independent solver or for code that lives there.

torchsde integrates forward in its time tau. With tau = t_start - t the backward SDE reads

    dy = -(f y - g^2 S) dtau + g dw,

with diagonal (here: state-independent) Ito noise. States are flattened to (B, d) and shaped back.

torchsde is imported on first use; ``import sdeblend`` does not need it.

Source: Li et al., Scalable Gradients for Stochastic Differential Equations, 2001.01328.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdeblend.grid import check_grid
from sdeblend.sde import BackwardSDE, check_state


class TorchSDE:
    """The object that ``torchsde.sdeint`` expects (``f``, ``g``, ``noise_type``, ``sde_type``).

    Args:
        sde: the backward SDE.
        start: t at torchsde time 0; torchsde time tau is t = start - tau.
        event: shape of one sample.
    """

    noise_type = "diagonal"
    sde_type = "ito"

    def __init__(self, sde: BackwardSDE, start: float, event: Sequence[int]) -> None:
        self.sde, self.start, self.event = sde, float(start), tuple(event)

    def _time(self, tau: Tensor) -> Tensor:
        # torchsde steps in the dtype it is given; rounding must not leave the schedule.
        t = self.start - torch.as_tensor(tau, dtype=torch.float64)
        return t.clamp(self.sde.schedule.t_min, self.sde.schedule.t_max)

    def f(self, tau: Tensor, y: Tensor) -> Tensor:
        """Return minus the backward drift, (B, d)."""
        return -self.sde.drift(y.reshape(-1, *self.event), self._time(tau)).flatten(1)

    def g(self, tau: Tensor, y: Tensor) -> Tensor:
        """Return the diffusion g(t) for every coordinate, (B, d)."""
        return torch.full_like(y, float(self.sde.diffusion(self._time(tau))))


def solve_torchsde(
    sde: BackwardSDE,
    x: Tensor,
    grid: Tensor,
    *,
    seed: int,
    method: str = "euler",
    **options: Any,
) -> Tensor:
    """Solve a backward SDE by ``torchsde.sdeint`` and denoise at the end, as ``solve`` does.

    Args:
        sde: schedule and score.
        x: state at grid[0], (B, *event).
        grid: decreasing times; torchsde steps uniformly by (t_0 - t_n)/n between the ends, n the number of steps
            before a final 0, so give it a uniform grid.
        seed: entropy of torchsde's own Brownian path.
        method: a torchsde method for diagonal Ito noise: "euler", "milstein", "srk".
        **options: further arguments of ``sdeint`` (``adaptive``, ``rtol``, ...).

    Returns:
        samples at the grid's last time, (B, *event).

    Raises:
        ValueError: as torchsde, for an unknown method; or a grid that does not decrease, or not uniformly.
    """
    import torchsde

    x, grid = check_state(x), check_grid(grid, sde.schedule)
    denoise = float(grid[-1]) == 0
    ends = grid[:-1] if denoise else grid
    start, end, steps = float(ends[0]), float(ends[-1]), len(ends) - 1
    if steps < 1:
        raise ValueError(f"torchsde needs a grid with at least 2 times above 0, got {grid.tolist()}; use time_grid")
    if float((ends.diff() * steps / (end - start) - 1).abs().max()) > 1e-6 and not options.get("adaptive"):
        raise ValueError(
            "torchsde steps uniformly, got a grid whose steps differ; give time_grid(schedule, steps) or adaptive=True"
        )
    # torchsde computes its times in the dtype of the state: a float32 clock loses short steps near t_min.
    ts = torch.tensor([0.0, start - end], dtype=torch.float64)
    flat = x.flatten(1)
    path = torchsde.BrownianInterval(
        t0=0.0,
        t1=start - end,
        size=tuple(flat.shape),
        dtype=x.dtype,
        device=x.device,
        entropy=seed,
        levy_area_approximation="space-time" if method == "srk" else "none",
    )
    problem = TorchSDE(sde, start, x.shape[1:])
    with torch.no_grad():
        out = torchsde.sdeint(problem, flat, ts, bm=path, method=method, dt=(start - end) / steps, **options)[-1]
    out = out.reshape(x.shape)
    return sde.denoised(out, end) if denoise else out
