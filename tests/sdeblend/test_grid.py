"""Time grids: ends, spacings, what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from sdeblend import SCHEDULES, VPLinear, time_grid
from sdeblend.grid import check_grid

NAMES = list(SCHEDULES)
SPACINGS = ["uniform", "log-snr", "karras"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [2, 3, 57])
def test_grids_run_from_noise_to_data(name, spacing, steps):
    schedule = SCHEDULES[name]()
    grid = time_grid(schedule, steps, spacing)
    assert grid.dtype == torch.float64 and grid.shape == (steps + 1,)
    assert float(grid[0]) == schedule.t_max and float(grid[-2]) == schedule.t_min and float(grid[-1]) == 0
    assert bool((grid.diff() < 0).all())
    assert torch.equal(check_grid(grid, schedule), grid)
    open_end = time_grid(schedule, steps, spacing, to_zero=False)
    assert open_end.shape == (steps + 1,) and float(open_end[-1]) == schedule.t_min


@pytest.mark.parametrize("name", NAMES)
def test_spacings_are_even_in_their_own_clock(name):
    schedule = SCHEDULES[name]()

    def spread(values: torch.Tensor) -> float:
        return float((values.diff() / values.diff().mean() - 1).abs().max())

    uniform, log_snr, karras = (time_grid(schedule, 30, spacing, to_zero=False) for spacing in SPACINGS)
    assert spread(uniform) < 1e-10
    assert spread(schedule.log_snr(log_snr)) < 1e-6
    assert spread((schedule.sigma(karras) / schedule.alpha(karras)) ** (1 / 7)) < 1e-6
    # each clock sees that the other grids are not its own
    assert spread(schedule.log_snr(uniform)) > 0.1 and spread(schedule.log_snr(karras)) > 0.1


def test_karras_grid_has_the_published_formula():
    schedule = SCHEDULES["karras"]()
    i = torch.arange(18, dtype=torch.float64)
    expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(time_grid(schedule, 18, "karras")[:-1], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("steps", [1, 0, -3, 2.0, True, "50"])
def test_steps_must_be_a_whole_number(steps):
    with pytest.raises(ValueError, match="at least 2 steps"):
        time_grid(VPLinear(), steps)


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ([0.1, 0.5, 1.0], "must decrease.*0.1 then 0.5"),
        ([1.0, 0.5, 0.5, 0.1], "0.5 then 0.5 at position 1"),
        ([1.0], "at least 2 times"),
        ([[1.0, 0.5]], "one-dimensional"),
        ([1.0, math.nan, 0.1], "finite"),
        ([math.inf, 0.5], "finite"),
        ([1.2, 0.5], "got 1.2"),
        ([1.0, 0.5, -0.1], "got -0.1"),
        ([1.0, 0.5, 1e-5], "got 1e-05"),
    ],
)
def test_bad_grids_are_named(grid, words):
    with pytest.raises(ValueError, match=words) as info:
        check_grid(torch.tensor(grid), VPLinear())
    assert "\n" not in str(info.value)


def test_unknown_spacing():
    with pytest.raises(ValueError, match="uniform, log-snr, karras, got 'cosine'"):
        time_grid(VPLinear(), 10, "cosine")
