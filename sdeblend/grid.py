"""Time grids: the decreasing sequence of times t_0 > t_1 > ... > t_n that a solver steps through.

* uniform: equal steps in t.
* log-snr: equal steps in l(t) = 2 log(alpha/sigma), the clock of exponential integrators.
* karras: equal steps in (sigma/alpha)^(1/rho), rho = 7, which spends more steps at low noise.

A grid that ends at 0 takes its last step from t_min to the data: the posterior mean, with no noise.

Source: Lu et al. 2206.00927 (log-SNR); Karras et al. 2206.00364, equation 5.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from sdeblend.schedule import NoiseSchedule

Spacing = Literal["uniform", "log-snr", "karras"]
RHO = 7.0


def time_grid(
    schedule: NoiseSchedule,
    steps: int,
    spacing: Spacing = "uniform",
    *,
    to_zero: bool = True,
) -> Tensor:
    """Return a decreasing grid of ``steps`` steps from t_max.

    Args:
        schedule: gives t_max, t_min and the log signal-to-noise ratio.
        steps: number of steps n >= 2 (the last one to 0 included).
        spacing: "uniform" in t, "log-snr", or "karras".
        to_zero: end at 0, the point before being t_min; otherwise end at t_min.

    Returns:
        float64 (n + 1,), first t_max.

    Raises:
        ValueError: for fewer than 2 steps or an unknown spacing.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2:
        raise ValueError(f"a grid needs a whole number of at least 2 steps, got {steps!r}; 50 to 200 are usual")
    if spacing not in get_args(Spacing):
        raise ValueError(f"spacing must be one of {', '.join(get_args(Spacing))}, got {spacing!r}")
    n = steps if to_zero else steps + 1
    start, end = schedule.t_max, schedule.t_min
    if spacing == "uniform":
        grid = torch.linspace(start, end, n, dtype=torch.float64)
    elif spacing == "log-snr":
        ends = schedule.log_snr(torch.tensor([start, end], dtype=torch.float64))
        grid = schedule.time_of_log_snr(torch.linspace(float(ends[0]), float(ends[1]), n, dtype=torch.float64))
    else:
        ends = (-schedule.log_snr(torch.tensor([start, end], dtype=torch.float64)) / 2).exp() ** (1 / RHO)
        noise_to_signal = torch.linspace(float(ends[0]), float(ends[1]), n, dtype=torch.float64) ** RHO
        grid = schedule.time_of_log_snr(-2 * noise_to_signal.log())
    grid[0], grid[-1] = start, end  # the inverse of log_snr is exact to rounding only
    return torch.cat([grid, grid.new_zeros(1)]) if to_zero else grid


def check_grid(grid: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Return ``grid`` as float64 on the CPU, or raise if it does not decrease within the schedule.

    Raises:
        ValueError: fewer than two times, not finite, not strictly decreasing, or outside the schedule.
    """
    grid = torch.as_tensor(grid, dtype=torch.float64).detach().cpu()
    if grid.ndim != 1 or len(grid) < 2:
        raise ValueError(f"a grid must be one-dimensional with at least 2 times, got shape {tuple(grid.shape)}")
    if not bool(grid.isfinite().all()):
        raise ValueError(f"a grid must be finite, got {float(grid[~grid.isfinite()][0])}; use sdeblend.time_grid")
    rising = (grid.diff() >= 0).nonzero()
    if len(rising):
        i = int(rising[0])
        raise ValueError(
            f"a grid must decrease from noise to data, got {float(grid[i]):g} then {float(grid[i + 1]):g} "
            f"at position {i}; reverse it or remove the repeated time"
        )
    return schedule.check_time(grid)
