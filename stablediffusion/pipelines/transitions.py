"""The step of each diffusers scheduler that is affine in the network's output and Gaussian.

    x' = A x + slope output + noise z,     z ~ N(0, I),

in the scheduler's own coordinates, with ``output`` what the pipeline hands to ``scheduler.step``. A run's weights need
slope and noise alone: with members' outputs o_i, log W += -slope^2 spread(o) / (2 noise^2), whatever an output means.

A scheduler predicts clean data x0 and noise eps, both affine in x and the output; from d x0 / d output the other is
d eps / d output = -(alpha / sigma) d x0 / d output, as x = alpha x0 + sigma eps. Each rule below is its scheduler's
own arithmetic, in the dtype of the scheduler's tables up to where it meets the state's.

Source: diffusers 0.42, the ``step`` of each class; Song et al. 2010.02502 (DDIM), Luo et al. 2310.04378 (LCM),
Zheng et al. 2402.19159 (TCD), Lu et al. 2211.01095 (SDE-DPM-Solver++), Chen et al. 2503.09641 (SCM).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch


class Transition(NamedTuple):
    """One step: its time, slope on the output and noise, and whether it ends where no noise is left."""

    time: float
    slope: float
    noise: float
    ends: bool


@dataclass(frozen=True)
class Rule:
    """How one class of schedulers steps.

    Attributes:
        step: (scheduler, timestep, eta) -> the transition.
        why_not: (scheduler) -> one clause if none of its steps qualifies as it is set.
        clips: whether it clips its predictions where its configuration says so.
    """

    step: Callable[[Any, float, float | None], Transition]
    why_not: Callable[[Any], str | None] = lambda scheduler: None
    clips: bool = True


def setting(scheduler: Any, name: str) -> Any:
    """Return a setting of a scheduler, None if neither its class nor one above takes one of this name.

    ``from_config`` keeps what another class's configuration held, and it means nothing in this one.
    """
    kinds: tuple[Any, ...] = type(scheduler).__mro__
    known = any(name in inspect.signature(kind.__init__).parameters for kind in kinds)
    return scheduler.config.get(name) if known else None


def position(scheduler: Any, timestep: float) -> int:
    """Return which of its steps a scheduler takes next, before or after its first ``step``."""
    if scheduler.step_index is not None:
        return int(scheduler.step_index)
    if scheduler.begin_index is not None:
        return int(scheduler.begin_index)
    return int(scheduler.index_for_timestep(timestep))


def clean_slope(prediction: str, alpha: float, sigma: float) -> float:
    """Return d x0 / d output, infinite where the output is noise and no signal is left."""
    if prediction == "epsilon":
        return -sigma / alpha if alpha else -torch.inf
    return 1.0 if prediction == "sample" else -sigma


def _table_time(scheduler: Any, timestep: float) -> float:
    return (timestep + 1) / float(scheduler.config.num_train_timesteps)


def _ddim(scheduler: Any, timestep: float, eta: float | None) -> Transition:
    index = int(timestep)
    previous = index - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    a = scheduler.alphas_cumprod[index]
    b = scheduler.alphas_cumprod[previous] if previous >= 0 else scheduler.final_alpha_cumprod
    deviation = (eta or 0.0) * scheduler._get_variance(index, previous) ** 0.5
    alpha, sigma = float(a**0.5), float((1 - a) ** 0.5)
    clean = clean_slope(scheduler.config.prediction_type, alpha, sigma)
    noise = 1.0 if scheduler.config.prediction_type == "epsilon" else -alpha / sigma * clean
    slope = float(b**0.5) * clean + float((1 - b - deviation**2) ** 0.5) * noise
    return Transition(_table_time(scheduler, timestep), slope, float(deviation), previous < 0)


def _ddpm(scheduler: Any, timestep: float, eta: float | None) -> Transition:
    index = int(timestep)
    previous = int(scheduler.previous_timestep(index))
    a = scheduler.alphas_cumprod[index]
    b = scheduler.alphas_cumprod[previous] if previous >= 0 else scheduler.one
    clean = clean_slope(scheduler.config.prediction_type, float(a**0.5), float((1 - a) ** 0.5))
    slope = float(b**0.5 * (1 - a / b) / (1 - a)) * clean
    kind, noise = scheduler.config.variance_type, 0.0
    # of the posterior's variance at its end, zero, a floor of 1e-20 is left, which no path feels
    if index > 0 and (previous >= 0 or kind == "fixed_large"):
        variance = scheduler._get_variance(index)
        noise = float(variance if kind == "fixed_small_log" else variance**0.5)
    return Transition(_table_time(scheduler, timestep), slope, noise, previous < 0)


def _ddpm_refusal(scheduler: Any) -> str | None:
    kind = scheduler.config.variance_type
    if kind in ("fixed_small", "fixed_small_log", "fixed_large"):
        return None
    return f"its variance is {kind!r}, not a fixed number; set variance_type='fixed_small'"


def _euler_ancestral(scheduler: Any, timestep: float, eta: float | None) -> Transition:
    index = position(scheduler, timestep)
    start, end = scheduler.sigmas[index], scheduler.sigmas[index + 1]
    up = (end**2 * (start**2 - end**2) / start**2) ** 0.5
    down = (end**2 - up**2) ** 0.5
    velocity = scheduler.config.prediction_type == "v_prediction"
    clean = float(-start / (start**2 + 1) ** 0.5) if velocity else -float(start)
    slope = -clean / float(start) * float(down - start)
    return Transition(_table_time(scheduler, timestep), slope, float(up), float(end) == 0)


def _flow_renoising(scheduler: Any, timestep: float, eta: float | None) -> Transition:
    index = position(scheduler, timestep)
    start, end = scheduler.sigmas[index], scheduler.sigmas[index + 1]
    return Transition(float(start), -float(1 - end) * float(start), float(end), float(end) == 0)


def _flow_refusal(scheduler: Any) -> str | None:
    if setting(scheduler, "stochastic_sampling"):
        return None
    return "it takes no noise; set FlowAncestral.from_config(pipe.scheduler.config), or stochastic_sampling=True"


def _flow_ancestral(scheduler: Any, timestep: float, eta: float | None) -> Transition:
    index = position(scheduler, timestep)
    start, end = scheduler.sigmas[index], scheduler.sigmas[index + 1]
    _, slope, noise = scheduler.coefficients(index)
    return Transition(float(start), slope, noise, float(end) == 0)


def _flow_ancestral_refusal(scheduler: Any) -> str | None:
    return None if scheduler.config.eta > 0 else "it takes no noise with eta = 0; set eta=1"


def _flow_lcm_refusal(scheduler: Any) -> str | None:
    return "it scales its prediction up between steps" if scheduler._scale_factors else None


def _lcm(scheduler: Any, timestep: float, eta: float | None) -> Transition:
    index, here = position(scheduler, timestep), int(timestep)
    last = index == scheduler.num_inference_steps - 1
    a = scheduler.alphas_cumprod[here]
    clean = clean_slope(scheduler.config.prediction_type, float(a.sqrt()), float((1 - a).sqrt()))
    slope = float(scheduler.get_scalings_for_boundary_condition_discrete(torch.tensor(here))[1]) * clean
    time = _table_time(scheduler, timestep)
    if last:
        return Transition(time, slope, 0.0, True)
    following = int(scheduler.timesteps[index + 1]) if index + 1 < len(scheduler.timesteps) else here
    b = scheduler.alphas_cumprod[following]
    return Transition(time, float(b.sqrt()) * slope, float((1 - b).sqrt()), False)


def _tcd(scheduler: Any, timestep: float, eta: float | None) -> Transition:
    eta = 0.3 if eta is None else eta
    index, here = position(scheduler, timestep), int(timestep)
    table = scheduler.alphas_cumprod
    following = int(scheduler.timesteps[index + 1]) if index + 1 < len(scheduler.timesteps) else 0
    between = int((1 - eta) * scheduler.timesteps.new_tensor(following))
    a, b, c = table[here], table[following], table[between]
    alpha, sigma = float(a.sqrt()), float((1 - a).sqrt())
    clean = clean_slope(scheduler.config.prediction_type, alpha, sigma)
    noise = 1.0 if scheduler.config.prediction_type == "epsilon" else -alpha / sigma * clean
    slope = float(c.sqrt()) * clean + float((1 - c).sqrt()) * noise
    time = _table_time(scheduler, timestep)
    if index == scheduler.num_inference_steps - 1:
        return Transition(time, slope, 0.0, True)
    if eta == 0:
        return Transition(time, slope, 0.0, False)
    return Transition(time, float((b / c).sqrt()) * slope, float((1 - b / c).sqrt()), False)


def _dpm(scheduler: Any, timestep: float, eta: float | None) -> Transition:
    index = position(scheduler, timestep)
    start, end = scheduler.sigmas[index], scheduler.sigmas[index + 1]
    (alpha_s, sigma_s), (alpha_t, sigma_t) = (scheduler._sigma_to_alpha_sigma_t(s) for s in (start, end))
    h = (alpha_t.log() - sigma_t.log()) - (alpha_s.log() - sigma_s.log())
    flow = bool(setting(scheduler, "use_flow_sigmas"))
    if hasattr(scheduler, "precondition_outputs"):  # EDM: affine in the output with factors of its own
        clean = float(scheduler.precondition_outputs(torch.zeros(()), torch.ones(()).to(start), start))
        time = float(start)
    else:
        kind = scheduler.config.prediction_type
        clean = clean_slope(kind, float(alpha_s), float(start if kind == "flow_prediction" else sigma_s))
        time = float(start) if flow else _table_time(scheduler, timestep)
    if setting(scheduler, "algorithm_type") == "sde-dpmsolver":
        noise = -float(alpha_s) / float(sigma_s) * clean if scheduler.config.prediction_type != "epsilon" else 1.0
        slope = float(-2.0 * (sigma_t * (torch.exp(h) - 1.0))) * noise
        return Transition(time, slope, float(sigma_t * torch.sqrt(torch.exp(2 * h) - 1.0)), float(end) == 0)
    slope = float(alpha_t * (1 - torch.exp(-2.0 * h))) * clean
    return Transition(time, slope, float(sigma_t * torch.sqrt(1.0 - torch.exp(-2 * h))), float(end) == 0)


def _dpm_refusal(scheduler: Any) -> str | None:
    algorithm = setting(scheduler, "algorithm_type")
    if algorithm is not None and not algorithm.startswith("sde-"):
        return "it takes no noise; set algorithm_type='sde-dpmsolver++' and solver_order=1"
    if scheduler.config.solver_order != 1:
        return "it remembers the outputs of earlier steps; set solver_order=1"
    if setting(scheduler, "variance_type") in ("learned", "learned_range"):
        return "its network predicts a variance too"
    return None


def _ltx_ancestral(scheduler: Any, timestep: float, eta: float | None) -> Transition:
    index = position(scheduler, timestep)
    start, end = scheduler.sigmas[index], scheduler.sigmas[index + 1]
    if abs(float(end)) < 1e-8:
        return Transition(float(start), -float(start), 0.0, True)
    down = end * (1.0 + (end / start - 1.0) * float(scheduler.config.eta))
    slope = float(1.0 - down / start) * -float(start)
    scale = float(scheduler.config.s_noise)
    if not (scheduler.config.eta > 0 and scale > 0):
        return Transition(float(start), slope, 0.0, False)
    above, below = 1.0 - end, 1.0 - down
    renoise = (end**2 - down**2 * above**2 / (below**2 + 1e-12)).clamp(min=0.0).sqrt()
    return Transition(float(start), float(above / (below + 1e-12)) * slope, float(renoise) * scale, False)


def _scm(scheduler: Any, timestep: float, eta: float | None) -> Transition:
    index = position(scheduler, timestep)
    start, end = scheduler.timesteps[index], scheduler.timesteps[index + 1]
    cos, sin = float(start.cos()), float(start.sin())
    noise = float(end.sin()) * float(scheduler.config.sigma_data)
    # an angle's signal-to-noise ratio is that of this flow time
    return Transition(sin / (sin + cos), -float(end.cos()) * sin, noise, float(end) == 0)


def _consistency(scheduler: Any, timestep: float, eta: float | None) -> Transition:
    index, low = position(scheduler, timestep), scheduler.config.sigma_min
    inside = index + 1 < scheduler.config.num_train_timesteps
    start, end = scheduler.sigmas[index], scheduler.sigmas[index + 1 if inside else -1]
    slope = float(scheduler.get_scalings_for_boundary_condition(start)[1])
    noise = 0.0
    if len(scheduler.timesteps) > 1:
        noise = float((end.clamp(min=low, max=scheduler.config.sigma_max) ** 2 - low**2) ** 0.5)
    noise *= scheduler.config.s_noise
    return Transition(float(start), slope, noise, index == len(scheduler.timesteps) - 1)


def _consistency_refusal(scheduler: Any) -> str | None:
    return "it clips its predictions; set clip_denoised=False" if scheduler.config.clip_denoised else None


RULES: dict[str, Rule] = {
    "DDIMScheduler": Rule(_ddim),
    "DDIMParallelScheduler": Rule(_ddim),
    "DDPMScheduler": Rule(_ddpm, _ddpm_refusal),
    "DDPMParallelScheduler": Rule(_ddpm, _ddpm_refusal),
    "EulerAncestralDiscreteScheduler": Rule(_euler_ancestral, clips=False),
    "FlowMatchEulerDiscreteScheduler": Rule(_flow_renoising, _flow_refusal, clips=False),
    "FlowMatchLCMScheduler": Rule(_flow_renoising, _flow_lcm_refusal, clips=False),
    "FlowAncestral": Rule(_flow_ancestral, _flow_ancestral_refusal, clips=False),
    "LTXEulerAncestralRFScheduler": Rule(_ltx_ancestral, clips=False),
    "LCMScheduler": Rule(_lcm),
    "TCDScheduler": Rule(_tcd, clips=False),
    "SCMScheduler": Rule(_scm, clips=False),
    "CMStochasticIterativeScheduler": Rule(_consistency, _consistency_refusal, clips=False),
    "DPMSolverMultistepScheduler": Rule(_dpm, _dpm_refusal),
    "DPMSolverSinglestepScheduler": Rule(_dpm, _dpm_refusal),
    "EDMDPMSolverMultistepScheduler": Rule(_dpm, _dpm_refusal),
    "CosineDPMSolverMultistepScheduler": Rule(_dpm, _dpm_refusal),
}
