"""The attached blend on unmodified pipelines: tasks, schedulers, offloading, one member a step, restoring, errors."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import pytest
import torch
from peft.tuners.lora import LoraLayer

import stablediffusion
from sdeblend import Blend, Preference
from stablediffusion import load_members
from stablediffusion.testing import tiny_call, tiny_lora, tiny_pipeline
from tests.support import sd_reference as reference

PROMPT = "a red circle"
blend: Any = stablediffusion.blend  # its knobs are looked into here
HALVES = Preference({"a": 0.5, "b": 0.5})
SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler,
    "ddpm": diffusers.DDPMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler-a": diffusers.EulerAncestralDiscreteScheduler,
    "dpm-2m": diffusers.DPMSolverMultistepScheduler,
    "dpm-2m-sde": diffusers.DPMSolverMultistepScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def with_members(folder, family="sd15", task="text2img", **options):
    pipe = tiny_pipeline(family, task, seed=1, **options)
    paths = {name: tiny_lora(pipe, folder / f"{name}.safetensors", seed=i + 1) for i, name in enumerate("ab")}
    return pipe, load_members(pipe, paths), paths


def call(pipe, steps=4, **options):
    settings = tiny_call(pipe, steps) | {"output_type": "latent", "generator": seeded()} | options
    if type(pipe).__name__.startswith("FluxImg"):
        settings |= {"height": 16, "width": 16}
    return pipe(PROMPT, **settings).images


class Averaging(torch.nn.Module):
    """The control pipeline's denoiser: a plain module that averages two fused networks."""

    def __init__(self, network, copies):
        super().__init__()
        self.network, self.copies = network, torch.nn.ModuleList(copies)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("network"), name)

    def forward(self, *args, **kwargs):
        outputs = [c(*args, **kwargs) for c in self.copies]
        first = [o[0] if isinstance(o, tuple) else o.sample for o in outputs]
        return (sum(first) / len(first),)


@pytest.mark.parametrize(
    ("family", "task", "scheduler"),
    [("sd15", "text2img", name) for name in SCHEDULERS]
    + [("sd15", task, "ddim") for task in ("img2img", "inpaint", "inpaint9", "controlnet")]
    + [("sdxl", task, "euler") for task in ("img2img", "inpaint", "controlnet")]
    + [(family, task, None) for family in ("sd3", "flux") for task in ("img2img", "inpaint")],
)
def test_pipelines_and_schedulers(family, task, scheduler, tmp_path):
    """Equal to the same pipeline with a denoiser that is the average of two fused networks."""
    pipe, members, paths = with_members(tmp_path, family, task)
    if scheduler is not None:
        extra = {"algorithm_type": "sde-dpmsolver++"} if scheduler == "dpm-2m-sde" else {}
        pipe.scheduler = SCHEDULERS[scheduler].from_config(pipe.scheduler.config, **extra)
    with blend(pipe, members, HALVES) as knobs:
        got = call(pipe)
        single = call(pipe)
        knobs.preference = {"a": 1.0}
        other = call(pipe)
    members.remove()
    name = "transformer" if hasattr(pipe, "transformer") else "unet"
    plain = getattr(pipe, name)
    setattr(pipe, name, Averaging(plain, [reference.fused(plain, p, name) for p in paths.values()]))
    expected = call(pipe)
    assert torch.equal(got, single)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert (got - other).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux"])
def test_text_encoder_members_have_their_own_prompt(family, tmp_path):
    """One member changes the text encoder: equal to that encoder's embeddings for it alone."""
    pipe = tiny_pipeline(family, seed=1, dtype=torch.float64)
    path = tiny_lora(pipe, tmp_path / "t.safetensors", seed=1, scale=3.0, target="text-encoder")
    base = call(pipe, negative_prompt="blue")
    fused = copy.copy(pipe)
    for name in ("text_encoder", "text_encoder_2") if family in ("sdxl", "sd3") else ("text_encoder",):
        setattr(fused, name, reference.fused(getattr(pipe, name), path, name))
    expected = call(fused, negative_prompt="blue")
    members = load_members(pipe, {"t": path})
    with blend(pipe, members, {"t": 1.0}) as knobs:
        got = call(pipe, negative_prompt="blue")
        knobs.preference = {"t": 0.0}
        torch.testing.assert_close(call(pipe, negative_prompt="blue"), base, rtol=0, atol=0)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    assert (got - base).abs().max() > 1e-6
    if family == "sd15":
        with pytest.raises(ValueError, match="prompts as text"), blend(pipe, members, {"t": 1.0}):
            pipe(**tiny_call(pipe), prompt_embeds=torch.ones(1, 77, 16).double(), negative_prompt="x", guidance_scale=1)


@pytest.mark.parametrize("when", ["before", "inside"])
def test_offloading_blends_every_call(when, tmp_path):
    """Accelerate moves the forward; a blend put in the wrong place would run once and then silently stop."""
    pipe, members, _ = with_members(tmp_path)
    plain = call(pipe)
    with blend(pipe, members, HALVES):
        expected = call(pipe)
    if when == "before":
        pipe.enable_model_cpu_offload(device="cpu")
    with blend(pipe, members, HALVES) as knobs:
        if when == "inside":
            pipe.enable_model_cpu_offload(device="cpu")
        for n in range(1, 4):
            assert torch.equal(call(pipe), expected)
            assert knobs.calls == 4 * n
    assert torch.equal(call(pipe), plain)
    assert "_sdeblend_attached" not in pipe.unet.__dict__
    assert (plain - expected).abs().max() > 1e-3


def test_one_member_a_step(tmp_path):
    pipe, members, _ = with_members(tmp_path)
    pipe.scheduler = SCHEDULERS["heun"].from_config(pipe.scheduler.config)
    preference = Preference({"a": 0.3, "b": 0.4})
    with blend(pipe, members, preference, mode="ls", seed=5) as knobs:
        four = call(pipe, steps=6, num_images_per_prompt=4, generator=[seeded(i) for i in range(4)])
        used = knobs._engine.run.serving.clone()
        assert knobs.calls == 11  # Heun: twice a step but the last
        assert knobs.evaluations == 44  # one a call and image
        knobs.preference = {"a": 1.0}
        call(pipe)
        knobs.preference = preference
        two = call(pipe, steps=6, num_images_per_prompt=2, generator=[seeded(i) for i in range(2)])
    # neither the batch size nor what ran before matters
    torch.testing.assert_close(four[:2], two, rtol=1e-4, atol=1e-4)
    assert used.shape == (6, 4)
    with blend(pipe, members, {"b": 1.0}, mode="ls"):
        ls = call(pipe)
    with blend(pipe, members, {"b": 1.0}):
        torch.testing.assert_close(ls, call(pipe), rtol=1e-5, atol=1e-5)
    beyond = Preference({"a": 0.9, "b": 0.1}, strength=1.6)
    with pytest.raises(ValueError, match="probabilities"), blend(pipe, members, beyond, mode="ls"):
        pass


def test_batch_size_and_history_do_not_matter(tmp_path):
    pipe, members, _ = with_members(tmp_path)
    preference = Preference({"a": torch.tensor([0.2, 0.5, 0.9]), "b": torch.tensor([0.8, 0.5, -0.2])}, strength=1.2)
    with blend(pipe, members, preference) as knobs:
        three = call(pipe, num_images_per_prompt=3, generator=[seeded(i) for i in range(3)], eta=1.0)
        for i, (a, b) in enumerate([(0.2, 0.8), (0.5, 0.5), (0.9, -0.2)]):
            knobs.preference = Preference({"a": a, "b": b}, strength=1.2)
            one = call(pipe, generator=seeded(i), eta=1.0)
            torch.testing.assert_close(one[0], three[i], rtol=1e-4, atol=1e-4)
    assert (three[0] - three[1]).abs().max() > 1e-2


def test_half_precision_stays_in_the_network(tmp_path, monkeypatch):
    """Members are combined in float32; the pipeline gets its own dtype back."""
    pipe, members, _ = with_members(tmp_path, dtype=torch.bfloat16)
    seen = []
    with blend(pipe, members, HALVES, batched=True) as knobs:
        evaluate = Blend.evaluate

        def recorded(self, x, t):
            seen.append(evaluate(self, x, t))
            return seen[-1]

        monkeypatch.setattr(Blend, "evaluate", recorded)
        assert call(pipe, eta=1.0).dtype == torch.bfloat16
        assert knobs.certificate is not None
    assert {e.members.dtype for e in seen} == {torch.float32}


def state(pipe):
    layers = [
        (list(m.active_adapters), m.disable_adapters, dict(m.scaling), sorted(m.lora_A), "forward" in m.__dict__)
        for part in (pipe.unet, pipe.text_encoder)
        for m in part.modules()
        if isinstance(m, LoraLayer)
    ]
    own = [sorted(k for k in part.__dict__ if callable(part.__dict__[k])) for part in (pipe.unet, pipe.scheduler, pipe)]
    return layers, own, "_sdeblend_attached" in pipe.unet.__dict__


class Stop(BaseException):
    """Stands for an interrupt."""


@pytest.mark.parametrize("mode", ["mpa", "ls", "soup", "soup-factors"])
def test_the_pipeline_is_as_before_also_after_an_interrupt(mode, tmp_path):
    pipe, members, _ = with_members(tmp_path)
    text = tiny_lora(pipe, tmp_path / "t.safetensors", seed=9, target="text-encoder")
    members.remove()
    members = load_members(pipe, {"a": tmp_path / "a.safetensors", "b": tmp_path / "b.safetensors", "t": text})
    plain, before = call(pipe), state(pipe)
    weights = {"a": 0.5, "b": 0.3, "t": 0.2}
    if mode == "soup-factors":
        weights = {"a": 0.5, "b": 0.5}

    def stop(*args):
        raise Stop

    with pytest.raises(Stop), blend(pipe, members, weights, mode=mode, batched=mode == "mpa"):
        call(pipe, callback_on_step_end=stop)
    assert state(pipe) == before
    with blend(pipe, members, weights, mode=mode):
        blended = call(pipe)
    assert state(pipe) == before
    assert torch.equal(call(pipe), plain)
    assert (blended - plain).abs().max() > 1e-2


def test_bad_input_is_told_in_one_sentence(tmp_path):
    pipe, members, _ = with_members(tmp_path)
    before = state(pipe)

    def refused(message, preference=HALVES, **options):
        with pytest.raises(ValueError, match=message) as error, blend(pipe, members, preference, **options):
            call(pipe)
        assert "\n" not in str(error.value)
        assert state(pipe) == before

    refused("can weigh only a, b, got c", {"c": 1.0})
    refused("mode must be one of", mode="mean")
    refused("one preference", Preference({"a": torch.tensor([0.1, 0.2])}), mode="soup")
    refused("got mode 'ls'", mode="ls", correct="resample")
    with pytest.raises(ValueError, match="never used"), blend(pipe, members, HALVES):
        pass
    with blend(pipe, members, HALVES):
        with pytest.raises(ValueError, match="one blend at a time"), blend(pipe, members, HALVES):
            pass
        call(pipe)
    assert state(pipe) == before
    with pytest.raises(ValueError, match="at least one member"):
        load_members(pipe, {})
    with pytest.raises(ValueError, match="'base' names"):
        load_members(pipe, {"base": tmp_path / "a.safetensors"})
    with pytest.raises(ValueError, match="must be loaded, got 'z'"):
        load_members(pipe, {"z": None})
    with pytest.raises(TypeError, match="unet or a transformer"):
        load_members(torch.nn.Linear(1, 1), {"a": tmp_path / "a.safetensors"})
    with blend(pipe, members, HALVES), pytest.warns(UserWarning, match="guidance_rescale"):
        call(pipe, guidance_rescale=0.5, eta=1.0)
    pipe.delete_adapters("a")
    refused_pipe = blend(pipe, members, HALVES)
    with pytest.raises(ValueError, match="needs its adapter"), refused_pipe:
        pass


def test_fused_and_cached_networks_are_refused(tmp_path):
    pipe, members, _ = with_members(tmp_path)
    pipe.unet.set_adapter("a")
    pipe.fuse_lora(adapter_names=["a"])
    with pytest.raises(ValueError, match="unfuse_lora"), blend(pipe, members, HALVES):
        pass
    pipe.unfuse_lora()
    members.remove()
    pipe.fuse_qkv_projections(vae=False)
    with pytest.raises(ValueError, match="unfuse_qkv"):
        load_members(pipe, {"a": tmp_path / "a.safetensors"})
    flux, members, _ = with_members(tmp_path / "flux", "flux")
    flux.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="disable_cache"), blend(flux, members, HALVES):
        pass


def test_a_soup_costs_one_evaluation_a_call_and_image(tmp_path):
    pipe, members, _ = with_members(tmp_path)
    with blend(pipe, members, HALVES, mode="soup") as knobs:
        for images in (2, 3):  # each run counts for itself
            call(pipe, steps=4, num_images_per_prompt=images, generator=[seeded(i) for i in range(images)])
            assert knobs.evaluations == 4 * images
