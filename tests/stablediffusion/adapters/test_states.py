"""States of a network in which adapters are switched: dropout of training, caches, joint projections."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from diffusers import FluxTransformer2DModel
from diffusers import hooks as caches
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict

from stablediffusion import blend, load_members
from stablediffusion.adapters.switch import AdapterSwitch, check_unfused
from stablediffusion.pipelines.components import denoiser_of
from stablediffusion.testing import tiny_call, tiny_lora, tiny_pipeline
from stablediffusion.testing.networks import seeded


def latents(pipe):
    call = tiny_call(pipe, 2) | {"output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    return pipe("a red circle", **call).images


def trained_with_dropout(family):
    pipe = tiny_pipeline(family)
    name, network = denoiser_of(pipe)
    config = LoraConfig(r=4, lora_dropout=0.1, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    with seeded(1):
        network.add_adapter(config, adapter_name="a")
    return pipe, name, network


@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_dropout_of_training_is_off_once_a_file_is_loaded(family, tmp_path):
    pipe, name, network = trained_with_dropout(family)
    factors, about = get_peft_model_state_dict(network, adapter_name="a"), network.peft_config["a"].to_dict()
    given = {f"{name}_lora_layers": factors, f"{name}_lora_adapter_metadata": about}
    type(pipe).save_lora_weights(tmp_path, **given)
    want = latents(reference(pipe))
    fresh = tiny_pipeline(family)
    members = load_members(fresh, {"a": tmp_path})
    with blend(fresh, members, {"a": 1.0}):
        torch.testing.assert_close(latents(fresh), want, rtol=1e-5, atol=1e-5)
    fresh.set_adapters("a")
    torch.testing.assert_close(latents(fresh), want, rtol=1e-5, atol=1e-5)


def reference(pipe):
    denoiser_of(pipe)[1].eval()
    return pipe


def test_dropout_is_off_inside_a_blend_alone_where_training_goes_on():
    pipe, _, network = trained_with_dropout("sd15")
    want = latents(reference(pipe))
    network.train()
    before = {name: part.training for name, part in network.named_modules()}
    members = load_members(pipe, {"a": None})
    with blend(pipe, members, {"a": 1.0}):
        torch.testing.assert_close(latents(pipe), want, rtol=1e-5, atol=1e-5)
    assert {name: part.training for name, part in network.named_modules()} == before
    pipe.set_adapters("a")
    assert (latents(pipe) - want).norm() > 1e-3 * want.norm()  # the control: dropout is on again


def flux_transformer():
    with seeded(0):
        return FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            axes_dims_rope=(4, 4, 8),
        )


BROADCAST = caches.PyramidAttentionBroadcastConfig(
    spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
)
CACHES = {
    "enable_cache": lambda network: network.enable_cache(BROADCAST),
    "pyramid": lambda network: caches.apply_pyramid_attention_broadcast(network, BROADCAST),
    "taylor": lambda network: caches.apply_taylorseer_cache(network, caches.TaylorSeerCacheConfig(cache_interval=3)),
    "first block": lambda network: caches.apply_first_block_cache(network, caches.FirstBlockCacheConfig(0.1)),
    "magnitudes": lambda network: caches.apply_mag_cache(
        network, caches.MagCacheConfig(num_inference_steps=4, mag_ratios=[1.0] * 4)
    ),
    "faster": lambda network: caches.apply_faster_cache(
        network,
        caches.FasterCacheConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500, is_guidance_distilled=True
        ),
    ),
    "a function of one's own": lambda network: network.transformer_blocks[0].__dict__.update(forward=lambda *a, **k: a),
}


@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_is_seen_however_it_was_set(cache):
    network = flux_transformer()
    check_unfused(network, [network])
    CACHES[cache](network)
    with pytest.raises(ValueError, match=r"every member computed, got .*cache|every member computed, got a forward"):
        check_unfused(network, [network])


def test_what_keeps_nothing_between_passes_is_no_cache():
    """Layers skipped, offloading on and off again, and the forward of the whole network, which others may wrap."""
    network = flux_transformer()
    caches.apply_layer_skip(network, caches.LayerSkipConfig(indices=[0], fqn="transformer_blocks"))
    cpu_offload(network, execution_device=torch.device("cpu"))
    check_unfused(network, [network])
    remove_hook_from_module(network, recurse=True)
    network.forward = lambda *args, **kwargs: args
    check_unfused(network, [network])


@pytest.mark.parametrize("family", ["sd15", "sd3", "flux"])
def test_joint_projections_are_refused_until_they_are_apart(family, tmp_path):
    pipe = tiny_pipeline(family)
    network = denoiser_of(pipe)[1]
    members = load_members(pipe, {"a": tiny_lora(pipe, tmp_path / "a.safetensors", seed=1)})
    pipe.set_adapters("a")
    want = latents(pipe)
    network.fuse_qkv_projections()
    with pytest.raises(ValueError, match="unfuse_qkv_projections"), blend(pipe, members, {"a": 1.0}):
        pass
    network.unfuse_qkv_projections()
    with blend(pipe, members, {"a": 1.0}):
        torch.testing.assert_close(latents(pipe), want, rtol=1e-5, atol=1e-5)


def test_what_a_switch_lends_comes_back_after_an_error():
    network = trained_with_dropout("sd15")[2].train()
    switch = AdapterSwitch([network], ["a"])
    with pytest.raises(RuntimeError, match="inside"), switch.borrowed():
        assert not any(layer.lora_dropout["a"].training for layer in switch.layers)
        raise RuntimeError("inside")
    assert all(layer.lora_dropout["a"].training for layer in switch.layers if isinstance(layer, LoraLayer))


def test_a_member_loads_on_a_network_offloaded_from_layer_to_layer(tmp_path):
    """Its weights are on the meta device between passes; what needs the factors themselves is a sentence."""
    pipe = tiny_pipeline("sd15")
    path = tiny_lora(pipe, tmp_path / "a.safetensors", seed=1)
    load_members(pipe, {"a": path})
    pipe.set_adapters("a")
    want = latents(pipe)
    pipe = tiny_pipeline("sd15")
    cpu_offload(pipe.unet, execution_device=torch.device("cpu"))
    members = load_members(pipe, {"a": path})
    assert next(pipe.unet.parameters()).device.type == "meta"
    with blend(pipe, members, {"a": 1.0}):
        torch.testing.assert_close(latents(pipe), want, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="factors at hand"), blend(pipe, members, {"a": 1.0}, mode="soup-factors"):
        latents(pipe)
