"""A base is told by its weights: what is put on it later, and where its weights lie, make no other base of it."""

from __future__ import annotations

import hashlib

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig
from torch import nn

from stablediffusion.pipelines.components import denoiser_of
from stablediffusion.pipelines.identity import base_identity, same_base
from stablediffusion.testing import tiny_pipeline


def image_prompt(unet):
    """Put a random IP-Adapter on a tiny UNet."""
    text, tensors = unet.config.cross_attention_dim, {}
    for k, _ in enumerate(n for n in unet.attn_processors if "attn2" in n):
        for half in ("k", "v"):
            tensors[f"{2 * k + 1}.to_{half}_ip.weight"] = torch.ones(16, text)
    projection = {"proj.weight": torch.ones(4 * text, 16), "proj.bias": torch.zeros(4 * text)}
    projection |= {"norm.weight": torch.ones(text), "norm.bias": torch.zeros(text)}
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": tensors}])


def joint(network):
    network.fuse_qkv_projections()


def apart(network):
    network.fuse_qkv_projections()
    network.unfuse_qkv_projections()


def adapters(network):
    network.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), adapter_name="a")


CHANGES = {
    "IP-Adapter": image_prompt,
    "adapters": adapters,
    "weights offloaded": lambda network: cpu_offload(network, execution_device=torch.device("cpu")),
    "channels last": lambda network: network.to(memory_format=torch.channels_last),
    "projections joint": joint,
    "projections apart again": apart,
    "FreeU": lambda network: network.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
    "bfloat16": lambda network: nn.Module.to(network, torch.bfloat16),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_put_on_a_base_makes_no_other_of_it(change):
    network = tiny_pipeline("sd15").unet
    before = base_identity(network)
    CHANGES[change](network)
    assert same_base(before, base_identity(network))
    assert not same_base(base_identity(tiny_pipeline("sd15", seed=1).unet), before)


def written_before(network):
    """Return the identity as it was first defined: of all entries of the state, by name."""
    found = []
    for name, dtype in (("float16", torch.float16), ("bfloat16", torch.bfloat16)):
        digest = hashlib.blake2b(digest_size=8)
        for key, value in sorted(network.state_dict().items()):
            digest.update(f"{key} {tuple(value.shape)};".encode())
            digest.update(value.to(dtype).contiguous().flatten().view(torch.uint8).numpy().tobytes())
        found.append(f"{name}:{digest.hexdigest()}")
    return " ".join(found)


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_identities_of_files_written_so_far_hold(family):
    """A UNet, and a transformer whose buffers count, joint projections and all."""
    network = denoiser_of(tiny_pipeline(family))[1]
    expected = written_before(network)
    assert base_identity(network) == expected
    apart(network)
    assert base_identity(torch.compile(network, backend="eager")) == expected != written_before(network)


def test_weights_that_are_others_now_are_told_in_a_sentence(tmp_path):
    network = tiny_pipeline("sd15").unet
    cast = tiny_pipeline("sd15").unet
    cast.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    disk = tiny_pipeline("sd15").unet
    cpu = torch.device("cpu")
    disk.enable_group_offload(cpu, offload_type="leaf_level", offload_to_disk_path=str(tmp_path))
    for given, message in ((network.to("meta"), "meta device"), (cast, "float8"), (disk, "on a disk")):
        with pytest.raises(ValueError, match=message):
            base_identity(given)
