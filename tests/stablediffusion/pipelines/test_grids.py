"""``scheduler_grid`` against what a pipeline's scheduler holds after a run; ``schedule_of`` on all kinds of them."""

from __future__ import annotations

import diffusers as d
import pytest
import torch

from sdeblend.schedule import RectifiedFlow, TrainedTable
from stablediffusion import FlowAncestral, schedule_of, scheduler_grid
from stablediffusion.pipelines.families import family_of
from stablediffusion.testing import FAMILIES, tiny_call, tiny_pipeline

STEPS = 4
DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.4, "max_shift": 1.3, "base_image_seq_len": 8}
DYNAMIC |= {"max_image_seq_len": 100}
FLOW_SIGMAS = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def has_a_row(name):
    pipe = tiny_pipeline(name)
    try:
        family_of(pipe)
    except ValueError:
        return False
    return True


KNOWN = [name for name in FAMILIES if has_a_row(name)]
FLOWS = [name for name in KNOWN if type(tiny_pipeline(name).scheduler).__name__.startswith("FlowMatch")]


def visited(pipe, **size):
    """Return the noise levels of a run of the pipeline, as times of the core."""
    settings = tiny_call(pipe, STEPS) | {"output_type": "latent", "generator": torch.Generator().manual_seed(0)} | size
    pipe(prompt="a red circle", **settings)
    return pipe.scheduler.sigmas.double().clamp(max=RectifiedFlow().t_max)


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        (family, kind)
        for family in FLOWS
        for kind in ("own", "shift", "dynamic", "ancestral", "unipc")
        if (family, kind) != ("z-image", "unipc")  # the pipeline gives its scheduler a list, which UniPC does not take
    ],
)
def test_the_grid_of_a_flow_pipeline_is_what_it_visits(family, kind):
    pipe = tiny_pipeline(family)
    config, flow = pipe.scheduler.config, d.FlowMatchEulerDiscreteScheduler
    pipe.scheduler = {
        "own": lambda: pipe.scheduler,
        "shift": lambda: flow.from_config(config, shift=3.0, use_dynamic_shifting=False),
        "dynamic": lambda: flow.from_config(config, **DYNAMIC),
        "ancestral": lambda: FlowAncestral.from_config(config, **DYNAMIC),
        "unipc": lambda: d.UniPCMultistepScheduler(**FLOW_SIGMAS, flow_shift=2.0),
    }[kind]()
    before = pipe.scheduler.timesteps.clone()
    given = tiny_call(pipe, STEPS)
    sizes = [{name: given[name] for name in ("height", "width") if name in given}]
    if kind == "dynamic":
        sizes.append({"height": 32, "width": 16})
    grids = [scheduler_grid(pipe, STEPS, **size) for size in sizes]
    assert torch.equal(pipe.scheduler.timesteps, before)
    for grid, size in zip(grids, sizes, strict=True):
        torch.testing.assert_close(grid, visited(pipe, **size), rtol=1e-6, atol=1e-6)
    if kind == "dynamic":
        assert float((grids[0] - grids[1]).abs().max()) > 1e-4  # the size counts


@pytest.mark.parametrize(
    ("scheduler", "settings", "end"),
    [
        (d.EulerAncestralDiscreteScheduler, {}, 0.0),
        (d.EulerDiscreteScheduler, {"use_karras_sigmas": True}, 0.0),
        (d.HeunDiscreteScheduler, {}, 0.0),
        (d.DPMSolverMultistepScheduler, {"use_karras_sigmas": True}, 0.0),
        (d.DPMSolverMultistepScheduler, {"final_sigmas_type": "sigma_min"}, 1e-3),
        (d.UniPCMultistepScheduler, {"final_sigmas_type": "sigma_min"}, 1e-3),
        (d.TCDScheduler, {}, 1e-3),
        (d.LCMScheduler, {"set_alpha_to_one": True}, 0.0),
        (d.DDIMScheduler, {"set_alpha_to_one": True}, 0.0),
        (d.DDIMScheduler, {"set_alpha_to_one": False}, 1e-3),
    ],
)
def test_the_grid_of_a_table_is_what_it_visits(scheduler, settings, end):
    pipe = tiny_pipeline("sd15")
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **settings)
    grid = scheduler_grid(pipe, STEPS)
    pipe("a", **tiny_call(pipe, STEPS) | {"output_type": "latent"})
    times = (pipe.scheduler.timesteps.double().unique().flip(0) + 1) / 1000
    torch.testing.assert_close(grid[: len(times)], times)
    assert float(grid[-1]) == pytest.approx(end, abs=1e-6) and len(grid) == STEPS + 1


def test_a_grid_that_is_not_known_is_refused():
    pipe = tiny_pipeline("sana")
    with pytest.raises(ValueError, match="SanaPipeline"):
        scheduler_grid(pipe, STEPS)
    pipe = tiny_pipeline("sd3")
    pipe.scheduler = d.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    with pytest.raises(ValueError, match="must go down in time"):
        scheduler_grid(pipe, 10)


@pytest.mark.parametrize(
    ("scheduler", "settings", "schedule", "prediction"),
    [
        (d.UniPCMultistepScheduler, FLOW_SIGMAS, RectifiedFlow, "flow"),
        (d.DPMSolverMultistepScheduler, FLOW_SIGMAS, RectifiedFlow, "flow"),
        (d.DEISMultistepScheduler, FLOW_SIGMAS, RectifiedFlow, "flow"),
        (d.DPMSolverMultistepScheduler, FLOW_SIGMAS | {"prediction_type": "sample"}, RectifiedFlow, "x0"),
        (d.FlowMatchLCMScheduler, {}, RectifiedFlow, "flow"),
        (d.LTXEulerAncestralRFScheduler, {}, RectifiedFlow, "flow"),
        (FlowAncestral, {}, RectifiedFlow, "flow"),
        (d.DPMSolverMultistepScheduler, {"prediction_type": "v_prediction"}, TrainedTable, "v"),
        (d.DPMSolverMultistepScheduler, {"prediction_type": "flow_prediction"}, None, "use_flow_sigmas"),
        (d.UniPCMultistepScheduler, {"use_flow_sigmas": True, "prediction_type": "v_prediction"}, None, "v_prediction"),
        (d.EDMEulerScheduler, {}, None, "alphas_cumprod"),
        (d.EDMDPMSolverMultistepScheduler, {}, None, "alphas_cumprod"),
        (d.SCMScheduler, {}, None, "alphas_cumprod"),
    ],
)
def test_the_schedule_is_told_by_sigmas_and_prediction(scheduler, settings, schedule, prediction):
    class Pipe:
        pass

    pipe = Pipe()
    pipe.scheduler = scheduler(**settings)
    if schedule is None:
        with pytest.raises(ValueError, match=prediction):
            schedule_of(pipe)
    else:
        found = schedule_of(pipe)
        assert type(found[0]) is schedule and found[1] == prediction


def test_flow_sigmas_of_another_class_that_stay_in_the_configuration_do_not_count():
    pipe = tiny_pipeline("sd15")
    flow = d.DPMSolverMultistepScheduler(use_flow_sigmas=True)
    pipe.scheduler = d.EulerAncestralDiscreteScheduler.from_config(flow.config)
    assert pipe.scheduler.config.get("use_flow_sigmas")  # the control: it is there to be read
    assert isinstance(schedule_of(pipe)[0], TrainedTable)
