"""Steps against diffusers' schedulers: whole runs in float32 on the scheduler's own grid, with its own noise."""

from __future__ import annotations

import pytest
import torch

from sdeblend import (
    Ancestral,
    BackwardSDE,
    ExponentialMultistep,
    Heun,
    RectifiedFlow,
    ReplayNoise,
    TrainedTable,
    convert,
    solve,
)
from tests.support.core import relative, seeded
from toy.mixtures.mixture import GaussianMixture
from toy.scores.stack import mixture_score

diffusers = pytest.importorskip("diffusers")

TOLERANCE = 1e-5
TABLE_OPTIONS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
MIXTURE = GaussianMixture([0.3, 0.7], [[-1.0, 0.5], [1.0, 0.0]], [0.2, 0.6])
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
SHAPE = (64, 2)


def scheduler_and_table(kind, steps, **options):
    scheduler = getattr(diffusers, kind)(**TABLE_OPTIONS, **options)
    scheduler.set_timesteps(steps)
    return scheduler, TrainedTable(scheduler.alphas_cumprod)


def start():
    return torch.randn(SHAPE, generator=seeded(1))


def draws(steps):
    generator = seeded(2)
    return [torch.randn(SHAPE, generator=generator) for _ in range(steps)]


def network(table, prediction):
    """Return what a trained network is: (x, timestep) -> prediction, here of the mixture's exact score."""
    score = mixture_score(MIXTURE, table)

    def call(x, timestep):
        t = table.time_of_timestep(timestep)
        return convert(score(x, t), x, t, table, source="score", target=PREDICTIONS[prediction])

    return call


def ours(table, grid, step, noise=(), prediction="epsilon"):
    predict = network(table, prediction)

    def score(x, t):
        out = predict(x, table.timestep(t))
        return convert(out, x, t, table, source=PREDICTIONS[prediction], target="score")

    return solve(BackwardSDE(table, score), start(), grid, noise=ReplayNoise(noise), step=step).samples


def grid_of(table, timesteps, last):
    """Return the times of the scheduler's timesteps, and the time at which its last step ends."""
    return torch.cat([table.time_of_timestep(timesteps), torch.tensor([last], dtype=torch.float64)])


@pytest.mark.parametrize(
    ("prediction", "eta", "spacing", "steps"),
    [(prediction, eta, "leading", 50) for prediction in PREDICTIONS for eta in (0.0, 1.0)]
    + [("epsilon", 0.5, "leading", 30), ("epsilon", 0.5, "trailing", 40)],
)
def test_ddim(prediction, eta, spacing, steps):
    scheduler, table = scheduler_and_table(
        "DDIMScheduler",
        steps,
        prediction_type=prediction,
        timestep_spacing=spacing,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=int(spacing == "leading"),
    )
    predict, noise, x = network(table, prediction), draws(steps), start()
    for n, timestep in enumerate(scheduler.timesteps):
        out = predict(x, timestep)
        x = scheduler.step(out, timestep, x, eta=eta, variance_noise=noise[n] if eta else None).prev_sample
    grid = grid_of(table, scheduler.timesteps, 1 / 1000)  # alphas_cumprod[0] stands for the end
    if float(grid[-2]) == 1 / 1000:
        grid = grid[:-1]
    got = ours(table, grid, Ancestral(eta), noise, prediction)
    assert relative(got, x) < TOLERANCE
    assert relative(ours(table, grid, Ancestral(abs(eta - 0.05)), noise, prediction), x) > 20 * TOLERANCE


def test_ddim_to_zero():
    scheduler, table = scheduler_and_table("DDIMScheduler", 50, clip_sample=False, set_alpha_to_one=True)
    predict, noise, x = network(table, "epsilon"), draws(50), start()
    for n, timestep in enumerate(scheduler.timesteps):
        x = scheduler.step(predict(x, timestep), timestep, x, eta=1.0, variance_noise=noise[n]).prev_sample
    assert relative(ours(table, grid_of(table, scheduler.timesteps, 0.0), Ancestral(), noise), x) < TOLERANCE


def test_ddpm_posterior():
    scheduler, table = scheduler_and_table("DDPMScheduler", 50, clip_sample=False, steps_offset=1)
    predict, generator, x = network(table, "epsilon"), seeded(2), start()
    for timestep in scheduler.timesteps:
        x = scheduler.step(predict(x, timestep), timestep, x, generator=generator).prev_sample
    assert relative(ours(table, grid_of(table, scheduler.timesteps, 0.0), Ancestral(), draws(50)), x) < TOLERANCE


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("spacing", ["leading", "linspace"])
@pytest.mark.parametrize("steps", [12, 25])
def test_dpm_solver_multistep(stochastic, spacing, steps):
    scheduler, table = scheduler_and_table(
        "DPMSolverMultistepScheduler",
        steps,
        algorithm_type="sde-dpmsolver++" if stochastic else "dpmsolver++",
        solver_order=2,
        timestep_spacing=spacing,
        steps_offset=int(spacing == "leading"),
    )
    predict, noise, x = network(table, "epsilon"), draws(steps), start()
    for n, timestep in enumerate(scheduler.timesteps):
        z = noise[n] if stochastic else None
        x = scheduler.step(predict(x, timestep), timestep, x, variance_noise=z).prev_sample
    grid = grid_of(table, scheduler.timesteps, 0.0)
    assert relative(ours(table, grid, ExponentialMultistep(stochastic), noise), x) < TOLERANCE
    other = Ancestral(float(stochastic))  # the same, but of first order
    assert relative(ours(table, grid, other, noise), x) > 20 * TOLERANCE


def run_in_sigma(scheduler, table, **options):
    """Run a scheduler whose state is x / alpha; return x / alpha at the end, which is the sample."""
    predict = network(table, "epsilon")
    y = start() / float(table.alpha(table.time_of_timestep(scheduler.timesteps[0].double())))
    for timestep in scheduler.timesteps:
        x = scheduler.scale_model_input(y, timestep)
        y = scheduler.step(predict(x, timestep.double()), timestep, y, **options).prev_sample
    return y


@pytest.mark.parametrize(
    ("kind", "step"),
    [
        ("HeunDiscreteScheduler", Heun()),
        ("EulerDiscreteScheduler", Ancestral(0.0)),
        ("EulerAncestralDiscreteScheduler", Ancestral()),
    ],
)
def test_schedulers_in_sigma(kind, step):
    scheduler, table = scheduler_and_table(kind, 25, timestep_spacing="leading", steps_offset=1)
    options = {"generator": seeded(2)} if step.stochastic else {}
    y = run_in_sigma(scheduler, table, **options)
    grid = grid_of(table, scheduler.timesteps.double().unique().flip(0), 0.0)
    assert len(grid) == 26
    assert relative(ours(table, grid, step, draws(25)), y) < TOLERANCE


def test_flow_matching():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    sigmas = torch.linspace(0.98, 0.02, 25)
    scheduler.set_timesteps(sigmas=sigmas.tolist())
    schedule = RectifiedFlow()
    score, x = mixture_score(MIXTURE, schedule), start()
    for timestep in scheduler.timesteps:
        t = timestep.double() / 1000
        out = convert(score(x, t), x, t, schedule, source="score", target="flow")
        x = scheduler.step(out, timestep, x).prev_sample
    grid = torch.cat([scheduler.timesteps.double() / 1000, torch.zeros(1)])
    got = solve(BackwardSDE(schedule, score), start(), grid, noise=seeded(), step=Ancestral(0.0)).samples
    assert relative(got, x) < TOLERANCE
