"""Certificate and resampling inside a pipeline: the core's weights from the scheduler's own means and variances."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

import stablediffusion
from sdeblend import Correction, Preference, effective_sample_size
from stablediffusion import load_members
from stablediffusion.testing import tiny_call, tiny_lora, tiny_pipeline
from tests import sd_reference as reference

SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler,
    "ddpm": diffusers.DDPMScheduler,
    "euler-a": diffusers.EulerAncestralDiscreteScheduler,
}
# What knobs tell may be None; here it must not be, and None would fail.
blend: Any = stablediffusion.blend
WEIGHTS = Preference({"a": 0.5, "b": 0.3})


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make(folder, family="sd15", scale=0.3, scheduler="ddim"):
    pipe = tiny_pipeline(family, seed=1, dtype=torch.float64)
    pipe.scheduler = SCHEDULERS[scheduler].from_config(pipe.scheduler.config)
    paths = {n: tiny_lora(pipe, folder / f"{n}.safetensors", seed=i + 1, scale=scale) for i, n in enumerate("ab")}
    return pipe, paths


def call(pipe, **options):
    settings = tiny_call(pipe, 8) | {"output_type": "latent", "generator": seeded()} | options
    return pipe("a red circle", **settings).images


@torch.no_grad()
def by_transitions(pipe, paths, scheduler_name, eta, images, steps=8, guidance=7.5):
    """Return -log W and latents, from each member's own scheduler step: means by zero noise, variance by a draw.

    Independent of every formula in the package: ``step`` is run once a member on a copy with the same noise.
    """
    import copy

    unet = pipe.unet
    networks = [unet, *(reference.fused(unet, path, "unet") for path in paths.values())]
    c = WEIGHTS.coefficients()
    scheduler, generator = copy.deepcopy(pipe.scheduler), seeded()
    scheduler.set_timesteps(steps)
    text, empty, _, _ = reference.encode(pipe, "a red circle", None, True)
    x = torch.randn(images, 4, 8, 8, generator=generator, dtype=torch.float64) * scheduler.init_noise_sigma
    total = torch.zeros(images, dtype=torch.float64)
    extra = {"eta": eta} if scheduler_name == "ddim" else {}
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        outputs = []
        for network in networks:
            minus, plus = (network(scaled, t, e.repeat(images, 1, 1)).sample for e in (empty, text))
            outputs.append(minus + guidance * (plus - minus))
        blended = sum(ci * out for ci, out in zip(c.tolist(), outputs, strict=True))
        state = generator.get_state()
        moved = []
        for out in [*outputs, blended]:
            generator.set_state(state)
            moved.append(copy.deepcopy(scheduler).step(out, t, x, generator=generator, **extra).prev_sample)
        again = copy.deepcopy(scheduler).step(blended, t, x, generator=seeded(99), **extra).prev_sample
        generator.set_state(state)
        x = scheduler.step(blended, t, x, generator=generator, **extra).prev_sample
        # two draws of the same step differ by sqrt(2 V); z is known from its generator
        g1, g2 = torch.Generator(), seeded(99)
        g1.set_state(state)
        z1, z2 = (torch.randn(x.shape, generator=g, dtype=torch.float64) for g in (g1, g2))
        variance = float((((moved[-1] - again) * (z1 - z2)).sum() / (z1 - z2).square().sum()) ** 2)
        if variance > 1e-12:
            means = torch.stack(moved[:-1])
            spread = sum(
                ci * (m - moved[-1]).flatten(1).square().sum(1) for ci, m in zip(c.tolist(), means, strict=True)
            )
            total += spread / (2 * variance)
    return total, x


@pytest.mark.parametrize("family", ["sd15", "sd21"])
@pytest.mark.parametrize(("scheduler", "eta"), [("ddim", 1.0), ("ddim", 0.4), ("ddpm", 1.0), ("euler-a", 1.0)])
def test_weights_are_those_of_the_schedulers_transitions(family, scheduler, eta, tmp_path):
    pipe, paths = make(tmp_path, family, scheduler=scheduler)
    expected, latents = by_transitions(pipe, paths, scheduler, eta, images=2)
    members = load_members(pipe, paths)
    with blend(pipe, members, WEIGHTS) as knobs:
        got = call(pipe, num_images_per_prompt=2, eta=eta)
        torch.testing.assert_close(got, latents, rtol=1e-6, atol=1e-6)
        assert knobs.reason is None
        torch.testing.assert_close(knobs.nats, expected, rtol=2e-3, atol=0)
        assert knobs.nats.min() > 0
        # what the certificate is made of adds up to it
        profile = knobs.certificate.profile
        torch.testing.assert_close(knobs.disagreement.sum((1, 2)), profile, rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(profile.sum(), knobs.nats.mean(), rtol=1e-6, atol=0)
        assert abs(float(expected[0] / expected[1]) - 1) > 5e-3  # the control: images differ by more than the tolerance


def test_one_group_a_prompt_and_preference(tmp_path):
    pipe, paths = make(tmp_path)
    members = load_members(pipe, paths)
    settings = tiny_call(pipe, 4) | {"output_type": "latent", "eta": 1.0}
    with blend(pipe, members, WEIGHTS) as knobs:
        pipe(["a", "b"], num_images_per_prompt=3, generator=seeded(), **settings)
        assert len(knobs.certificates) == 2
        assert knobs.certificate is None
        knobs.preference = Preference({"a": torch.tensor([0.1, 0.1, 0.9]), "b": 0.1})
        pipe("a", num_images_per_prompt=3, generator=seeded(), **settings)
        assert [len(c.per_sample) for c in knobs.certificates] == [2, 1]


def test_resampling_redraws_and_repeats(tmp_path):
    """Redraw when the effective sample size falls, never on the last step; both sizes are returned."""
    pipe, paths = make(tmp_path, scale=0.05)
    members = load_members(pipe, paths)
    settings = {"num_images_per_prompt": 6, "eta": 1.0}
    with blend(pipe, members, WEIGHTS) as knobs:
        plain = call(pipe, **settings)
        nats = knobs.nats
    correction = Correction("resample", threshold=0.999, generator=seeded(3))
    with blend(pipe, members, WEIGHTS, correct=correction) as knobs:
        got = call(pipe, **settings)
        steps, weights, certificate = knobs.resampled, knobs.log_weights, knobs.certificate
    assert steps and max(steps) < 8
    assert (got - plain).abs().max() > 1e-6
    assert 0 < float(effective_sample_size(weights)) <= 6
    assert 0 < certificate.ess_fraction <= 1  # without resampling
    assert nats.std() > 0
    # a threshold that is never reached leaves the images alone
    never = Correction("resample", threshold=1e-9, generator=seeded(3))
    with blend(pipe, members, WEIGHTS, correct=never) as knobs:
        assert torch.equal(call(pipe, **settings), plain)
        torch.testing.assert_close(knobs.nats, nats)
    with blend(pipe, members, WEIGHTS, correct="resample", seed=4):
        first, second = call(pipe, **settings), call(pipe, **settings)
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("scheduler", "options", "message"),
    [
        (diffusers.DDIMScheduler, {"eta": 0.0}, "eta=1"),
        (diffusers.EulerDiscreteScheduler, {}, "takes no noise"),
        (diffusers.DPMSolverMultistepScheduler, {}, "takes no noise"),
    ],
)
def test_no_noise_means_no_certificate_and_a_reason(scheduler, options, message, tmp_path):
    pipe, paths = make(tmp_path)
    members = load_members(pipe, paths)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    with blend(pipe, members, WEIGHTS) as knobs:
        call(pipe, **options)
        assert knobs.certificate is None and knobs.nats is None and knobs.log_weights is None
        assert message in knobs.reason
    with pytest.raises(ValueError, match="resampl"), blend(pipe, members, WEIGHTS, correct="resample"):
        call(pipe, **options)
    with blend(pipe, members, WEIGHTS, mode="ls") as knobs:
        call(pipe, **options)
        assert "mode 'ls'" in knobs.reason


def test_guidance_rescale_takes_the_certificate_away(tmp_path):
    pipe, paths = make(tmp_path)
    members = load_members(pipe, paths)
    with blend(pipe, members, WEIGHTS) as knobs:
        with pytest.warns(UserWarning, match="guidance_rescale"):
            call(pipe, eta=1.0, guidance_rescale=0.7)
        assert knobs.certificate is None
        assert "after guidance" in knobs.reason
        call(pipe, eta=1.0)
        assert knobs.certificate is not None


def test_one_image_has_its_own_bound(tmp_path):
    """From one path log E[W] cannot be estimated: its naive value would be a perfect zero."""
    pipe, paths = make(tmp_path)
    members = load_members(pipe, paths)
    with blend(pipe, members, WEIGHTS) as knobs:
        call(pipe, eta=1.0)
        assert knobs.certificate.value == pytest.approx(float(knobs.nats[0]))
        assert knobs.certificate.value > 0
        knobs.preference = Preference({"a": 1.5})
        call(pipe, eta=1.0)
        assert knobs.certificate is None
        assert "several images" in knobs.reason
        call(pipe, eta=1.0, num_images_per_prompt=2)
        assert knobs.certificate is not None
