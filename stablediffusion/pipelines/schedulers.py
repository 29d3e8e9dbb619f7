"""Diffusers schedulers in the core's terms: schedule, parametrisation, times, and the noise of a step.

* A scheduler with ``alphas_cumprod`` is a ``TrainedTable``: index i of N is t = (i + 1)/N, between indices the
  log signal-to-noise ratio is linear. Its networks predict eps, v or x0.
* A flow-matching scheduler is ``RectifiedFlow``: alpha = 1 - t, sigma = t, timestep N t; networks predict the velocity.

DDIM with eta, DDPM and Euler-ancestral all take the core's ``Ancestral`` step, each in coordinates of its own, and
B^2 / G^2 (score slope over noise) does not depend on the coordinates. So the weights of a run (``sdeblend.correct``)
need only the two times of a step and eta.

DDIM steps to ``t - N // n`` whatever the next grid time is: the parity grid is the scheduler's own.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from sdeblend.parametrisation import Parametrisation
from sdeblend.schedule import NoiseSchedule, RectifiedFlow, TrainedTable
from sdeblend.steps import Ancestral, Move

_PREDICTIONS: dict[str, Parametrisation] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
SUPPORTED = ("DDIMScheduler", "DDPMScheduler", "EulerAncestralDiscreteScheduler")


def schedule_of(pipe: Any) -> tuple[NoiseSchedule, Parametrisation]:
    """Return the schedule a pipeline's network was trained on, and what the network predicts.

    Args:
        pipe: a diffusers pipeline; its scheduler's configuration is read.

    Returns:
        ``TrainedTable`` with "eps", "v" or "x0", or ``RectifiedFlow`` with "flow".

    Raises:
        ValueError: a scheduler of neither kind.
    """
    scheduler = pipe.scheduler
    flow = scheduler.config.get("use_flow_sigmas") or type(scheduler).__name__.startswith("FlowMatch")
    table = None if flow else getattr(scheduler, "alphas_cumprod", None)
    if table is not None:
        prediction = scheduler.config.get("prediction_type", "epsilon")
        if prediction not in _PREDICTIONS:
            raise ValueError(f"a network must predict one of {', '.join(_PREDICTIONS)}, got {prediction!r}")
        return TrainedTable(table), _PREDICTIONS[prediction]
    if flow:
        return RectifiedFlow(), "flow"
    raise ValueError(
        f"the scheduler must have alphas_cumprod or be a FlowMatch one, got {type(scheduler).__name__}; "
        "set pipe.scheduler to the one the model was trained with"
    )


def timestep_of(schedule: NoiseSchedule, t: Tensor, scheduler: Any) -> Tensor:
    """Return the real number the network is called with at time t, float64."""
    if isinstance(schedule, TrainedTable):
        return schedule.timestep(t)
    return t * scheduler.config.num_train_timesteps


def time_of(schedule: NoiseSchedule, timestep: float, scheduler: Any) -> float:
    """Return the time t of a scheduler's timestep, the inverse of ``timestep_of``."""
    if isinstance(schedule, TrainedTable):
        return float(schedule.time_of_timestep(timestep))
    return timestep / float(scheduler.config.num_train_timesteps)


def scheduler_grid(pipe: Any, steps: int) -> Tensor:
    """Return the times a pipeline's own scheduler visits, for the core's solver.

    Args:
        pipe: its scheduler is copied, not changed.
        steps: number of inference steps.

    Returns:
        decreasing float64 grid; the last time is where the scheduler's last step ends (0, or 1/N for DDIM with
        ``set_alpha_to_one=False``).
    """
    schedule, _ = schedule_of(pipe)
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(steps)
    if isinstance(schedule, RectifiedFlow):
        times = [min(float(s), schedule.t_max) for s in scheduler.sigmas]
    else:
        times = [time_of(schedule, float(t), scheduler) for t in scheduler.timesteps]
        times.append(_end(schedule, scheduler))
    grid = torch.tensor(times, dtype=torch.float64)
    # a last trained index of 0 steps to itself: no step
    return grid[torch.cat([torch.ones(1, dtype=torch.bool), grid.diff() < 0])]


def _end(schedule: NoiseSchedule, scheduler: Any) -> float:
    final = getattr(scheduler, "final_alpha_cumprod", None)
    return 0.0 if final is None or float(final) == 1 else schedule.t_min


def noisy_move(scheduler: Any, schedule: NoiseSchedule, timestep: float, eta: float) -> Move | str:
    """Return the core's step equal to the scheduler's next one, or why there is none.

    Args:
        scheduler: before its ``step``.
        schedule: of the network.
        timestep: the scheduler's.
        eta: what the pipeline passes to DDIM.

    Returns:
        the step (``g`` = 0 if this one takes no noise), or one clause that says why weights do not exist.
    """
    name = type(scheduler).__name__
    if name not in SUPPORTED:
        return f"{name} takes no noise, or not in ancestral steps; use one of {', '.join(SUPPORTED)}"
    if scheduler.config.get("clip_sample") or scheduler.config.get("thresholding"):
        return f"{name} clips its predictions, so its means are not affine in them; set clip_sample=False"
    if name == "EulerAncestralDiscreteScheduler":
        index = scheduler.step_index
        sigmas = [float(s) for s in scheduler.sigmas[index : index + 2]]
        t, s = (float(schedule.time_of_log_snr(-2 * math.log(v))) if v > 0 else 0.0 for v in sigmas)
        return Ancestral().plan(schedule, torch.tensor([t, s], dtype=torch.float64))[0]
    t = time_of(schedule, timestep, scheduler)
    if name == "DDPMScheduler":
        if not scheduler.config.variance_type.startswith("fixed_small"):
            return f"DDPM's variance must be the posterior's, got {scheduler.config.variance_type}; use 'fixed_small'"
        previous, eta = float(scheduler.previous_timestep(int(timestep))), 1.0
    else:
        if eta == 0:
            return "DDIM with eta = 0 takes no noise; pass eta=1 to the pipeline"
        previous = timestep - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    s = time_of(schedule, previous, scheduler) if previous >= 0 else _end(schedule, scheduler)
    if s >= t:
        return Move(torch.tensor(t), torch.tensor(s), 1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    return Ancestral(eta).plan(schedule, torch.tensor([t, s], dtype=torch.float64))[0]


def check_resampling(scheduler: Any) -> None:
    """Raise unless images may be redrawn between a scheduler's steps.

    Raises:
        ValueError: a scheduler without noise, or with memory.
    """
    name = type(scheduler).__name__
    if name not in SUPPORTED:
        raise ValueError(
            f"resampling needs a scheduler with noise and without memory, {', '.join(SUPPORTED)}, got {name}; "
            "set pipe.scheduler, or pass correct=None"
        )
