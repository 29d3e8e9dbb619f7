"""Certificate and resampling inside a pipeline: the core's weights from the scheduler's own means and variances."""

from __future__ import annotations

import copy
import math
from typing import Any

import diffusers
import pytest
import torch

import stablediffusion
from sdeblend import Correction, Preference, effective_sample_size
from stablediffusion import load_members
from stablediffusion.testing import tiny_call, tiny_lora, tiny_pipeline
from tests.support import sd_reference as reference

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


def call(pipe, steps=5, **options):
    settings = tiny_call(pipe, steps) | {"output_type": "latent", "generator": seeded()} | options
    return pipe("a red circle", **settings).images


@torch.no_grad()
def by_transitions(pipe, paths, scheduler_name, eta, images, steps=5, guidance=7.5):
    """Return -log W and latents, from each member's own scheduler step: means by zero noise, variance by a draw.

    Independent of every formula in the package: ``step`` is run once a member on a copy with the same noise.
    """
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
    assert steps and max(steps) < 5
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


@pytest.mark.parametrize(
    ("scheduler", "config", "message"),
    [
        ("ddim", {"clip_sample": True}, "clips its predictions"),
        ("ddpm", {"clip_sample": False, "thresholding": True}, "clips its predictions"),
    ],
)
def test_steps_that_are_not_affine_have_no_certificate(scheduler, config, message, gentle):
    pipe, paths, _ = gentle
    pipe = copy.copy(pipe)
    pipe.scheduler = SCHEDULERS[scheduler].from_config(pipe.scheduler.config, **config)
    members = load_members(pipe, paths)
    try:
        with blend(pipe, members, WEIGHTS) as knobs:
            call(pipe, 2, **({"eta": 1.0} if scheduler == "ddim" else {}))
            assert knobs.certificate is None
            assert message in knobs.reason
    finally:
        members.remove()


def test_inpainting_with_four_channels_has_no_certificate(tmp_path):
    """The pipeline replaces the kept part after each step; a network of nine channels does not need that."""
    reasons = {}
    for task in ("inpaint", "inpaint9"):
        pipe = tiny_pipeline("sd15", task, seed=1)
        members = load_members(pipe, {"a": tiny_lora(pipe, tmp_path / f"{task}.safetensors", seed=1, scale=0.3)})
        with blend(pipe, members, {"a": 0.5}) as knobs:
            call(pipe, 4, eta=1.0)
            reasons[task] = knobs.reason
    assert "replaces part of the image" in reasons["inpaint"]
    assert reasons["inpaint9"] is None


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


def test_few_images_have_a_bound_or_a_warning(tmp_path):
    """From few paths log E[W] cannot be estimated: for one, its naive value would be a perfect zero."""
    pipe, paths = make(tmp_path)
    members = load_members(pipe, paths)
    with blend(pipe, members, WEIGHTS) as knobs:
        for images in (1, 3):
            call(pipe, 3, eta=1.0, num_images_per_prompt=images)
            assert knobs.certificate.value == pytest.approx(float(knobs.nats.mean()))
            assert knobs.certificate.value > 0
            assert knobs.certificate.reliable and not knobs.certificate.normalised
            assert str(knobs.certificate).startswith("at most ")
            assert (knobs.certificate.standard_error == math.inf) == (images == 1)
        knobs.preference = Preference({"a": 1.0}, strength=1.5)
        call(pipe, 3, eta=1.0)
        assert not knobs.certificate.reliable
        assert "negative" in knobs.certificate.warning


@torch.no_grad()
def by_hand(pipe, paths, correction, images, steps, guidance=7.5):
    """Return latents, both effective sample sizes, -log W and the redrawn steps of a resampled run, written out.

    DDIM at eta 1: member i's mean is that of its own ``step`` and the variance the scheduler's. The ancestors come from
    the inverse of the cumulative weights at evenly spaced points, one uniform number a redraw.
    """
    networks = [pipe.unet, *(reference.fused(pipe.unet, path, "unet") for path in paths.values())]
    c = WEIGHTS.coefficients().tolist()
    generator, ancestry = seeded(), seeded(3)
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(steps)
    text, empty, _, _ = reference.encode(pipe, "a red circle", None, True)
    x = torch.randn(images, 4, 8, 8, generator=generator, dtype=torch.float64)
    path, steer, residual = (torch.zeros(images, dtype=torch.float64) for _ in range(3))
    redrawn = []
    for n, t in enumerate(scheduler.timesteps):
        outputs = []
        for network in networks:
            minus, plus = (network(x, t, e.repeat(images, 1, 1)).sample for e in (empty, text))
            outputs.append(minus + guidance * (plus - minus))
        zero = torch.zeros_like(x)
        means = [scheduler.step(out, t, x, eta=1.0, variance_noise=zero).prev_sample for out in outputs]
        mean = sum(ci * m for ci, m in zip(c, means, strict=True))
        deviation = scheduler.step(outputs[0], t, x, eta=1.0, variance_noise=zero + 1).prev_sample - means[0]
        variance = float(deviation.flatten()[0]) ** 2
        x = mean + deviation * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        spread = sum(ci * (m - mean).flatten(1).square().sum(1) for ci, m in zip(c, means, strict=True))
        if variance > 0:
            path = path - spread / (2 * variance)
            low, high = correction.active or (0.0, 1.0)
            if low <= (float(t) + 1) / 1000 <= high:
                steer = steer - correction.tempering * spread / (2 * variance)
                residual = residual - correction.tempering * spread / (2 * variance)
        weights = residual.softmax(0)
        if n < steps - 1 and 1 / float(weights.square().sum()) < correction.threshold * images:
            offset = float(torch.rand(1, generator=ancestry, dtype=torch.float64))
            edges = weights.cumsum(0).tolist()
            chosen = [min(sum(e < (i + offset) / images for e in edges), images - 1) for i in range(images)]
            x, path, steer, residual = x[chosen], path[chosen], steer[chosen], residual * 0
            redrawn.append(n + 1)
    resampled = 1 / float(residual.softmax(0).square().sum())
    return x, -path, resampled, redrawn


CORRECTIONS = [{}, {"tempering": 0.3}, {"active": (0.2, 0.7)}, {"tempering": 0.5, "active": (0.3, 1.0)}]


@pytest.fixture(scope="module")
def gentle(tmp_path_factory):
    """Return a pipeline whose members differ little, so that resampling keeps several images."""
    pipe, paths = make(tmp_path_factory.mktemp("gentle"), scale=0.3)
    return pipe, paths, copy.deepcopy(pipe.unet)


@pytest.mark.parametrize("options", CORRECTIONS, ids=str)
def test_a_resampled_run_equals_a_loop_written_by_hand(options, gentle):
    """In float64, images and weights; another tempering or interval is the control."""
    pipe, paths, unet = gentle
    images, steps, threshold = 5, 6, 0.99
    plain = copy.copy(pipe)
    plain.unet = unet
    expected = {}
    for key in (options, CORRECTIONS[(CORRECTIONS.index(options) + 1) % len(CORRECTIONS)]):
        correction = Correction("resample", threshold=threshold, generator=seeded(3), **key)
        expected[str(key)] = by_hand(plain, paths, correction, images, steps)
    latents, nats, resampled, redrawn = expected.pop(str(options))
    (control, *_) = expected.popitem()[1]
    members = load_members(pipe, paths)
    try:
        correction = Correction("resample", threshold=threshold, generator=seeded(3), **options)
        with blend(pipe, members, WEIGHTS, correct=correction) as knobs:
            got = call(pipe, steps, eta=1.0, num_images_per_prompt=images)
            assert knobs.resampled == redrawn and redrawn
            torch.testing.assert_close(got, latents, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(knobs.nats, nats, rtol=1e-6, atol=0)  # its table of alphas is float32
            assert knobs.ess.resampled == pytest.approx(resampled, rel=1e-6)
            assert 0 < knobs.ess.plain <= images
            assert len(knobs.notes) == len(options)
            assert all("partial" in note for note in knobs.notes)
            # what the certificate is made of still adds up
            profile = knobs.certificate.profile
            torch.testing.assert_close(knobs.disagreement.sum((1, 2)), profile, rtol=1e-6, atol=1e-12)
    finally:
        members.remove()
    assert (control - latents).abs().max() > 1e-3


def test_both_effective_sample_sizes(gentle):
    """Without resampling they are one number, (sum W)^2 / sum W^2; one pair a prompt."""
    pipe, paths, _ = gentle
    members = load_members(pipe, paths)
    try:
        with blend(pipe, members, WEIGHTS) as knobs:
            call(pipe, 4, eta=1.0, num_images_per_prompt=4)
            weights = (-knobs.nats).exp()
            expected = float(weights.sum() ** 2 / weights.square().sum())
            assert knobs.ess == pytest.approx((expected, expected))
            assert expected < 4 - 1e-6
            assert knobs.notes == ()
            pipe(["a", "b"], **(tiny_call(pipe, 3) | {"generator": seeded(), "eta": 1.0}))
            assert knobs.ess is None
            assert len(knobs.effective_samples) == 2
        with blend(pipe, members, WEIGHTS) as knobs:
            call(pipe, 2, eta=0.0)
            assert knobs.ess is None and knobs.effective_samples == []
        groups = Correction(groups=torch.tensor([0, 1]))
        with pytest.raises(ValueError, match="leave groups out"), blend(pipe, members, WEIGHTS, correct=groups):
            pass
    finally:
        members.remove()


def test_a_prediction_that_is_no_number_is_told(gentle):
    pipe, paths, _ = gentle
    members = load_members(pipe, paths)
    try:
        with pytest.raises(FloatingPointError, match="must be finite"), blend(pipe, members, WEIGHTS):
            call(pipe, 2, eta=1.0, latents=torch.full((1, 4, 8, 8), math.nan, dtype=torch.float64))
    finally:
        members.remove()
