"""Diffusers schedulers in the core's terms: schedule, parametrisation, times, and the noise of a step.

* A scheduler with ``alphas_cumprod`` is a ``TrainedTable``: index i of N is t = (i + 1)/N, between indices the
  log signal-to-noise ratio is linear. Its networks predict eps, v or x0.
* A flow-matching scheduler, and any other with flow sigmas, is ``RectifiedFlow``: alpha = 1 - t, sigma = t, timestep
  N t; networks predict the velocity.

The weights of a run (``sdeblend.correct``) need the slope and the noise of its steps alone (``transitions``).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from sdeblend.parametrisation import Parametrisation
from sdeblend.schedule import NoiseSchedule, RectifiedFlow, TrainedTable
from stablediffusion.pipelines.transitions import RULES, setting

_PREDICTIONS: dict[str, Parametrisation] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
_FLOW_PREDICTIONS: dict[str, Parametrisation] = {"flow_prediction": "flow", "epsilon": "eps", "sample": "x0"}
SUPPORTED = tuple(RULES)


def schedule_of(pipe: Any) -> tuple[NoiseSchedule, Parametrisation]:
    """Return the schedule a pipeline's network was trained on, and what the network predicts.

    Args:
        pipe: a diffusers pipeline; its scheduler's configuration is read.

    Returns:
        ``TrainedTable`` with "eps", "v" or "x0", or ``RectifiedFlow`` with "flow" (or "eps", "x0" where a multistep
        scheduler with flow sigmas says so).

    Raises:
        ValueError: a scheduler of neither kind, or a prediction that it cannot turn into clean data.
    """
    scheduler = pipe.scheduler
    flow = is_flow(scheduler)
    table = None if flow else getattr(scheduler, "alphas_cumprod", None)
    if flow or table is not None:
        known = _FLOW_PREDICTIONS if flow else _PREDICTIONS
        prediction = setting(scheduler, "prediction_type") or ("flow_prediction" if flow else "epsilon")
        if prediction not in known:
            raise ValueError(
                f"a network must predict one of {', '.join(known)} with {type(scheduler).__name__} as it is set, got "
                f"{prediction!r}; set its prediction_type, or use_flow_sigmas for a flow model"
            )
        return RectifiedFlow() if table is None else TrainedTable(table), known[prediction]
    raise ValueError(
        f"the scheduler must have alphas_cumprod or be a FlowMatch one, got {type(scheduler).__name__}; "
        "set pipe.scheduler to the one the model was trained with"
    )


def is_flow(scheduler: Any) -> bool:
    """Return whether a scheduler's sigmas are those of a flow: a FlowMatch one, or one with ``use_flow_sigmas``."""
    names = {kind.__name__ for kind in type(scheduler).__mro__}
    return any(n.startswith(("FlowMatch", "LTXEulerAncestralRF")) for n in names) or bool(
        setting(scheduler, "use_flow_sigmas")
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


class NoisyStep(NamedTuple):
    """A scheduler's next step x' = A x + slope output + noise z, in its own coordinates.

    Attributes:
        time: t of the schedule where it starts.
        slope: of x' on what the pipeline hands to ``scheduler.step``.
        noise: standard deviation; 0 for the step that ends where no noise is left.
    """

    time: float
    slope: float
    noise: float


def noisy_move(scheduler: Any, timestep: float, eta: float | None = None) -> NoisyStep | str:
    """Return the slope and the noise of a scheduler's next step, or why it has no weights.

    Args:
        scheduler: before its ``step``.
        timestep: the scheduler's.
        eta: what the pipeline passes to ``step``; None if nothing.

    Returns:
        the step, or one clause that says why weights do not exist; never an exception.
    """
    why = _refusal(scheduler)
    if why is not None:
        return why
    name = class_of_step(scheduler)
    time, slope, noise, ends = RULES[name].step(scheduler, float(timestep), eta)
    if not (math.isfinite(slope) and math.isfinite(noise)):
        return f"{name}'s step is not finite at t = {time:g}, where no signal is left"
    if noise == 0 and slope != 0 and not ends:
        return f"{name} takes no noise at t = {time:g}; pass eta=1 to the pipeline if it has eta"
    return NoisyStep(time, slope, noise)


def class_of_step(scheduler: Any) -> str:
    """Return the name of the class whose ``step`` a scheduler takes: a subclass may leave it as it is."""
    return next((c.__name__ for c in type(scheduler).__mro__ if "step" in vars(c)), type(scheduler).__name__)


def _refusal(scheduler: Any) -> str | None:
    """Return one clause if no step of a scheduler, as it is set, is affine with noise and without memory."""
    name = class_of_step(scheduler)
    rule = RULES.get(name)
    if rule is None:
        return (
            f"{name} takes no noise, or not in steps that are affine in one output; use DDIMScheduler with eta=1, "
            "EulerAncestralDiscreteScheduler, or FlowAncestral for a flow model"
        )
    if rule.clips and (setting(scheduler, "clip_sample") or setting(scheduler, "thresholding")):
        return f"{name} clips its predictions, so its means are not affine in them; set clip_sample=False"
    why = rule.why_not(scheduler)
    return None if why is None else f"{name} has no weights: {why}"


def check_resampling(scheduler: Any) -> None:
    """Raise unless images may be redrawn between a scheduler's steps.

    Raises:
        ValueError: a scheduler without noise, or with memory.
    """
    why = _refusal(scheduler)
    if why is not None:
        raise ValueError(f"resampling needs a scheduler with noise and without memory: {why}; or pass correct=None")
