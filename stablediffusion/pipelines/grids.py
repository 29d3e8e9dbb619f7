"""The times that a pipeline visits: what its family gives ``set_timesteps``, and what its scheduler makes of that.

Flow models shift their noise levels, by a number of the scheduler's or by one that a pipeline computes from the image's
size (mu), and most of them hand their scheduler levels of their own. diffusers' own functions compute both here.

DDIM steps to ``t - N // n`` whatever the next grid time is: the parity grid is the scheduler's own.
"""

from __future__ import annotations

import copy
import math
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sdeblend.schedule import NoiseSchedule, RectifiedFlow
from stablediffusion.pipelines.components import denoiser_of
from stablediffusion.pipelines.families import family_of, own_sigmas
from stablediffusion.pipelines.inputs import image_size
from stablediffusion.pipelines.schedulers import class_of_step, is_flow, schedule_of, time_of
from stablediffusion.pipelines.transitions import setting


def scheduler_grid(pipe: Any, steps: int, *, height: int | None = None, width: int | None = None) -> Tensor:
    """Return the times a pipeline's own scheduler visits, for the core's solver.

    Args:
        pipe: its scheduler is copied, not changed.
        steps: number of inference steps.
        height, width: of the images in pixels, where they shift the times; the model's own by default.

    Returns:
        decreasing float64 grid; the last time is where the scheduler's last step ends (0, or 1/N for DDIM with
        ``set_alpha_to_one=False``).

    Raises:
        ValueError: a flow pipeline whose family has no row (what it gives its scheduler is not known), or a scheduler
            that does not go down in time.
    """
    schedule, _ = schedule_of(pipe)
    scheduler = copy.deepcopy(pipe.scheduler)
    _set_times(pipe, scheduler, steps, height, width)
    if isinstance(schedule, RectifiedFlow):
        times = [min(float(s), schedule.t_max) for s in scheduler.sigmas]
    else:
        times = [time_of(schedule, float(t), scheduler) for t in scheduler.timesteps]
        times.append(_end(schedule, scheduler))
    grid = torch.tensor(times, dtype=torch.float64)
    if bool((grid.diff() > 0).any()):
        raise ValueError(f"a grid must go down in time, got the times of {type(scheduler).__name__}; set another one")
    # a time of two evaluations stands twice, and a last trained index of 0 steps to itself: no step
    return grid[torch.cat([torch.ones(1, dtype=torch.bool), grid.diff() < 0])]


def _set_times(pipe: Any, scheduler: Any, steps: int, height: int | None, width: int | None) -> None:
    """Set a scheduler's times as the pipeline's call does."""
    if not is_flow(scheduler):
        scheduler.set_timesteps(steps)
        return
    sigmas, module = own_sigmas(pipe, steps), _module(pipe)
    given: dict[str, Any] = {} if sigmas is None else {"sigmas": sigmas}
    if given or setting(scheduler, "use_dynamic_shifting"):
        size = image_size(pipe, height, width)
        given["mu"] = _mu(module, scheduler, _tokens(pipe, size), steps, 1.16 if sigmas is None else 1.15)
    module.retrieve_timesteps(scheduler, steps, "cpu", **given)


def _module(pipe: Any) -> ModuleType:
    """Return the module that a pipeline's call is written in."""
    return sys.modules[next(kind.__module__ for kind in type(pipe).__mro__ if "__call__" in vars(kind))]


def _tokens(pipe: Any, size: tuple[int, int]) -> int:
    """Return how many tokens a denoiser makes of an image."""
    event = family_of(pipe).event(pipe, size)
    if len(event) == 2:
        return event[0]
    side = denoiser_of(pipe)[1].config.get("patch_size") or family_of(pipe).patch
    return (event[1] // side) * (event[2] // side)


def _mu(module: ModuleType, scheduler: Any, tokens: int, steps: int, most: float) -> float:
    if hasattr(module, "compute_empirical_mu"):
        return float(module.compute_empirical_mu(image_seq_len=tokens, num_steps=steps))
    config = scheduler.config
    lengths = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    return float(module.calculate_shift(tokens, *lengths, config.get("base_shift", 0.5), config.get("max_shift", most)))


def _end(schedule: NoiseSchedule, scheduler: Any) -> float:
    """Return where the last step of a scheduler with a table ends."""
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) == len(scheduler.timesteps) + 1:
        last = float(sigmas[-1])
        return float(schedule.time_of_log_snr(-2 * math.log(last))) if last > 0 else 0.0
    if class_of_step(scheduler) == "TCDScheduler":
        return schedule.t_min
    final = getattr(scheduler, "final_alpha_cumprod", None)
    return 0.0 if final is None or float(final) == 1 else schedule.t_min
