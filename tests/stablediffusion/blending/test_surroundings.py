"""What happens around a blend: other pipelines on its networks, wrappers, side by side, numbers that cannot exist."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import diffusers
import pytest
import torch
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode

import stablediffusion
from stablediffusion import load_members
from stablediffusion.blending.denoiser import Denoiser
from stablediffusion.pipelines.components import denoiser_of
from stablediffusion.testing import tiny_call, tiny_image, tiny_lora, tiny_pipeline

blend: Any = stablediffusion.blend
HALVES = {"a": 0.5, "b": 0.5}


def images(pipe, steps=3, **options):
    call = tiny_call(pipe, steps) | {"output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    return pipe("a red circle", **(call | options))[0]


def make(folder, family="sd15", scale=0.3, **options):
    pipe = tiny_pipeline(family, **options)
    files = {n: tiny_lora(pipe, folder / f"{n}.safetensors", seed=k + 1, scale=scale) for k, n in enumerate("ab")}
    return pipe, load_members(pipe, files)


def far(one, other):
    return float((one - other).norm() / other.norm())


def test_a_second_pipeline_over_the_same_networks(tmp_path):
    """Each run has its own scheduler, images and certificate, whichever pipeline takes it."""
    pipe, members = make(tmp_path)
    second = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    second.set_progress_bar_config(disable=True)
    second.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    start = {"image": tiny_image(), "strength": 1.0}
    expected = {}
    for which, options in ((pipe, {"eta": 1.0}), (second, start)):
        with blend(which, members, HALVES) as knobs:
            expected[which] = images(which, num_images_per_prompt=2, **options), knobs.nats
    with blend(pipe, members, HALVES) as knobs:
        for which, options in ((pipe, {"eta": 1.0}), (second, start), (pipe, {"eta": 1.0})):
            got = images(which, num_images_per_prompt=2, **options)
            assert torch.equal(got, expected[which][0])
            torch.testing.assert_close(knobs.nats, expected[which][1])
    assert far(expected[pipe][0], expected[second][0]) > 0.1
    with blend(pipe, members, HALVES, mode="ls") as knobs:
        images(pipe, num_images_per_prompt=4, generator=[torch.Generator().manual_seed(i) for i in range(4)])
        images(second, num_images_per_prompt=2, **start)
        assert knobs.evaluations == 2 * 3  # two images, though the first pipeline prepared four


class Wrapped(torch.nn.Module):
    """Hands everything on, as wrappers of networks do."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("network"), name)

    def forward(self, *args, **kwargs):
        return self.network(*args, **kwargs)


@pytest.mark.parametrize("mode", ["mpa", "ls"])
def test_a_wrapped_denoiser(mode, tmp_path):
    pipe, members = make(tmp_path)
    several = {"num_images_per_prompt": 3, "generator": [torch.Generator().manual_seed(i) for i in range(3)]}
    with blend(pipe, members, HALVES, mode=mode):
        expected = images(pipe, **several)
    several["generator"] = [torch.Generator().manual_seed(i) for i in range(3)]
    pipe.unet = Wrapped(pipe.unet)
    with blend(pipe, members, HALVES, mode=mode):
        torch.testing.assert_close(images(pipe, **several), expected, rtol=1e-4, atol=1e-4)


def test_a_denoiser_that_never_comes_through_is_told(tmp_path):
    pipe, members = make(tmp_path)
    with pytest.raises(ValueError, match="never used") as error, blend(pipe, members, HALVES):
        images(tiny_pipeline())  # another one
    assert "\n" not in str(error.value)


def test_a_second_denoiser_that_is_exchanged_is_told(tmp_path):
    """Wan 2.2 has one for low noise levels; a copy of it would run unblended."""
    pipe, members = make(tmp_path, "wan2.2", scale=1.0)
    with blend(pipe, members, HALVES):
        expected = images(pipe)
    low, other = pipe.transformer_2, copy.deepcopy(pipe.transformer_2)
    with pytest.raises(ValueError, match="call of its transformer_2 came through"), blend(pipe, members, HALVES):
        pipe.transformer_2 = other
        wrong = images(pipe)
    assert far(wrong, expected) > 1e-3
    pipe.transformer_2 = low
    with blend(pipe, members, HALVES):
        assert torch.equal(images(pipe), expected)


@pytest.mark.parametrize(("family", "keyword"), [("sd15", "cross"), ("sdxl", "cross"), ("sd3", "joint")])
def test_side_by_side_equals_one_after_the_other(family, keyword, tmp_path, recwarn):
    """Under a call's own scale, changed weights of adapters, and another kind of adapter in the background."""
    pipe, members = make(tmp_path, family, scale=1.0)
    network = denoiser_of(pipe)[1]
    scale, found = {f"{keyword}_attention_kwargs": {"scale": 0.3}}, {}
    for batched in (False, True):
        with blend(pipe, members, HALVES, batched=batched):
            found["plain", batched] = images(pipe, 2)
            found["scale", batched] = images(pipe, 2, **scale)
            pipe.set_adapters(["a", "b"], [0.4, 0.4])
            found["weights", batched] = images(pipe, 2)
        pipe.set_adapters(["a", "b"], [1.0, 1.0])
    pipe.disable_lora()
    torch.manual_seed(0)
    config = LoraConfig(r=4, use_dora=True, target_modules=["to_q", "to_k"], init_lora_weights=False)
    network.add_adapter(config, adapter_name="style")
    for name, value in network.named_parameters():
        if "magnitude" in name:
            value.data *= 1 + torch.rand_like(value)
    pipe.enable_lora()
    pipe.set_adapters("style")
    network.eval()
    for batched in (False, True):
        with blend(pipe, members, HALVES, batched=batched):
            found["background", batched] = images(pipe, 2)
    for what in ("plain", "scale", "weights", "background"):
        assert far(found[what, True], found[what, False]) < 1e-4
        assert what == "plain" or far(found[what, False], found["plain", False]) > 1e-3
    assert not [w for w in recwarn if "one after the other" in str(w.message)]


def test_side_by_side_falls_back_where_rows_are_tied(tmp_path):
    """Perturbed attention splits the batch, so more rows mean something else to it; a run without it has as many."""
    pipe, members = make(tmp_path, "sd15-pag", scale=1.0)
    runs = [{"guidance_scale": g, "pag_scale": p} for g, p in ((5.0, 0.0), (1.0, 3.0), (5.0, 3.0), (5.0, 0.0))]
    with blend(pipe, members, HALVES, batched=False):
        expected = [images(pipe, **options) for options in runs]
    with blend(pipe, members, HALVES, batched=True), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for options, wanted in zip(runs, expected, strict=True):
            before = len(told)
            assert far(images(pipe, **options), wanted) < 1e-4
            ties = [w for w in told[before:] if "ties the rows" in str(w.message)]
            assert len(ties) == (options["pag_scale"] > 0)


def test_networks_that_change_inside_the_block_are_told(tmp_path):
    pipe, members = make(tmp_path)
    style = tiny_lora(tiny_pipeline("sd15"), tmp_path / "style.safetensors", seed=9)

    def told(message, change, undo):
        with pytest.raises(ValueError, match=message), blend(pipe, members, HALVES):
            images(pipe)
            change()
            images(pipe)
        undo()

    told(
        "adapters that were there when it was attached, a, b, got a, b, style",
        lambda: load_members(pipe, {"style": style}),
        lambda: pipe.delete_adapters("style"),
    )
    told("unfuse_lora", lambda: pipe.fuse_lora(adapter_names=["a"]), pipe.unfuse_lora)
    with blend(pipe, members, HALVES) as knobs:
        expected = images(pipe)
        pipe.disable_lora()
        assert torch.equal(images(pipe), expected)  # the blend says which adapters are active
        assert knobs.calls == 6


def test_rows_that_are_tied_are_taken_out_of_the_whole_pass(tmp_path):
    """HiDream has embeddings with the rows behind the layers: two images with a member each need whole passes."""
    pipe, members = make(tmp_path, "hidream", scale=1.0)
    two = {"num_images_per_prompt": 2, "generator": [torch.Generator().manual_seed(i) for i in range(2)]}
    with blend(pipe, members, {"a": 0.4, "b": 0.4}, mode="ls", seed=1) as knobs:
        with pytest.warns(UserWarning, match="cost a whole batch"):
            together = images(pipe, **two)
        assert bool((knobs._engine.run.serving[:, 0] != knobs._engine.run.serving[:, 1]).any())
    with blend(pipe, members, {"a": 0.4, "b": 0.4}, mode="ls", seed=1):
        alone = images(pipe, generator=torch.Generator().manual_seed(0))
    assert far(together[:1], alone) < 1e-4


def test_a_loop_that_takes_no_step_keeps_nothing(tmp_path):
    """The passes of a step wait for it; without one they would pile up."""
    pipe, members = make(tmp_path)
    x, text = torch.zeros(1, 4, 8, 8), torch.zeros(1, 77, 16)
    with blend(pipe, members, HALVES) as knobs, torch.no_grad():
        for t in range(20):
            pipe.unet(x, t, text)
            assert len(knobs._engine.run.passes) <= 16
        assert "takes no step" in knobs.reason and knobs.certificates == []


def test_a_row_may_be_asked_for_twice(tmp_path):
    """Candidates of one image are rows of it, of a part of the batch or, where rows are tied, of whole passes."""
    pipe, members = make(tmp_path, scale=1.0)
    network = denoiser_of(pipe)[1]
    denoiser = Denoiser(network.forward, network, members)
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(2, 77, 16, generator=generator)
    x, t = torch.randn(5, 1, 4, 8, 8, generator=generator), torch.tensor(500.0)
    index = torch.tensor([1, 0, 1, 1, 0])
    with members.switch.borrowed(), torch.no_grad():
        stack = denoiser.bind((torch.zeros(2, 4, 8, 8), t, text), {"return_dict": False}, 2)
        expected = denoiser.bind((x[:, 0], t, text[index]), {"return_dict": False})(x, t)
        for tied in (False, True):
            torch.testing.assert_close(stack.rows(index)(x, t), expected, rtol=1e-4, atol=1e-4)
            assert list(denoiser._known.values()) == [not tied]
            denoiser._known = dict.fromkeys(denoiser._known, False)


def test_a_preference_changed_during_a_run_has_no_certificate(tmp_path):
    pipe, members = make(tmp_path)

    def change(to):
        def callback(pipe, step, timestep, values):
            if step == 0:
                knobs.preference = to
            return values

        return {"callback_on_step_end": callback, "eta": 1.0, "num_images_per_prompt": 2}

    with blend(pipe, members, {"a": 1.0}) as knobs:
        images(pipe, **change({"b": 1.0}))
        assert knobs.certificate is None and "changed during the run" in knobs.reason
        images(pipe, eta=1.0)
        assert knobs.certificate is not None  # the next run has one again
        images(pipe, **change({"b": 1.0}))  # to what it is already
        assert knobs.certificate is not None
    with (
        pytest.raises(ValueError, match="changed during the run"),
        blend(pipe, members, {"a": 1.0}, correct="resample") as knobs,
    ):
        images(pipe, **change({"b": 1.0}))


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


@pytest.mark.parametrize(
    ("family", "scheduler", "settings"),
    [
        ("sd21", "DDIMScheduler", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
        ("sdxl", "EDMEulerScheduler", {}),
        ("sd3", "DPMSolverMultistepScheduler", FLOW),
        ("flux", "UniPCMultistepScheduler", FLOW),
    ],
)
def test_no_certificate_is_no_reason_to_stop(family, scheduler, settings, tmp_path):
    pipe, members = make(tmp_path, family)
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config, **settings)
    with blend(pipe, members, HALVES, correct=None):
        want = images(pipe)
    with blend(pipe, members, HALVES) as knobs:
        assert torch.equal(images(pipe), want)
        assert knobs.certificate is None and knobs.certificates == [] and knobs.nats is None
        assert knobs.reason and "\n" not in knobs.reason
    with pytest.raises(ValueError, match="resampl"), blend(pipe, members, HALVES, correct="resample"):
        images(pipe)


class NoDouble(TorchDispatchMode):
    """Refuse float64 to float32 tensors that stay on their device, as Apple's does."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        double = kwargs.get("dtype") == torch.float64 and kwargs.get("device") is None
        if function is torch.ops.aten._to_copy.default and double and args[0].numel() > 64:
            raise TypeError("this device has no float64")
        return function(*args, **kwargs)


def test_a_device_without_float64(tmp_path):
    pipe, members = make(tmp_path)
    with NoDouble(), pytest.raises(TypeError):
        torch.zeros(65).double()  # the control
    with blend(pipe, members, HALVES) as knobs, NoDouble():
        images(pipe, eta=1.0, num_images_per_prompt=2)
        assert knobs.certificate is not None


@pytest.mark.parametrize("guidance", [7.5, 20.0])
def test_half_precision_has_the_certificate_of_float32(guidance, tmp_path):
    values = {}
    for dtype in (torch.float32, torch.bfloat16):
        pipe, members = make(tmp_path, dtype=dtype)
        with blend(pipe, members, HALVES) as knobs:
            images(pipe, 6, eta=1.0, num_images_per_prompt=4, guidance_scale=guidance)
            values[dtype] = knobs.certificate.value
    assert values[torch.bfloat16] == pytest.approx(values[torch.float32], rel=0.25)
