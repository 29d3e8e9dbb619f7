"""Switching, soups and members side by side, against explicit weights."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

from sdeblend import Preference
from stablediffusion import blend, load_members
from stablediffusion.adapters.side_by_side import SideBySide
from stablediffusion.adapters.soups import delta_soup, factor_soup
from stablediffusion.testing import tiny_call, tiny_lora, tiny_pipeline
from tests.support import sd_reference as reference


def make(folder, ranks=(4, 4), scale=0.5):
    pipe = tiny_pipeline("sd15", seed=3, dtype=torch.float64)
    paths = {f"m{i}": folder / f"{i}.safetensors" for i in range(len(ranks))}
    for i, (path, rank) in enumerate(zip(paths.values(), ranks, strict=True)):
        tiny_lora(pipe, path, seed=i + 1, scale=scale, rank=rank, alpha=6)
    return pipe, paths


def inputs(rows=2):
    g = torch.Generator().manual_seed(0)
    x, text = (torch.randn(rows, *shape, generator=g, dtype=torch.float64) for shape in ((4, 8, 8), (7, 16)))
    return {"sample": x, "timestep": torch.tensor(500.0), "encoder_hidden_states": text}


def run(network, **call):
    with torch.no_grad():
        return network(**(call or inputs())).sample


def state(module):
    return [
        (list(m.active_adapters), m.disable_adapters, dict(m.scaling), sorted(m.lora_A), "forward" in m.__dict__)
        for m in module.modules()
        if isinstance(m, LoraLayer)
    ]


def test_switching_gives_each_member_and_the_base(tmp_path):
    pipe, paths = make(tmp_path)
    base = run(copy.deepcopy(pipe.unet))
    alone = {name: run(reference.fused(pipe.unet, path, "unet")) for name, path in paths.items()}
    members = load_members(pipe, paths)
    before = state(pipe.unet)
    grads = {name: p.requires_grad for name, p in pipe.unet.named_parameters()}
    with members.switch.borrowed() as switch:
        for name, expected in alone.items():
            switch.use(name)
            torch.testing.assert_close(run(pipe.unet), expected, rtol=1e-12, atol=1e-12)
            assert (run(pipe.unet) - base).norm() > 1e-3 * base.norm()
        switch.use()
        assert torch.equal(run(pipe.unet), base)
    assert state(pipe.unet) == before
    assert {name: p.requires_grad for name, p in pipe.unet.named_parameters()} == grads
    assert not any(grads.values())


def test_soups_average_deltas_or_factors(tmp_path):
    pipe, paths = make(tmp_path)
    weights = {"m0": 0.6, "m1": -0.3}
    exact = pipe.unet
    for name, path in paths.items():
        exact = reference.fused(exact, path, "unet", weights[name])
    exact_output, base = run(exact), copy.deepcopy(pipe.unet)
    members = load_members(pipe, paths)
    before = state(pipe.unet)
    with members.switch.borrowed() as switch:
        with delta_soup(switch, weights):
            torch.testing.assert_close(run(pipe.unet), exact_output, rtol=1e-12, atol=1e-12)
        with factor_soup(switch, weights):
            factors = run(pipe.unet)
        expected = copy.deepcopy(base)
        for name, layer in pipe.unet.named_modules():
            if isinstance(layer, LoraLayer):
                a = sum(c * layer.lora_A[n].weight for n, c in weights.items())
                b = sum(c * layer.scaling[n] * layer.lora_B[n].weight for n, c in weights.items())
                expected.get_submodule(name).weight.data += b @ a
        torch.testing.assert_close(factors, run(expected), rtol=1e-12, atol=1e-12)
        assert (factors - exact_output).norm() > 1e-4 * exact_output.norm()
    assert state(pipe.unet) == before


def test_soup_of_factors_needs_one_rank(tmp_path):
    pipe, paths = make(tmp_path, ranks=(4, 2))
    members = load_members(pipe, paths)
    before = state(pipe.unet)
    with members.switch.borrowed() as switch:
        with pytest.raises(ValueError, match="one rank"), factor_soup(switch, {"m0": 0.5, "m1": 0.5}):
            pass
        with delta_soup(switch, {"m0": 0.5, "m1": 0.5}):
            run(pipe.unet)
    assert state(pipe.unet) == before


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_side_by_side_equals_switching(tmp_path):
    """Ranks that differ, convolutions, the base among the members, and an adapter that belongs to the base."""
    pipe, paths = make(tmp_path, ranks=(4, 2))
    config = LoraConfig(r=2, target_modules=["conv1", "to_q"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name in ("conv", "background"):
            pipe.unet.add_adapter(config, adapter_name=name)
    pipe.unet.set_adapter("background")
    members = load_members(pipe, paths | {"conv": None})
    names: tuple[str | None, ...] = ("m0", None, "conv", "m1")
    call = inputs(2)
    with members.switch.borrowed() as switch:
        one_by_one = []
        for chosen in names:
            switch.use(*[n for n in (chosen,) if n is not None])
            one_by_one.append(run(pipe.unet, **call))
        switch.use()
        joined = {k: v if k == "timestep" else torch.cat([v] * len(names)) for k, v in call.items()}
        with SideBySide(switch).parts(names):
            together = run(pipe.unet, **joined)
    torch.testing.assert_close(together, torch.cat(one_by_one), rtol=1e-11, atol=1e-11)
    assert (one_by_one[1] - one_by_one[0]).norm() > 1e-3 * one_by_one[0].norm()
    with members.switch.borrowed():
        has = [layer for layer in members.switch.layers if "background" in layer.lora_A]
        assert has and all("background" in layer.active_adapters for layer in has)


def test_memory_is_base_plus_files(tmp_path):
    pipe, paths = make(tmp_path, ranks=(4, 2))
    size = sum(p.numel() for p in pipe.unet.parameters())
    lora = [sum(t.numel() for t in _tensors(path)) for path in paths.values()]
    members = load_members(pipe, paths)
    assert sum(p.numel() for p in pipe.unet.parameters()) == size + sum(lora)
    with blend(pipe, members, Preference({"m0": 0.5, "m1": 0.5})):
        pipe("a", generator=torch.Generator().manual_seed(0), **tiny_call(pipe, 2))
        assert sum(p.numel() for p in pipe.unet.parameters()) == size + sum(lora)


def _tensors(path):
    from stablediffusion import read_lora

    return read_lora(path).tensors.values()


def test_members_can_be_whole_networks(tmp_path):
    pipe, paths = make(tmp_path, ranks=(4,))
    whole = reference.fused(pipe.unet, paths["m0"], "unet")
    images = []
    for sources in ({"m0": paths["m0"]}, {"m0": whole}):
        members = load_members(pipe, sources)
        with blend(pipe, members, Preference({"m0": 0.7}), correct=None):
            call = tiny_call(pipe, 3)
            images.append(pipe("a", generator=torch.Generator().manual_seed(0), eta=1.0, **call).images)
        members.remove()
    assert abs(images[0] - images[1]).max() < 1e-6
    assert not any(isinstance(m, LoraLayer) for m in pipe.unet.modules())


def test_a_network_compiled_in_place_is_refused(tmp_path):
    """``pipe.unet.compile()`` would keep running the forward it has traced."""
    pipe, paths = make(tmp_path, ranks=(4,))
    members = load_members(pipe, paths)
    pipe.unet.compile(backend="eager")
    with pytest.raises(ValueError, match="compiled in place"), blend(pipe, members, {"m0": 1.0}):
        pass
