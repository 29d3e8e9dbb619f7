"""Scores on latents: the core's solver samples a pipeline, and both backends run the same core code."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import sdeblend
import sdeblend.blend
from sdeblend import Ancestral, BackwardSDE, Blend, OneMemberPerStep, Preference, solve, time_grid
from sdeblend.parametrisation import conversion
from stablediffusion import blend, load_lora, load_members, pipeline_score, schedule_of, scheduler_grid
from stablediffusion.pipelines.components import denoiser_of, text_encoders_of
from stablediffusion.pipelines.families import FAMILIES as ROWS
from stablediffusion.pipelines.families import family_of
from stablediffusion.pipelines.inputs import guidance_names
from stablediffusion.testing import FAMILIES, tiny_call, tiny_lora, tiny_pipeline

SCORED = [name for name in FAMILIES if FAMILIES[name].stem in ROWS]
WEIGHTS = Preference({"a": 0.5, "b": 0.7}, strength=1.1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def with_members(folder, family="sd15", **options):
    pipe = tiny_pipeline(family, seed=1, **options)
    paths = {n: tiny_lora(pipe, folder / f"{n}.safetensors", seed=i + 1, scale=0.3) for i, n in enumerate("ab")}
    return pipe, load_members(pipe, paths)


def sample(stack, preference=WEIGHTS, steps=6, start=None, noise=None, **options):
    sde = BackwardSDE(stack.schedule, Blend(stack, preference))
    start = stack.prior(seeded()) if start is None else start
    grid = options.pop("grid", None)
    grid = time_grid(stack.schedule, steps) if grid is None else grid
    return solve(sde, start, grid, noise=noise or seeded(1), step=Ancestral(), **options)


def test_a_preference_weighs_the_stack_by_name(tmp_path):
    """In any order, and with members left out; the same weights in the order of another preference are the control."""
    pipe, members = with_members(tmp_path, dtype=torch.float64)
    stack = pipeline_score(pipe, "a red circle", members=members, height=16, width=16, guidance_scale=1)
    x = torch.randn(stack.shape, generator=seeded(), dtype=torch.float64)
    t = torch.tensor(0.5, dtype=torch.float64)
    base, a, b = stack(x, t)
    got = Blend(stack, Preference({"b": 0.7, "a": 0.5}, strength=1.1))(x, t)
    torch.testing.assert_close(got, -0.32 * base + 0.55 * a + 0.77 * b)
    assert (got - Blend(stack, Preference({"a": 0.7, "b": 0.5}, strength=1.1))(x, t)).abs().max() > 1e-3
    torch.testing.assert_close(Blend(stack, Preference({"b": 1.0}))(x, t), b)
    one = OneMemberPerStep(stack, Preference({"b": 1.0}), t[None], 1, generator=seeded())
    torch.testing.assert_close(one(x, t), b)
    assert (a - b).abs().max() > 1e-3
    with pytest.raises(ValueError, match="can weigh only a, b"):
        Blend(stack, Preference({"c": 1.0}))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", [10, 50])
def test_ancestral_step_equals_ddim_over_a_whole_run(prediction, steps):
    """The core's step on the scheduler's own grid against ``DDIMScheduler.step``; the linspace grid is the control."""
    pipe = tiny_pipeline("sd15")
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, prediction_type=prediction)
    schedule, kind = schedule_of(pipe)
    g = seeded()
    mix = torch.randn(4, 4, generator=g, dtype=torch.float64) * 0.5

    def network(x, t):
        return torch.tanh(torch.einsum("ij,bjhw->bihw", mix, x)) * (1 + 0.001 * t)

    def score(x, t):
        p, q = conversion(schedule, t, kind, "score")
        return float(p) * x + float(q) * network(x, float(t) * 1000 - 1)

    start = torch.randn(2, 4, 8, 8, generator=g, dtype=torch.float64)
    x = start.clone()
    pipe.scheduler.set_timesteps(steps)
    noise = seeded(1)
    for t in pipe.scheduler.timesteps:
        x = pipe.scheduler.step(network(x, float(t)), t, x, eta=1.0, generator=noise).prev_sample
    sde = BackwardSDE(schedule, score)
    errors = []
    for grid in (scheduler_grid(pipe, steps), time_grid(schedule, steps, to_zero=False)):
        got = solve(sde, start, grid, noise=seeded(1), step=Ancestral()).samples
        errors.append(float((got - x).norm() / x.norm()))
    assert errors[0] < 1e-5
    assert errors[1] > 1e-3


@pytest.mark.parametrize(
    ("family", "negative"), [("sd15", None), ("sd21", "blue"), ("sdxl", "blue"), ("sdxl", ""), ("sdxl", None)]
)
def test_solver_equals_the_pipeline_on_its_own_grid(family, negative, tmp_path):
    pipe, members = with_members(tmp_path, family, dtype=torch.float64)
    start = torch.randn(2, 4, 8, 8, generator=seeded(), dtype=torch.float64)
    call = tiny_call(pipe, 6) | {
        "output_type": "latent",
        "eta": 1.0,
        "negative_prompt": negative,
        "guidance_scale": 4.0,
    }
    with blend(pipe, members, WEIGHTS) as knobs:
        expected = pipe("a red circle", generator=seeded(1), num_images_per_prompt=2, latents=start, **call).images
        nats = knobs.nats
    stack = pipeline_score(
        pipe,
        "a red circle",
        members=members,
        negative_prompt=negative,
        guidance_scale=4.0,
        images=2,
        height=16,
        width=16,
    )
    grid = scheduler_grid(pipe, 6)
    solution = sample(stack, start=start, grid=grid, correct="certify")
    torch.testing.assert_close(solution.samples, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(solution.certificate.per_sample, nats, rtol=1e-3, atol=0)
    other = sample(stack, Preference({"a": 0.5, "b": 0.4}), start=start, grid=grid)
    assert (other.samples - expected).abs().max() > 1e-3
    images = stack.decode(solution.samples, "np")
    decoded = pipe.vae.decode(expected / pipe.vae.config.scaling_factor).sample
    reference = pipe.image_processor.postprocess(decoded.detach(), output_type="np")
    assert abs(images - reference).max() < 1e-4


def own_run(pipe, prompts, start, negatives=None, scale=None, **more):
    """Return a pipeline's own state after its last step, and its images."""
    call = tiny_call(pipe, 4) | {"num_images_per_prompt": len(start) // len(prompts)} | more
    scale_name, flux2 = guidance_names(pipe)[0], type(pipe).__name__.startswith("Flux2")
    call |= {scale_name: family_of(pipe).unguided if negatives is None else scale} if scale_name else {}
    call["latents"] = start.transpose(1, 2).unflatten(2, (4, 4)) if flux2 else start
    if negatives is not None and flux2:  # takes them encoded
        length = call["max_sequence_length"]
        call["negative_prompt_embeds"] = pipe.encode_prompt(negatives, max_sequence_length=length)[0]
    elif negatives is not None:
        call["negative_prompt"] = negatives
    states = []
    images = pipe(prompt=prompts, callback_on_step_end=lambda *a: states.append(a[-1]["latents"]) or {}, **call).images
    return states[-1], images


def euler(stack, score, start):
    """Return the end of the ODE on the sigmas of the pipeline's last run, velocity by velocity out of scores."""
    x = start
    for now, then in pairwise(stack.pipe.scheduler.sigmas.double()):
        t = now.clamp(max=1 - 1e-9)
        p, q = conversion(stack.schedule, t, "score", "flow")
        x = x + (then - now) * (float(p) * x + float(q) * score(x, t))
    return x


FLOW = [name for name in FAMILIES if name in SCORED and not name.startswith(("sd1", "sd2", "sdxl"))]


# FLUX.2 itself has no guidance besides that of its network.
@pytest.mark.parametrize(
    ("family", "guided"), [(f, g) for f in FLOW for g in (False, True) if (f, g) != ("flux2", True)]
)
def test_flow_ode_equals_the_pipeline(family, guided, tmp_path, monkeypatch):
    """A member's own run, of its scores; the pipeline's Euler is of float32.

    One prompt and two images, or two prompts with an image each: Qwen-Image gives images the masks of other prompts
    where there are two of both.
    """
    pipe, members = with_members(tmp_path, family, dtype=torch.float64)
    prompts, negatives = (["a red circle", "blue"], ["a", "green ring"]) if guided else (["a red circle"], None)
    options: dict[str, Any] = (
        {"guidance_scale": 2.5, "negative_prompt": negatives}
        if guided
        else {"guidance_scale": family_of(pipe).unguided}
    )
    stack = pipeline_score(pipe, prompts, members=members, images=3 - len(prompts), height=16, width=16, **options)
    start = torch.randn(stack.shape, generator=seeded(), dtype=torch.float64)
    if family == "qwen-image":  # the norm that it gives to guided predictions: scores have none
        monkeypatch.setattr(torch, "norm", lambda x, *args, **options: x.new_ones(()))
    denoiser_of(pipe)[1].set_adapter("b")
    expected, _ = own_run(pipe, prompts, start, negatives, 2.5)
    score = Blend(stack, Preference({"b": 1.0}))
    torch.testing.assert_close(euler(stack, score, start), expected.double(), rtol=1e-5, atol=1e-5)
    other = Blend(stack, Preference({"a": 1.0}))(start, torch.tensor(0.5))
    assert (other - score(start, torch.tensor(0.5))).abs().max() > 1e-2


@pytest.mark.parametrize("scale", [None, 2.0])
def test_guidance_that_the_network_takes(scale):
    """By default the pipeline's own, 3.5; another one is the control."""
    pipe = tiny_pipeline("flux", seed=1, dtype=torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe.transformer = diffusers.FluxTransformer2DModel.from_config(
            {**pipe.transformer.config, "guidance_embeds": True}
        ).to(torch.float64)
    options = {"height": 16, "width": 16}
    stack = pipeline_score(pipe, "a ring", embedded_guidance=scale, **options)
    assert stack.branches == 1
    start = torch.randn(stack.shape, generator=seeded(), dtype=torch.float64)
    expected, _ = own_run(pipe, ["a ring"], start, **({} if scale is None else {"guidance_scale": scale}))
    torch.testing.assert_close(euler(stack, Blend(stack, [1.0]), start), expected.double(), rtol=1e-5, atol=1e-5)
    other = pipeline_score(pipe, "a ring", embedded_guidance=5.0, **options)
    assert (euler(other, Blend(other, [1.0]), start) - expected).abs().max() > 1e-4


@pytest.mark.parametrize("family", SCORED)
def test_images_are_the_pipelines_own(family):
    """To the bit, in every type and precision; SDXL's autoencoder overflows in float16, and only it is spared that."""
    for kind, dtype in (("np", torch.float32), ("pt", torch.float16), ("pil", torch.bfloat16)):
        pipe = tiny_pipeline(family, seed=1, dtype=dtype)
        stack = pipeline_score(pipe, ["a red circle", "blue"], height=16, width=16)
        start = torch.randn(stack.shape, generator=seeded(), dtype=torch.float32 if family == "z-image" else dtype)
        state, images = own_run(pipe, ["a red circle", "blue"], start, output_type=kind, num_inference_steps=1)
        own = stack.decode(state, kind)
        for image, expected in zip(own, images, strict=True):
            assert np.array_equal(np.asarray(image), np.asarray(expected))
        assert not np.array_equal(np.asarray(own[0]), np.asarray(own[1]))


@pytest.mark.rng_untouched
@pytest.mark.parametrize("family", SCORED)
def test_samples_do_not_depend_on_the_batch(family, tmp_path):
    pipe, members = with_members(tmp_path, family)
    options = {"members": members, "guidance_scale": 2.0, "height": 16, "width": 16}
    four = pipeline_score(pipe, ["a red circle", "blue"], images=2, **options)
    many = [seeded(i) for i in range(4)], [seeded(10 + i) for i in range(4)]
    together = sample(four, start=four.prior(many[0]), noise=many[1]).samples
    one = pipeline_score(pipe, "blue", **options)
    alone = sample(one, start=one.prior([seeded(3)]), noise=[seeded(13)]).samples
    torch.testing.assert_close(together[3:], alone, rtol=2e-3, atol=2e-3)
    assert (together[3] - together[2]).abs().max() > 0.1


@pytest.mark.parametrize("batched", [False, True])
def test_rows_are_the_whole_batch_restricted(batched, tmp_path):
    pipe, members = with_members(tmp_path, dtype=torch.float64)
    text = tiny_lora(pipe, tmp_path / "t.safetensors", seed=5, target="text-encoder", scale=3.0)
    members.remove()
    members = load_members(pipe, {"a": tmp_path / "a.safetensors", "t": text})
    stack = pipeline_score(pipe, ["a", "b", "c"], members=members, batched=batched, height=16, width=16)
    x = torch.randn(stack.shape, generator=seeded(), dtype=torch.float64)
    t, index = torch.tensor(0.5, dtype=torch.float64), torch.tensor([2, 0])
    whole = stack(x, t)
    torch.testing.assert_close(stack.rows(index)(x[index], t), whole[:, index])
    torch.testing.assert_close(stack(x, t, [2]), whole[2:])
    assert (whole[0] - whole[2]).abs().max() > 1e-6
    assert (whole[0, 0] - whole[0, 2]).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
def test_a_member_may_change_the_text_encoders(family, tmp_path):
    """As if it were always on: tokens and pooled embeddings, of prompts and negative prompts."""
    pipe = tiny_pipeline(family, seed=1, dtype=torch.float64)
    path = tiny_lora(pipe, tmp_path / "t.safetensors", seed=5, target="text-encoder", scale=3.0)
    members = load_members(pipe, {"t": path})
    options: dict[str, Any] = {"guidance_scale": 3.0, "negative_prompt": "blue", "height": 16, "width": 16}
    stack = pipeline_score(pipe, ["a red circle", "b"], members=members, **options)
    tuned = tiny_pipeline(family, seed=1, dtype=torch.float64)
    load_lora(tuned, path, "t")
    for encoder in text_encoders_of(tuned).values():
        if getattr(encoder, "peft_config", None):
            encoder.set_adapter("t")
    x, t = torch.randn(stack.shape, generator=seeded(), dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    base, member = stack(x, t)
    torch.testing.assert_close(member, pipeline_score(tuned, ["a red circle", "b"], **options)(x, t)[0])
    assert (member - base).abs().amax((1, 2)).min() > 1e-3


def test_both_backends_run_the_cores_blend(tmp_path, monkeypatch):
    """Everything that is blended, anywhere, goes through ``sdeblend.blend.combine`` and ``Blend.evaluate``."""
    calls = {"combine": 0, "evaluate": 0}
    combine, evaluate = sdeblend.blend.combine, Blend.evaluate

    def counted_combine(*args):
        calls["combine"] += 1
        return combine(*args)

    def counted_evaluate(self, *args):
        calls["evaluate"] += 1
        return evaluate(self, *args)

    monkeypatch.setattr(sdeblend.blend, "combine", counted_combine)
    monkeypatch.setattr(Blend, "evaluate", counted_evaluate)
    pipe, members = with_members(tmp_path)
    with blend(pipe, members, WEIGHTS, correct=None):
        pipe("a", generator=seeded(), **tiny_call(pipe, 4))
    assert calls == {"combine": 4, "evaluate": 4}
    stack = pipeline_score(pipe, "a", members=members, height=16, width=16)
    sample(stack, steps=5)
    assert calls == {"combine": 9, "evaluate": 9}
    schedule = sdeblend.VPLinear()
    functions = [lambda x, t, m=m: m - x for m in (0.0, 1.0, 2.0)]
    mixture = BackwardSDE(schedule, Blend(functions, Preference([0.5, 0.7], strength=1.1)))
    solve(mixture, torch.zeros(3, 2), time_grid(schedule, 5), noise=seeded(), step=Ancestral())
    assert calls == {"combine": 14, "evaluate": 14}
    # the control: poison the core's one function and both backends follow
    monkeypatch.setattr(sdeblend.blend, "combine", lambda members, c: members[0] * 0)
    with blend(pipe, members, WEIGHTS, correct=None):
        zero = pipe("a", generator=seeded(), **(tiny_call(pipe, 1) | {"output_type": "latent"})).images
    start = torch.randn(1, 4, 8, 8, generator=seeded())
    final = pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps[0]]
    ratio = (pipe.scheduler.final_alpha_cumprod / final).sqrt()
    torch.testing.assert_close(zero, ratio * start, rtol=1e-4, atol=1e-4)


def test_bad_input(tmp_path):
    pipe, members = with_members(tmp_path)
    with pytest.raises(ValueError, match="text-to-image"):
        pipeline_score(tiny_pipeline("sd15", "img2img"), "a")
    with pytest.raises(ValueError, match="must be multiples of 2 pixels, got 15 x 16"):
        pipeline_score(pipe, "a", height=15, width=16)
    with pytest.raises(ValueError, match="as many, got 2"):
        pipeline_score(pipe, ["a"], negative_prompt=["b", "c"])
    with pytest.raises(ValueError, match="at least one image"):
        pipeline_score(pipe, "a", images=0)
    stack = pipeline_score(pipe, "a", members=members, images=2)
    with pytest.raises(ValueError, match="2 images"):
        stack.prior([seeded()])
    pipe.scheduler = diffusers.EDMEulerScheduler()
    with pytest.raises(ValueError, match="scheduler must have"):
        pipeline_score(pipe, "a")
