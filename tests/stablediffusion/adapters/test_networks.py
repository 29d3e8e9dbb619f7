"""Whole networks as members: what the pipeline gives with that network in its own's place, or one sentence on entry."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload
from diffusers import hooks
from peft import LoraConfig
from torch import nn

from stablediffusion import blend, load_lora, load_members
from stablediffusion.adapters.networks import check_network
from stablediffusion.testing import tiny_call, tiny_lora, tiny_pipeline
from tests.stablediffusion.pipelines.test_identity import image_prompt


def tuned(**options):
    return tiny_pipeline("sd15", seed=5, **options).unet


def latents(pipe):
    call = tiny_call(pipe, 2) | {"output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    return pipe("a red circle", **call).images


def other_inputs():
    network = tuned()
    network.register_to_config(time_cond_proj_dim=4)
    return network


def dropping():
    network = tuned()
    next(part for part in network.modules() if isinstance(part, nn.Dropout)).p = 0.1
    return network.train()


NETWORKS = {
    "be a UNet2DConditionModel, got a FluxTransformer2DModel": lambda: tiny_pipeline("flux").transformer,
    "got time_cond_proj_dim 4 for None": other_inputs,
    "be in torch.float32, got torch.bfloat16": lambda: tuned(dtype=torch.bfloat16),
    "be on cpu, got meta": lambda: tuned().to("meta"),
    "be in evaluation mode": dropping,
}


@pytest.mark.parametrize("message", NETWORKS)
def test_a_network_that_cannot_stand_in_is_refused_where_members_are_loaded(message):
    with pytest.raises(ValueError, match=f"member 'a', a whole network, must .*{message}"):
        load_members(tiny_pipeline("sd15"), {"a": NETWORKS[message]()})


def acceleration(pipe):
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="fast")


def wide_attention(pipe):
    block = pipe.unet.mid_block
    block.attentions[0].register_forward_hook(lambda module, inputs, output: output)


ON_TOP = {
    "no IPAdapterAttnProcessor2_0": lambda pipe: image_prompt(pipe.unet),
    "no b1=1.2": lambda pipe: pipe.unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
    "no fast": acceleration,
    "no function in mid_block.attentions.0": wide_attention,
}


@pytest.mark.parametrize("message", ON_TOP)
def test_what_acts_on_the_pipelines_own_network_alone_is_refused(message):
    """Also where it came after the members; the same on both is right."""
    pipe, network = tiny_pipeline("sd15"), tuned()
    members = load_members(pipe, {"a": network})
    ON_TOP[message](pipe)
    with pytest.raises(ValueError, match=message), blend(pipe, members, {"a": 1.0}):
        pass
    twin = tiny_pipeline("sd15")
    twin.register_modules(unet=network)
    ON_TOP[message](twin)
    check_network(pipe, "a", network)


def test_a_member_gives_the_images_of_a_pipeline_with_it():
    """Its inside may differ: depth, another way to compute attention, its own adapters, where its weights lie."""
    alone, network = tiny_pipeline("sd15"), tuned()
    alone.register_modules(unet=network)
    network.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), adapter_name="own")
    network.set_attn_processor({n: type(p)() for n, p in network.attn_processors.items()})
    want = latents(alone)
    cpu_offload(network, execution_device=torch.device("cpu"))
    pipe = tiny_pipeline("sd15")
    with blend(pipe, load_members(pipe, {"a": network}), {"a": 1.0}):
        torch.testing.assert_close(latents(pipe), want, rtol=1e-5, atol=1e-5)


def test_members_beside_a_network_are_no_background(tmp_path):
    pipe = tiny_pipeline("sd15")
    load_lora(pipe, tiny_lora(pipe, tmp_path / "b.safetensors", seed=1), "b")
    pipe.set_adapters("b")
    members = load_members(pipe, {"a": tuned(), "b": None})
    assert members.on(pipe).adapters == ("b",)
    with pytest.raises(ValueError, match="no b"):
        members.chosen(["a"]).on(pipe)


def test_pipelines_where_one_network_is_not_the_whole_denoiser():
    wan, guided = tiny_pipeline("wan2.2"), tiny_pipeline("sd15-pag")
    with pytest.raises(ValueError, match="with transformer, transformer_2; give LoRA files"):
        load_members(wan, {"a": wan.transformer})
    with pytest.raises(ValueError, match="changes its denoiser's attention"):
        load_members(guided, {"a": tuned()})


def test_offloading_hooks_are_no_difference():
    pipe = tiny_pipeline("sd15")
    hooks.apply_group_offloading(pipe.unet, torch.device("cpu"), offload_type="leaf_level")
    check_network(pipe, "a", tuned())
    hooks.apply_layerwise_casting(pipe.unet, storage_dtype=torch.float16, compute_dtype=torch.float32)
    check_network(pipe, "a", tuned())
