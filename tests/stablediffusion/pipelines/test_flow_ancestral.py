"""``FlowAncestral``: its parent without noise, the core's step with it, the process's marginals, its certificate."""

from __future__ import annotations

import copy
import math

import diffusers
import numpy as np
import pytest
import torch

from sdeblend import BackwardSDE, Blend, Correction, Preference, solve
from sdeblend.correct import Weights
from sdeblend.parametrisation import convert
from sdeblend.schedule import RectifiedFlow
from sdeblend.steps import Ancestral
from stablediffusion import FlowAncestral, blend, load_members
from stablediffusion.pipelines.schedulers import noisy_move
from stablediffusion.testing import tiny_call, tiny_lora, tiny_pipeline
from tests.support.core import Z, seeded
from toy.problems import conflict_line, line2

FLOW = RectifiedFlow()
DYNAMIC = {"use_dynamic_shifting": True, "shift": 3.0}


def grid_of(count, low=0.004, high=0.998):
    """Return noise levels that are even in log-SNR, as numpy; a scheduler appends 0."""
    return 1 / (1 + np.exp(-np.linspace(math.log(high / (1 - high)), math.log(low / (1 - low)), count)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("settings", "times"),
    [
        ({}, {"num_inference_steps": 5}),
        ({"shift": 3.0}, {"sigmas": np.linspace(1.0, 0.2, 5)}),
        (DYNAMIC, {"sigmas": np.linspace(1.0, 0.2, 5), "mu": 1.1}),
        (DYNAMIC | {"time_shift_type": "linear", "shift_terminal": 0.1}, {"num_inference_steps": 5, "mu": 1.1}),
        ({"use_karras_sigmas": True}, {"num_inference_steps": 5}),
    ],
)
def test_without_noise_it_is_its_parent_to_the_bit(settings, times, dtype):
    parent = diffusers.FlowMatchEulerDiscreteScheduler(**settings)
    ends = {}
    for scheduler in (parent, *(FlowAncestral.from_config(parent.config, eta=eta) for eta in (0.0, 1.0))):
        scheduler.set_timesteps(**times)
        x = torch.randn(2, 3, 4, 4, generator=seeded(), dtype=dtype)
        for t in scheduler.timesteps:
            x = scheduler.step(torch.tanh(2 * x), t, x, return_dict=False)[0]
        assert x.dtype == dtype
        ends[scheduler.config.get("eta")] = x
        assert torch.equal(scheduler.sigmas, parent.sigmas) and torch.equal(scheduler.timesteps, parent.timesteps)
    assert torch.equal(ends[0.0], ends[None])
    assert not torch.equal(ends[1.0], ends[None])


@pytest.mark.parametrize("eta", [1.0, 0.4])
def test_it_is_the_cores_ancestral_step(eta):
    scheduler = FlowAncestral(eta=eta)
    scheduler.set_timesteps(sigmas=grid_of(7))
    grid = scheduler.sigmas.double()
    want = Ancestral(eta).plan(FLOW, grid)
    for n, move in enumerate(want):
        a, b, g = scheduler.coefficients(n)
        # the score is -eps/s with eps = x + (1 - s) v
        p, q = -1 / float(move.t), -(1 - float(move.t)) / float(move.t)
        assert (a, b, g) == pytest.approx((move.a + move.b * p, move.b * q, move.g), rel=1e-9, abs=1e-9)
    scheduler.set_timesteps(4)  # from pure noise, where the core cannot start: all noise is new at eta = 1
    a, b, g = scheduler.coefficients(0)
    end = float(scheduler.sigmas[1])
    assert g == eta * end and a == pytest.approx(1 - end + math.sqrt(1 - eta**2) * end) and b == pytest.approx(end - 1)


def gaussian_variance(moves, levels, variance, wrong=1.0):
    """Return the variance at the end of a run on N(0, variance) with its exact velocity: the law stays Gaussian."""
    s = levels[0]
    law = (1 - s) ** 2 * variance + s**2
    for (a, b, g), s in zip(moves, levels[:-1], strict=True):
        marginal = (1 - s) ** 2 * variance + s**2
        velocity = (s - (1 - s) * variance) / marginal  # E[eps - x0 | x] = velocity x
        law = (a + b * velocity) ** 2 * law + (wrong * g) ** 2
    return law


@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_marginals_of_a_gaussian_are_kept_to_first_order(eta):
    """Against the closed form (1 - s)^2 variance + s^2 at the end, without sampling; a wrong G converges elsewhere."""
    counts, end = (200, 400, 800), (1 - 0.2) ** 2 * 0.3 + 0.2**2
    errors, controls = [], []
    for steps in counts:
        scheduler = FlowAncestral(eta=eta)
        levels = grid_of(steps + 1, low=0.2)
        scheduler.set_timesteps(sigmas=levels)
        moves = [scheduler.coefficients(n) for n in range(steps)]
        errors.append(gaussian_variance(moves, levels, 0.3) / end - 1)
        controls.append(gaussian_variance(moves, levels, 0.3, wrong=1.01) / end - 1)
    assert np.polyfit(np.log(counts), np.log(np.abs(errors)), 1)[0] == pytest.approx(-1, abs=0.15)
    # extrapolated to no step size
    assert abs(2 * errors[2] - errors[1]) < 2e-4 < 20 * 2e-4 < abs(2 * controls[2] - controls[1])


def loop(scheduler, score, x, noise, weights=None):
    """Return the end of a pipeline-shaped run: velocities to ``scheduler.step``, weights from ``noisy_move``."""
    for t in scheduler.timesteps:
        s = torch.tensor(float(t) / scheduler.config.num_train_timesteps, dtype=torch.float64)
        evaluation = score.evaluate(x, s)
        members = convert(evaluation.members, x, s, schedule=FLOW, source="score", target="flow")
        output = torch.tensordot(evaluation.coefficients.to(x), members, 1)
        if weights is not None:
            move = noisy_move(scheduler, float(t))
            if move.noise:
                spread = torch.tensordot(evaluation.coefficients.to(x), (members - output).square().sum(2), 1)
                weights.add(spread * (move.slope / move.noise) ** 2, 1.0, move.time)
        x = scheduler.step(output, t, x, generator=noise).prev_sample
    return x


def ready(steps, kind=FlowAncestral, **settings):
    scheduler = kind(**settings)
    scheduler.set_timesteps(sigmas=grid_of(steps))
    return scheduler


def test_marginals_of_a_mixture_are_kept():
    """From the exact law at the first level to that of the last but one, on the mixture's exact velocity."""
    problem, count = line2(), 4000
    base, stack = problem.base, problem.stack(FLOW)
    scheduler = ready(200)
    plain = scheduler.coefficients
    start = base.noised(FLOW, float(scheduler.sigmas[0])).sample(count, generator=seeded(1))
    z = {}
    for name, scale in (("right", 1.0), ("wrong", 0.8)):
        run = copy.copy(scheduler)
        run.coefficients = lambda n, scale=scale: (*plain(n)[:2], plain(n)[2] * scale)
        run.sigmas, run.timesteps = run.sigmas[:-1], run.timesteps[:-1]
        end = loop(run, Blend(stack, [1.0, *[0.0] * len(problem.names)]), start, seeded(2))
        law = base.noised(FLOW, float(scheduler.sigmas[-2]))
        squares = (end - law.mean).square().sum(1)
        z[name] = float((squares.mean() - law.covariance.trace()) / squares.std() * count**0.5)
    assert abs(z["right"]) < Z < abs(z["wrong"])


def test_a_blend_is_the_cores_and_so_are_its_weights():
    problem = line2()
    score = Blend(problem.stack(FLOW), [0.2, 0.5, 0.3])
    scheduler = ready(40)
    x = FLOW.prior((50, problem.base.dim), generator=seeded(1), dtype=torch.float64)
    sde, grid = BackwardSDE(FLOW, score), scheduler.sigmas.double()
    want = solve(sde, x, grid, noise=seeded(2), step=Ancestral(), correct="certify")
    weights = Weights(Correction("certify"), 50, x.device, True)
    got = loop(scheduler, score, x, seeded(2), weights)
    torch.testing.assert_close(got, want.samples, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(weights.path, want.log_weights, rtol=1e-6, atol=1e-7)
    assert float(want.log_weights.std()) > 0.1


def run_of(problem, weights, kind, steps, count=400):
    """Return a certified pipeline-shaped run: the weights, and KL(mode weights of the blend, of the target)."""
    score, target = Blend(problem.stack(FLOW), Preference(weights)), problem.target(weights)
    x = FLOW.prior((count, problem.base.dim), generator=seeded(1), dtype=torch.float64)
    run = Weights(Correction("certify"), count, x.device, True)
    end = loop(ready(steps, kind), score, x, seeded(2), run)
    nearest = (end[:, None] - target.means).square().sum(2).argmin(1)
    modes = torch.bincount(nearest, minlength=target.components).double() / count
    return run, float(torch.xlogy(modes, modes / target.weights).sum())


@pytest.mark.parametrize("make", [line2, conflict_line])
@pytest.mark.parametrize("right", [0.5, 0.3])
def test_the_certificate_of_flow_members_is_never_violated(make, right):
    """KL of the laws is at least that of their mode weights."""
    run, found = run_of(make(), {"right": right, "left": 1 - right}, FlowAncestral, 40)
    (certificate,) = run.certificates()
    assert certificate.reliable and 0.02 < found < certificate.value < 3


def test_weights_converge_with_steps_unless_each_step_renoises_in_full():
    nats = {
        (kind, steps): -float(run_of(line2(), {"right": 0.5, "left": 0.5}, kind, steps)[0].path.mean())
        for kind in (FlowAncestral, diffusers.FlowMatchLCMScheduler)
        for steps in (50, 150)
    }
    assert nats[FlowAncestral, 150] < nats[FlowAncestral, 50] < 6
    lcm = diffusers.FlowMatchLCMScheduler
    assert nats[lcm, 150] > 1.5 * nats[lcm, 50] > 15


def steps_of(scheduler, x, generator=None, output=0.0):
    for t in scheduler.timesteps:
        x = scheduler.step(torch.full_like(x, output), t, x, generator=generator).prev_sample
    return x


def test_where_the_noise_comes_from():
    scheduler = FlowAncestral()
    scheduler.set_timesteps(4)
    x, untouched = torch.randn(3, 2, 4, generator=seeded()), torch.get_rng_state()

    def again(x, **options):
        scheduler.set_timesteps(4)
        return steps_of(scheduler, x, **options)

    # streams of its own: a run repeats, an image keeps its noise in another batch, equal starts differ
    own = again(x)
    assert torch.equal(again(x), own) and torch.equal(again(x[1:]), own[1:])
    twins = again(x[:1].repeat(2, 1, 1))
    assert torch.equal(twins[0], own[0]) and not torch.equal(twins[1], own[0])
    assert not torch.equal(again(x + 1e-6), own)
    # what the caller sets, and what the pipeline gives, which comes first
    scheduler.generator = [seeded(i) for i in range(3)]
    mine = again(x)
    scheduler.generator = seeded(9)
    assert torch.equal(again(x, generator=[seeded(i) for i in range(3)]), mine)
    assert torch.equal(again(x, generator=seeded(5)), again(x, generator=seeded(5)))
    scheduler.generator = [seeded(0)] * 2
    with pytest.raises(ValueError, match="3 images need one generator or as many, got 2"):
        again(x)
    assert torch.equal(torch.get_rng_state(), untouched)


def test_the_streams_are_of_unit_variance_and_independent():
    scheduler = FlowAncestral()
    scheduler.set_timesteps(sigmas=[1.0, 0.5])
    x = torch.randn(1000, 16, generator=seeded(), dtype=torch.float64)
    a, _, g = scheduler.coefficients(0)
    z = (scheduler.step(torch.zeros_like(x), scheduler.timesteps[0], x).prev_sample - a * x) / g
    for moment in (z.mean(), z.square().mean() - 1, (z * x).mean(), (z[:-1] * z[1:]).mean()):
        assert abs(float(moment)) < Z * 2**0.5 / 16000**0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eta": 1.5}, "eta must lie within"),
        ({"stochastic_sampling": True}, "needs stochastic_sampling=False"),
        ({"invert_sigmas": True}, "needs invert_sigmas=False"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        FlowAncestral.from_config(diffusers.FlowMatchEulerDiscreteScheduler().config, **settings)


def test_a_time_for_each_token_needs_eta_0():
    scheduler = FlowAncestral()
    scheduler.set_timesteps(2)
    x = torch.zeros(1, 2, 4)
    with pytest.raises(ValueError, match="one time an image"):
        scheduler.step(x, scheduler.timesteps[0], x, per_token_timesteps=torch.ones(1, 2))


def images(pipe, count, steps=4):
    settings = tiny_call(pipe, steps) | {"output_type": "latent", "generator": [seeded(i) for i in range(count)]}
    return pipe("a red circle", num_images_per_prompt=count, **settings).images


def test_a_flow_pipeline_is_certified_resampled_saved_and_loaded(tmp_path):
    pipe = tiny_pipeline("flux")
    pipe.scheduler = FlowAncestral.from_config(pipe.scheduler.config, **DYNAMIC, eta=0.8)
    first = images(pipe, 2)
    assert torch.equal(images(pipe, 2), first)
    torch.testing.assert_close(images(pipe, 1), first[:1], rtol=1e-4, atol=1e-4)
    pipe.save_pretrained(tmp_path / "pipe")
    loaded = type(pipe).from_pretrained(tmp_path / "pipe")
    assert type(loaded.scheduler) is FlowAncestral and loaded.scheduler.config.eta == 0.8
    assert torch.equal(images(loaded, 2), first)
    back = diffusers.FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    assert back.config.shift == 3.0 and back.config.use_dynamic_shifting
    paths = {n: tiny_lora(pipe, tmp_path / f"{n}.safetensors", seed=i + 1, scale=3.0) for i, n in enumerate("ab")}
    members = load_members(pipe, paths)
    with blend(pipe, members, {"a": 0.5, "b": 0.3}) as knobs:
        plain = images(pipe, 4)
        assert knobs.reason is None and knobs.nats.min() > 0 and knobs.certificate.profile[-1] == 0
    correction = Correction("resample", threshold=0.999, generator=seeded(3))
    with blend(pipe, members, {"a": 0.5, "b": 0.3}, correct=correction) as knobs:
        assert not torch.equal(images(pipe, 4), plain)
        assert knobs.resampled
    pipe.scheduler = FlowAncestral.from_config(pipe.scheduler.config, eta=0.0)
    with pytest.raises(ValueError, match="set eta=1"), blend(pipe, members, {"a": 0.5}, correct="resample"):
        images(pipe, 2)
