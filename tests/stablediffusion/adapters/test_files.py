"""LoRA files: every layout arrives, with its alpha, or the load fails; tiny pipelines are deterministic."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.lora import LoraLayer

from stablediffusion import convert_lora, load_lora, read_lora, save_lora
from stablediffusion.adapters.loading import remove_adapter
from stablediffusion.pipelines.components import lora_components
from stablediffusion.testing import FAMILIES, tiny_call, tiny_lora, tiny_pipeline


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def layers(pipe, adapter):
    modules = lora_components(pipe).values()
    return [m for part in modules for m in part.modules() if isinstance(m, LoraLayer) and adapter in m.lora_A]


@pytest.mark.rng_untouched
@pytest.mark.parametrize("family, task", [(family, task) for family in FAMILIES for task in FAMILIES[family].tasks])
def test_tiny_pipelines_run_and_repeat(family, task):
    found = []
    for seed in (0, 0, 1):
        pipe = tiny_pipeline(family, task, seed=seed)
        call = tiny_call(pipe, 2)
        if family == "flux" and task == "img2img":
            call |= {"height": 16, "width": 16}
        run = pipe(prompt="a red circle", generator=torch.Generator().manual_seed(0), **call)
        found.append(run.images if hasattr(run, "images") else run.frames)
    assert (found[0] == found[1]).all()
    assert (found[0] != found[2]).any()


def test_a_task_that_a_family_lacks_is_refused():
    with pytest.raises(ValueError, match="has no task"):
        tiny_pipeline("sd3", "controlnet")


WITH_CLIP = ("sd15", "sdxl", "sd3", "flux")


@pytest.mark.parametrize(
    "family, target",
    [*((family, "denoiser") for family in FAMILIES), *((family, "text-encoder") for family in WITH_CLIP)],
)
def test_round_trip_keeps_factors_and_alpha(family, target, tmp_path):
    pipe = tiny_pipeline(family)
    before = {name: weights(module) for name, module in lora_components(pipe).items()}
    path = tiny_lora(pipe, tmp_path / "a.safetensors", seed=1, rank=2, alpha=6, target=target)
    after = {name: weights(module) for name, module in lora_components(pipe).items()}
    for name, values in before.items():
        assert values.keys() == after[name].keys()
    where = load_lora(pipe, path, "a")
    assert all(part.startswith("text" if target == "text-encoder" else ("unet", "transformer")) for part in where)
    assert all(layer.scaling["a"] == 3.0 for layer in layers(pipe, "a"))
    again = save_lora(pipe, tmp_path / "b.safetensors", "a")
    first, second = read_lora(path), read_lora(again)
    assert first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(first.tensors[key], second.tensors[key]) for key in first.tensors)
    # transformers reports every base weight as newly initialised: none is
    for name, values in before.items():
        loaded = lora_components(pipe)[name].state_dict()
        for key, value in values.items():
            stem, _, leaf = key.rpartition(".")
            assert torch.equal(value, loaded[key if key in loaded else f"{stem}.base_layer.{leaf}"])
    remove_adapter(pipe, "a")
    for name, values in before.items():
        assert lora_components(pipe)[name].state_dict().keys() == values.keys()


def test_files_without_component_names_load(tmp_path):
    """As ``unet.save_lora_adapter`` writes them; diffusers loads nothing from these, silently."""
    pipe = tiny_pipeline("sd15")
    load_lora(pipe, tiny_lora(pipe, tmp_path / "a.safetensors", seed=1, rank=2, alpha=6), "a")
    pipe.unet.save_lora_adapter(tmp_path / "plain", adapter_name="a")
    assert load_lora(pipe, tmp_path / "plain", "again") == ("unet",)
    for layer in layers(pipe, "a"):
        assert layer.scaling["again"] == 3.0
        assert torch.equal(layer.lora_B["a"].weight, layer.lora_B["again"].weight)


def test_legacy_pickles_load_and_convert(tmp_path):
    pipe = tiny_pipeline("sd15")
    legacy = {}
    for key, value in read_lora(tiny_lora(pipe, tmp_path / "a.safetensors", seed=1)).tensors.items():
        part, leaf = key.removeprefix("unet.").split(".lora", 1)
        stem, name = part.removesuffix(".0").rsplit(".", 1)
        factor = "down" if "A" in leaf or "down" in leaf else "up"
        legacy[f"{stem}.processor.{name}_lora.{factor}.weight"] = value
    torch.save(legacy, tmp_path / "pytorch_lora_weights.bin")
    load_lora(pipe, tmp_path / "pytorch_lora_weights.bin", "old")
    load_lora(pipe, tmp_path / "a.safetensors", "new")
    assert all(torch.equal(x.lora_A["old"].weight, x.lora_A["new"].weight) for x in layers(pipe, "new"))
    path = convert_lora(tmp_path / "pytorch_lora_weights.bin", tmp_path / "converted" / "c.safetensors")
    assert load_lora(pipe, path, "converted") == ("unet",)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Harm:
        def __reduce__(self):
            return (print, ("this must not run",))

    torch.save({"unet.x.lora_A.weight": Harm()}, tmp_path / "x.bin")
    with pytest.raises(ValueError, match="tensors only"):
        read_lora(tmp_path / "x.bin")


def test_what_cannot_load_is_refused_and_leaves_nothing(tmp_path):
    pipe, other = tiny_pipeline("sd15"), tiny_pipeline("sdxl")
    path = tiny_lora(pipe, tmp_path / "a.safetensors", seed=1)
    clean = set(pipe.unet.state_dict())
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(path.read_bytes()[:100])
    partial = dict(read_lora(path).tensors)
    partial["unet.nowhere.lora_A.weight"] = torch.ones(4, 8)
    cases = [
        (path, "a.b", "without"),
        (tmp_path / "none.safetensors", "a", "does not exist"),
        ({"unet.conv_in.weight": torch.ones(1)}, "a", "contain 'lora'"),
        (partial, "a", "without their partner"),
        (damaged, "a", "whole safetensors file"),
        (tiny_lora(other, tmp_path / "x" / "xl.safetensors", seed=1, target="text-encoder"), "a", "must address"),
    ]
    sizes = dict(read_lora(tiny_lora(other, tmp_path / "x" / "unet.safetensors", seed=1)).tensors)
    cases.append((sizes, "a", "must fit|must load whole"))
    for source, name, message in cases:
        with pytest.raises(ValueError, match=message):
            load_lora(pipe, source, name)
        assert set(pipe.unet.state_dict()) == clean
    load_lora(pipe, path, "a")
    # also where another adapter is loaded, which diffusers' own clean-up would activate
    for layer in layers(pipe, "a"):
        layer.set_adapter([])
    with pytest.raises(ValueError, match=r"must fit|must load whole"):
        load_lora(pipe, sizes, "b")
    assert not any(layer.active_adapters for layer in layers(pipe, "a"))
    with pytest.raises(ValueError, match="must be new"):
        load_lora(pipe, path, "a")
    with pytest.raises(ValueError, match="loaded are a"):
        save_lora(pipe, tmp_path / "b.safetensors", "b")
    with pytest.raises(ValueError, match="safetensors"):
        save_lora(pipe, tmp_path / "b.bin", "a")
    folder = tmp_path / "two"
    folder.mkdir()
    for name in ("x", "y"):
        (folder / f"{name}.safetensors").write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="one LoRA file"):
        read_lora(folder)


def test_another_seed_gives_another_file(tmp_path):
    """The control of the comparisons above."""
    pipe = tiny_pipeline("sd15")
    first, second = (read_lora(tiny_lora(pipe, tmp_path / f"{s}.safetensors", seed=s)).tensors for s in (1, 2))
    assert not any(torch.equal(first[key], second[key]) for key in first)
