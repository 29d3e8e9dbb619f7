"""A blend as a guider of modular pipelines, against members that peft activates one after the other."""

from __future__ import annotations

import functools
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
from diffusers import guiders
from peft.tuners.tuners_utils import BaseTunerLayer

from sdeblend import Preference
from stablediffusion import BlendGuidance, blend, load_members
from stablediffusion.blending.guider import _average
from stablediffusion.pipelines.components import denoiser_of
from stablediffusion.testing import MODULAR, tiny_lora, tiny_modular, tiny_modular_call, tiny_pipeline

STEPS = 2
WEIGHTS = {"a": 0.9, "b": -0.3}
COEFFICIENTS = {None: 0.4, "a": 0.9, "b": -0.3}
MIDDLE = {"indices": [0], "fqn": "mid_block.attentions.0.transformer_blocks"}
INNER: dict[str, Any] = {
    "momentum": lambda: guiders.AdaptiveProjectedGuidance(5.0, adaptive_projected_guidance_momentum=-0.5),
    "skipped layer": lambda: guiders.SkipLayerGuidance(skip_layer_config=MIDDLE, skip_layer_guidance_stop=1.0),
    "perturbed attention": lambda: guiders.PerturbedAttentionGuidance(
        perturbed_guidance_config=MIDDLE | {"skip_attention": False, "skip_attention_scores": True, "skip_ff": False},
        perturbed_guidance_stop=1.0,
    ),
    "zero star": lambda: guiders.ClassifierFreeZeroStarGuidance(5.0),
    "auto": lambda: guiders.AutoGuidance(5.0, auto_guidance_config=MIDDLE),
}


def cfg(scale=5.0):
    return guiders.ClassifierFreeGuidance(scale)


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    """Return family -> its modular pipeline with the adapters a, b and c loaded, and the members a and b."""

    @functools.cache
    def make(family):
        folder, pipe = tmp_path_factory.mktemp(family), tiny_modular(family, seed=3)
        simple = tiny_pipeline(family, seed=3)
        paths = {n: tiny_lora(simple, folder / f"{n}.safetensors", seed=i, scale=0.3) for i, n in enumerate("abc")}
        return pipe, load_members(pipe, paths).chosen("ab")

    return make


@pytest.fixture
def sdxl(pipes):
    return pipes("sdxl")[0]


@functools.cache
def settings(pipe, steps):
    negative = {"negative_prompt": "blue"} if "negative_prompt" in pipe.blocks.input_names else {}
    return tiny_modular_call(pipe, steps) | negative


def run(pipe, guider, images=1, **options):
    pipe.update_components(guider=guider)
    call = settings(pipe, options.pop("steps", STEPS)) | {"num_images_per_prompt": images} | options
    return pipe(prompt="a red circle", generator=torch.Generator().manual_seed(7), **call)


def mean(parts, coefficients):
    """Average tensors, or such in a list (one an image) or a tuple; coefficients are numbers, or (B,) one an image."""
    if isinstance(parts[0], torch.Tensor):
        shaped = [torch.as_tensor(c).reshape(-1, *[1] * (parts[0].ndim - 1)) for c in coefficients]
        return sum(c * part.double() for c, part in zip(shaped, parts, strict=True)).to(parts[0].dtype)
    images = isinstance(parts[0], list) and any(isinstance(c, torch.Tensor) for c in coefficients)
    each = zip(*coefficients, strict=True) if images else [tuple(coefficients)] * len(parts[0])
    return type(parts[0])(mean(one, c) for one, c in zip(zip(*parts, strict=True), each, strict=True))


@contextmanager
def averaged(pipe, rule):
    """Let peft run each adapter (None: the base) and average, by ``rule(calls)`` -> coefficient by adapter."""
    denoiser, calls = denoiser_of(pipe)[1], []
    original = denoiser.forward

    @functools.wraps(original)  # some pipelines read the signature
    def forward(*args, **kwargs):
        coefficients, parts = rule(len(calls)), []
        calls.append(1)
        for name in coefficients:
            if name is None:
                denoiser.disable_adapters()
            else:
                denoiser.enable_adapters()
                denoiser.set_adapters(name)
            parts.append(original(*args, **kwargs))
        return mean(parts, coefficients.values())

    denoiser.forward = forward
    try:
        yield calls
    finally:
        del denoiser.forward
        denoiser.set_adapters([])


def activity(pipe):
    layers = [m for m in denoiser_of(pipe)[1].modules() if isinstance(m, BaseTunerLayer)]
    return [(layer.active_adapters, layer.disable_adapters, layer.forward) for layer in layers]


def error(got, want):
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("family", MODULAR)
def test_members_run_one_by_one(family, guided, images, pipes):
    pipe, _ = pipes(family)
    # SDXL enables its guider in every run
    inner = cfg() if guided else cfg(1.0) if family == "sdxl" else guiders.ClassifierFreeGuidance(5.0, enabled=False)
    with averaged(pipe, lambda _: COEFFICIENTS) as calls:
        want = run(pipe, inner, images)
    assert len(calls) == STEPS * (2 if guided else 1)
    assert error(run(pipe, BlendGuidance(inner, WEIGHTS), images), want) < 1e-5
    if guided and images == 1:  # the control
        assert error(run(pipe, BlendGuidance(inner, WEIGHTS | {"b": -0.303}), images), want) > 3e-5


@pytest.fixture(scope="module")
def plain(pipes):
    """Return what the blend makes with plain guidance."""
    return run(pipes("sdxl")[0], BlendGuidance(cfg(), WEIGHTS))


@pytest.mark.parametrize("inner", INNER)
def test_inner_guiders(inner, sdxl, plain):
    with averaged(sdxl, lambda _: COEFFICIENTS):
        want = run(sdxl, INNER[inner]())
    got = run(sdxl, BlendGuidance(INNER[inner](), WEIGHTS))
    assert error(got, want) < 1e-5 and error(got, plain) > 1e-4


@pytest.mark.parametrize("family", MODULAR)
def test_the_attached_blend_has_the_same_numbers(family, pipes):
    pipe, members = pipes(family)
    preference = Preference({"a": 0.4, "b": 0.2}, 1.5)
    with blend(pipe, members, preference, correct=None):
        want = run(pipe, cfg(), 2)
    assert error(run(pipe, BlendGuidance(cfg(), preference), 2), want) < 1e-6


@pytest.mark.parametrize("family", MODULAR)
def test_one_member_a_step(family, pipes):
    """The attached blend's, as a guider has none."""
    pipe, members = pipes(family)
    with blend(pipe, members, {"a": 0.5, "b": 0.2}, mode="ls", selection="independent", seed=2) as knobs:
        got, serving = run(pipe, cfg(), 2), cast(Any, knobs)._engine.run.serving
    assert (serving[0] != serving[1]).any() and (serving[:, 0] != serving[:, 1]).any()

    def rule(calls):
        return {name: (serving[calls // 2] == k).double() for k, name in enumerate((None, "a", "b"))}

    with averaged(pipe, rule) as calls:
        assert error(got, run(pipe, cfg(), 2)) < 1e-5
    assert len(calls) == 2 * STEPS


def test_preferences_over_a_run_and_what_is_evaluated(sdxl, tmp_path):
    def rule(calls):
        return {"a": 1.0} if calls < 2 else {None: 0.3, "c": 0.7}

    with averaged(sdxl, rule):
        want = run(sdxl, cfg(), steps=3)
    guider = BlendGuidance(cfg(), {0.5: {"c": 0.7}, 0.0: Preference({"b": 0.0, "a": 1.0})})
    used = []
    handle = denoiser_of(sdxl)[1].register_forward_hook(lambda *_: used.append(guider._count_prepared))
    try:
        assert error(run(sdxl, guider, steps=3), want) < 1e-5
    finally:
        handle.remove()
    assert used == [1, 2, 1, 2, 3, 4, 1, 2, 3, 4]  # a member of weight 0 is not run, and neither is the base
    guider.save_pretrained(tmp_path)
    again = BlendGuidance.from_pretrained(tmp_path)
    assert again.preference == guider.preference and again.config == guider.config
    assert torch.equal(run(sdxl, again, steps=3), run(sdxl, guider, steps=3))
    guider.preference = {"a": 1.0}
    assert guider.preference == guider.new().preference == Preference({"a": 1.0})


@pytest.mark.parametrize("inner", INNER)
def test_saved_and_loaded(inner, tmp_path):
    guider = BlendGuidance(INNER[inner](), Preference({"a": 0.5, "c": [0.2, 0.9]}, 1.3))
    guider.save_pretrained(tmp_path)
    again = BlendGuidance.from_pretrained(tmp_path)
    assert again.preference == guider.preference and again.config == guider.config
    assert repr(again.guider) == repr(guider.guider)


def test_weights_an_image(sdxl):
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    got = run(sdxl, BlendGuidance(cfg(), {"a": torch.tensor([0.2, 0.9]), "b": 0.1}), 2, latents=noise)
    for i, weight in enumerate((0.2, 0.9)):
        alone = run(sdxl, BlendGuidance(cfg(), {"a": weight, "b": 0.1}), latents=noise[i : i + 1])
        assert error(got[i : i + 1], alone) < 1e-5
    with pytest.raises(ValueError, match="weights for 3 images need a batch of as many, got 2"):
        run(sdxl, BlendGuidance(cfg(), {"a": [0.2, 0.9, 0.1]}), 2)


def test_background_adapters_stay_and_all_is_restored(sdxl):
    denoiser = denoiser_of(sdxl)[1]
    denoiser.set_adapters(["a", "c"])
    before = activity(sdxl)
    got = run(sdxl, BlendGuidance(cfg(), WEIGHTS))
    assert activity(sdxl) == before and "forward" not in denoiser.__dict__
    denoiser.set_adapters([])
    assert error(got, run(sdxl, BlendGuidance(cfg(), WEIGHTS))) > 1e-3


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_restored_after_a_failure(failure, sdxl):
    denoiser, guider = denoiser_of(sdxl)[1], BlendGuidance(INNER["perturbed attention"](), WEIGHTS)
    want, before, calls = run(sdxl, guider), activity(sdxl), []

    def fail(*_):
        calls.append(1)
        if len(calls) == 14:  # the second step's perturbed pass, its second member
            raise failure("stop")

    handle = denoiser.mid_block.register_forward_hook(fail)
    with pytest.raises(failure, match="stop"):
        run(sdxl, guider)
    handle.remove()
    assert activity(sdxl) == before and "forward" not in denoiser.__dict__
    assert torch.equal(run(sdxl, guider), want)


def test_the_inner_guider_is_reached():
    guider = BlendGuidance(cfg(), WEIGHTS)
    guider.guidance_scale = 2.0
    assert guider.guidance_scale == guider.guider.guidance_scale == 2.0 and guider.num_conditions == 2
    guider.disable()
    assert not guider._enabled and not guider.guider._enabled and guider.num_conditions == 1
    guider.guider = INNER["momentum"]()
    assert guider.config["guider"]["_class_name"] == "AdaptiveProjectedGuidance" and guider._enabled
    with pytest.raises(AttributeError, match="nothing"):
        _ = guider.nothing


def test_half_precision_is_averaged_in_float32():
    values = [torch.randn(64, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(3)]
    coefficients = torch.tensor([-6.0, 3.3, 3.7], dtype=torch.float64)
    want = mean(values, coefficients.tolist())
    got = _average([[value, (value,)] for value in values], coefficients)
    assert torch.equal(got[0], want) and torch.equal(got[1][0], want)
    assert not torch.equal(
        sum(c * v for c, v in zip(coefficients.bfloat16(), values, strict=True)), want
    )  # the control


REFUSED: dict[str, tuple[type[Exception], str, Any]] = {
    "no guider": (TypeError, "needs a guider of diffusers", lambda: BlendGuidance(7.5, WEIGHTS)),  # type: ignore[arg-type]
    "a blend inside": (ValueError, "one blend", lambda: BlendGuidance(BlendGuidance(cfg(), WEIGHTS), WEIGHTS)),
    "an unknown inner guider": (ValueError, "'Mine'", lambda: BlendGuidance({"_class_name": "Mine"}, WEIGHTS)),
    "no names": (ValueError, "by their names", lambda: BlendGuidance(cfg(), Preference([0.5, 0.5]))),
    "no preference": (TypeError, "needs a preference", lambda: BlendGuidance(cfg(), 0.5)),  # type: ignore[arg-type]
    "no weights": (ValueError, "at least one weight", lambda: BlendGuidance(cfg(), {})),
    "a late start": (ValueError, "0 first", lambda: BlendGuidance(cfg(), {0.5: WEIGHTS})),
    "past the end": (ValueError, "below 1, got 0.0, 1.0", lambda: BlendGuidance(cfg(), {0.0: WEIGHTS, 1.0: WEIGHTS})),
    "no fraction": (ValueError, "got early", lambda: BlendGuidance(cfg(), {"early": WEIGHTS})),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_at_construction(case):
    kind, message, make = REFUSED[case]
    with pytest.raises(kind, match=message):
        make()


def test_refused_in_a_run(sdxl, pipes):
    guider, denoiser = BlendGuidance(cfg(), WEIGHTS), denoiser_of(sdxl)[1]
    with pytest.raises(ValueError, match=r"UNet2DConditionModel, a, b, c, got vivid; load them"):
        run(sdxl, BlendGuidance(cfg(), {"a": 0.5, "vivid": 0.5}))
    with pytest.raises(ValueError, match="one blend at a time"), blend(*pipes("sdxl"), WEIGHTS):
        run(sdxl, guider)
    denoiser.set_adapters(["a"])
    sdxl.fuse_lora(adapter_names=["a"])
    try:
        with pytest.raises(ValueError, match="got a fused into"):
            run(sdxl, guider)
    finally:
        sdxl.unfuse_lora()
        denoiser.set_adapters([])
    batches = guider.prepare_inputs({})
    for batch in batches:
        batch.noise_pred = torch.zeros(1)
    with pytest.raises(ValueError, match="all its 6 batches, got 2 of 2"):
        guider(batches[:2])
