"""``noisy_move`` against each scheduler's own ``step``: slope from two outputs, noise from two draws, in float64."""

from __future__ import annotations

import copy
import sys

import diffusers as d
import pytest
import torch

from stablediffusion import FlowAncestral
from stablediffusion.pipelines.schedulers import SUPPORTED, NoisyStep, check_resampling, noisy_move

ZERO = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
PLAIN = {"clip_sample": False}
EPS, V, X0, FLOW = ({"prediction_type": p} for p in ("epsilon", "v_prediction", "sample", "flow_prediction"))
SDE = {"algorithm_type": "sde-dpmsolver++", "solver_order": 1}
SHIFTED = {"use_dynamic_shifting": True}
# scheduler, settings, eta, what set_timesteps takes
CASES = [
    *((d.DDIMScheduler, PLAIN | kind, eta, {}) for kind in (EPS, V, X0) for eta in (1.0, 0.3)),
    (d.DDIMScheduler, PLAIN | EPS | {"set_alpha_to_one": False, "steps_offset": 1}, 1.0, {}),
    (d.DDIMScheduler, PLAIN | V | ZERO, 0.9, {}),
    (d.DDIMParallelScheduler, PLAIN | V, 1.0, {}),
    *((d.DDPMScheduler, PLAIN | kind, None, {}) for kind in (EPS, V, X0)),
    (d.DDPMScheduler, PLAIN | {"variance_type": "fixed_large", "steps_offset": 1}, None, {}),
    (d.DDPMScheduler, PLAIN | {"variance_type": "fixed_small_log", "steps_offset": 1}, None, {}),
    (d.DDPMScheduler, PLAIN | V | ZERO, None, {}),
    (d.DDPMParallelScheduler, PLAIN, None, {}),
    *((d.EulerAncestralDiscreteScheduler, kind, None, {}) for kind in (EPS, V, V | ZERO, EPS | ZERO)),
    (d.FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": True, "shift": 3.0}, None, {}),
    (d.FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": True} | SHIFTED, None, {"mu": 0.8}),
    *(
        (d.FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": True, f"use_{kind}_sigmas": True}, None, {})
        for kind in ("karras", "exponential", "beta")
    ),
    (d.FlowMatchLCMScheduler, {"shift": 3.0}, None, {}),
    *((FlowAncestral, {"eta": eta, "shift": 3.0}, None, {}) for eta in (1.0, 0.5)),
    (FlowAncestral, SHIFTED, None, {"mu": 0.8}),
    (d.LTXEulerAncestralRFScheduler, {"eta": 0.7, "s_noise": 0.9}, None, {}),
    *((d.LCMScheduler, kind, None, {}) for kind in (EPS, V, X0, V | {"rescale_betas_zero_snr": True})),
    *((d.TCDScheduler, kind, eta, {}) for kind in (EPS, V, X0) for eta in (None, 0.6, 1.0)),
    (d.SCMScheduler, {}, None, {"intermediate_timesteps": None}),
    (d.CMStochasticIterativeScheduler, {"clip_denoised": False}, None, {}),
    *((d.DPMSolverMultistepScheduler, SDE | kind, None, {}) for kind in (EPS, V, X0, EPS | ZERO, V | ZERO)),
    (d.DPMSolverMultistepScheduler, SDE | {"use_karras_sigmas": True}, None, {}),
    (d.DPMSolverMultistepScheduler, SDE | {"use_exponential_sigmas": True}, None, {}),
    (d.DPMSolverMultistepScheduler, SDE | {"use_beta_sigmas": True}, None, {}),
    *((d.DPMSolverMultistepScheduler, SDE | kind | {"use_flow_sigmas": True}, None, {}) for kind in (FLOW, X0)),
    *(
        (
            d.DPMSolverMultistepScheduler,
            SDE | kind | {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"},
            None,
            {},
        )
        for kind in (EPS, V, X0)
    ),
    *((d.DPMSolverSinglestepScheduler, SDE | kind, None, {}) for kind in (EPS, V, X0)),
    (d.DPMSolverSinglestepScheduler, SDE | FLOW | {"use_flow_sigmas": True}, None, {}),
    *((d.EDMDPMSolverMultistepScheduler, SDE | kind, None, {}) for kind in (EPS, V)),
    (d.CosineDPMSolverMultistepScheduler, {"solver_order": 1}, None, {}),
]


def ready(kind, settings, grid, steps=5):
    """Return a scheduler set to its times with its tables in float64, so that its own step is exact to 1e-8."""
    scheduler = kind(**settings)
    scheduler.set_timesteps(steps, **grid)
    for name, value in list(vars(scheduler).items()):
        if isinstance(value, torch.Tensor) and value.dtype == torch.float32 and name != "timesteps":
            setattr(scheduler, name, value.double())
    return scheduler


def after(scheduler, t, output, noise, eta):
    """Return the next state of x = 0 with this output and draw, 0-dim; the scheduler goes on if the draw is None."""
    extra = {} if eta is None else {"eta": eta}
    x = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    module = sys.modules[type(scheduler).__module__]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "randn_tensor", lambda shape, **kwargs: torch.full_like(x, noise), raising=False)
        if isinstance(scheduler, d.CosineDPMSolverMultistepScheduler):
            scheduler.noise_sampler = lambda start, end: torch.full_like(x, noise)
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        moved = scheduler.step(torch.full_like(x, output), t, x, **extra).prev_sample
    assert moved.dtype == torch.float64
    return float(moved.mean())


def measured(scheduler, t, eta):
    """Return slope and noise of one step, from copies of the scheduler: a second output, and a second draw."""
    plain, output, noise = (after(copy.deepcopy(scheduler), t, *a, eta) for a in ((0, 0), (1, 0), (0, 1)))
    return output - plain, noise - plain


def name_of(case):
    return f"{case[0].__name__}-{'-'.join(f'{k}={v}' for k, v in case[1].items())}-{case[2]}"


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_slope_and_noise_are_those_of_the_schedulers_step(case):
    kind, settings, eta, grid = case
    scheduler = ready(kind, settings, grid)
    check_resampling(scheduler)
    noises, times = [], []
    for t in scheduler.timesteps[: scheduler.num_inference_steps]:
        got = noisy_move(scheduler, float(t), eta)
        assert isinstance(got, NoisyStep), got
        assert (got.slope, got.noise) == pytest.approx(measured(scheduler, t, eta), rel=1e-8, abs=1e-8)
        noises.append(got.noise)
        times.append(got.time)
        after(scheduler, t, 0, 0, eta)
    assert all(noises[:-1]) and times == sorted(times, reverse=True) and times[0] > times[-1] > 0


def test_every_supported_scheduler_is_tried():
    assert {case[0].__name__ for case in CASES} == set(SUPPORTED)


REFUSED = [
    (d.DDIMScheduler, PLAIN, 0.0, "eta=1"),
    (d.DDIMScheduler, PLAIN | EPS | ZERO, 1.0, "no signal is left"),
    (d.DDIMScheduler, {"clip_sample": True}, 1.0, "clips"),
    (d.DDIMScheduler, {"clip_sample": False, "thresholding": True}, 1.0, "clips"),
    (d.DDPMScheduler, PLAIN | {"variance_type": "learned_range"}, None, "fixed_small"),
    (d.DDPMScheduler, PLAIN | {"variance_type": "fixed_large_log"}, None, "fixed_small"),
    (d.LCMScheduler, {"rescale_betas_zero_snr": True}, None, "no signal is left"),
    (d.TCDScheduler, {}, 0.0, "eta=1"),
    (d.FlowMatchEulerDiscreteScheduler, {}, None, "FlowAncestral"),
    (FlowAncestral, {"eta": 0.0}, None, "set eta=1"),
    (d.FlowMatchLCMScheduler, {"scale_factors": [0.5] * 4, "upscale_mode": "nearest"}, None, "scales"),
    (d.LTXEulerAncestralRFScheduler, {"eta": 0.0}, None, "takes no noise"),
    (d.CMStochasticIterativeScheduler, {}, None, "clips"),
    (d.DPMSolverMultistepScheduler, {}, None, "takes no noise"),
    (d.DPMSolverMultistepScheduler, FLOW | {"use_flow_sigmas": True}, None, "takes no noise"),
    (d.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, None, "solver_order=1"),
    (d.UniPCMultistepScheduler, FLOW | {"use_flow_sigmas": True}, None, "takes no noise"),
    *(
        (getattr(d, name), {}, None, "takes no noise")
        for name in (
            "EDMEulerScheduler",
            "EDMDPMSolverMultistepScheduler",
            "EulerDiscreteScheduler",
            "HeunDiscreteScheduler",
            "FlowMatchHeunDiscreteScheduler",
            "KDPM2AncestralDiscreteScheduler",
            "DEISMultistepScheduler",
            "PNDMScheduler",
            "LMSDiscreteScheduler",
            "SASolverScheduler",
            "CogVideoXDDIMScheduler",
            "CogVideoXDPMScheduler",
        )
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=name_of)
def test_a_step_without_weights_gives_a_clause_and_no_error(case):
    kind, settings, eta, message = case
    scheduler = kind(**settings)
    scheduler.set_timesteps(5)
    why = noisy_move(scheduler, float(scheduler.timesteps[0]), eta)
    assert isinstance(why, str) and message in why and not why.endswith(".")


def test_settings_of_another_class_that_stay_in_the_configuration_do_not_count():
    """``from_config`` keeps what it does not know: a clipping that Euler-ancestral never does, flow sigmas."""
    clipping = d.DDIMScheduler(clip_sample=True, thresholding=True)
    euler = d.EulerAncestralDiscreteScheduler.from_config(clipping.config)
    assert euler.config.get("clip_sample") is True  # the control: it is there to be read
    euler.set_timesteps(5)
    assert isinstance(noisy_move(euler, float(euler.timesteps[0])), NoisyStep)


def test_a_subclass_counts_by_the_class_of_its_step():
    class Same(d.EulerAncestralDiscreteScheduler):
        pass

    class Own(d.EulerAncestralDiscreteScheduler):
        def step(self, *args, **kwargs):
            return super().step(*args, **kwargs)

    for kind, ok in ((Same, True), (Own, False)):
        scheduler = kind()
        scheduler.set_timesteps(5)
        assert isinstance(noisy_move(scheduler, float(scheduler.timesteps[0])), NoisyStep) is ok
        if not ok:
            with pytest.raises(ValueError, match="resampling needs"):
                check_resampling(scheduler)
