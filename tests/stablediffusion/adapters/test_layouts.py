"""Files of every layout: each layer changes by what the file says of it, no more and no less, or one sentence."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from stablediffusion import load_lora, load_members, save_lora
from stablediffusion.adapters.conversion import converted
from stablediffusion.adapters.files import LoraFile
from stablediffusion.adapters.layouts import changes_of
from stablediffusion.pipelines.components import denoiser_of, lora_components
from stablediffusion.testing import tiny_pipeline
from stablediffusion.testing.networks import seeded


def layers(network, ends):
    return {name: layer for name, layer in network.named_modules() if name.endswith(ends) and hasattr(layer, "weight")}


def pairs(found, generator=None):
    """Return name -> (A, B, alpha), rank and alpha of each layer its own."""
    generator = generator or torch.Generator().manual_seed(1)
    made = {}
    for k, (name, layer) in enumerate(found.items()):
        rank, weight = 1 + k % 4, layer.weight
        down = torch.randn(rank, *weight.shape[1:], generator=generator)
        up = torch.randn(len(weight), rank, *[1] * (weight.ndim - 2), generator=generator)
        made[name] = (down, up, 0.5 + k % 3)
    return made


def kohya(made, prefix, rename=lambda name: name.replace(".", "_")):
    tensors = {}
    for name, (down, up, alpha) in made.items():
        key = prefix + rename(name)
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(alpha)}
    return tensors


def product(up, down):
    return (up.flatten(1) @ down.flatten(1)).reshape(len(up), *down.shape[1:])


def expected(made):
    return {name: alpha / len(down) * product(up, down) for name, (down, up, alpha) in made.items()}


def deltas(network, adapter="a"):
    """Return what an adapter adds to each weight; for DoRA it is no sum, see below."""
    carried = {name: layer for name, layer in network.named_modules() if isinstance(layer, LoraLayer)}
    return {
        name: layer.scaling[adapter] * product(layer.lora_B[adapter].weight, layer.lora_A[adapter].weight)
        for name, layer in carried.items()
        if adapter in layer.lora_A
    }


def same(found, want):
    assert found.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def test_kohya_layers_have_alphas_of_their_own():
    """Convolutions (LoCon), attention and a text encoder in one file."""
    pipe = tiny_pipeline("sd15")
    unet = pairs(layers(pipe.unet, (*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "conv1", "time_emb_proj")))
    text = pairs(layers(pipe.text_encoder, ("q_proj", "fc1")))
    load_lora(pipe, kohya(unet, "lora_unet_") | kohya(text, "lora_te_"), "a")
    same(deltas(pipe.unet), expected(unet))
    same(deltas(pipe.text_encoder), expected(text))
    pipe.set_adapters("a", 0.5)  # from where peft's own scaling starts
    same(deltas(pipe.unet), {name: value / 2 for name, value in expected(unet).items()})


def test_what_was_loaded_can_be_saved_and_loaded_again(tmp_path):
    pipe = tiny_pipeline("sd15")
    unet = pairs(layers(pipe.unet, ATTENTION))
    load_lora(pipe, kohya(unet, "lora_unet_"), "a")
    load_lora(pipe, save_lora(pipe, tmp_path / "again.safetensors", "a"), "b")
    same(deltas(pipe.unet, "b"), expected(unet))


def test_blocks_as_sgm_names_them():
    pipe = tiny_pipeline("sdxl")
    made = pairs(layers(pipe.unet, "attn1.to_q"))

    def rename(name):
        name = name.replace("down_blocks.1.attentions.0", "input_blocks.3.1")
        name = name.replace("mid_block.attentions.0", "middle_block.1")
        for k in range(2):
            name = name.replace(f"up_blocks.0.attentions.{k}", f"output_blocks.{k}.1")
        return name.replace(".", "_")

    load_lora(pipe, kohya(made, "lora_unet_", rename), "a")
    same(deltas(pipe.unet), expected(made))


@pytest.mark.parametrize("family", ["sd15", "flux", "wan2.1"])
@pytest.mark.parametrize("shortened", [False, True])
def test_folders_of_peft(family, shortened, tmp_path):
    pipe = tiny_pipeline(family)
    name, network = denoiser_of(pipe)
    patterns = {"rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_v": 3.0}, "use_rslora": shortened}
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False, **patterns)
    with seeded(3):
        wrapped = get_peft_model(copy.deepcopy(network), config)
    wrapped.save_pretrained(tmp_path)
    if shortened:
        file = tmp_path / "adapter_model.safetensors"
        save_file({k.removeprefix("base_model.model."): t for k, t in load_file(file).items()}, file)
    assert load_lora(pipe, tmp_path, "a") == (name,)
    want = deltas(wrapped.base_model.model, "default")
    assert len({round(layer.scaling["a"], 4) for layer in network.modules() if isinstance(layer, LoraLayer)}) == 3
    same(deltas(network), want)


def test_a_folder_of_peft_needs_its_configuration(tmp_path):
    save_file({"down_blocks.0.to_q.lora_A.weight": torch.ones(1, 1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"needs a readable adapter_config.json"):
        load_lora(tiny_pipeline("sd15"), tmp_path, "a")


def test_a_configuration_for_one_component_leaves_the_other_at_full_strength(tmp_path):
    pipe = tiny_pipeline("sd15")
    made = {"unet": pairs(layers(pipe.unet, "to_q")), "text_encoder": pairs(layers(pipe.text_encoder, "q_proj"))}
    tensors = {
        f"{component}.{name}.lora_{factor}.weight": value
        for component, found in made.items()
        for name, (down, up, _) in found.items()
        for factor, value in (("A", down), ("B", up))
    }
    config = {"unet.r": 4, "unet.lora_alpha": 2, "unet.rank_pattern": {"to_q": 3}, "unet.of_another_version": 1}
    load_lora(pipe, LoraFile(tensors, config), "a")
    half = {name: (down, up, 2) for name, (down, up, _) in made["unet"].items()}
    full = {name: (down, up, len(down)) for name, (down, up, _) in made["text_encoder"].items()}
    same(deltas(pipe.unet), expected(half))
    same(deltas(pipe.text_encoder), expected(full))


@pytest.mark.parametrize("sparse", [False, True])
def test_joint_projections_of_flux_come_apart(sparse):
    """kohya trains q, k and v as one layer; its B may be block-diagonal, and then each has a third of the rank."""
    pipe, made, want = tiny_pipeline("flux"), {}, {}
    generator = torch.Generator().manual_seed(1)
    for kind, target in (("img_attn_qkv", "attn.to_"), ("txt_attn_qkv", "attn.add_")):
        down, up = torch.randn(6, 32, generator=generator), torch.randn(96, 6, generator=generator)
        if sparse:
            up = up * torch.block_diag(*[torch.ones(32, 2)] * 3)
        made[f"double_blocks_0_{kind}"] = (down, up, 1.5)
        for part, rows in zip("qkv", up.split(32), strict=True):
            end = "" if target.endswith("to_") else "_proj"
            want[f"transformer_blocks.0.{target}{part}{end}"] = 1.5 / 6 * rows @ down
    load_lora(pipe, kohya(made, "lora_unet_"), "a")
    same(deltas(pipe.transformer), want)


def test_names_of_other_trainers():
    flux, qwen = tiny_pipeline("flux"), tiny_pipeline("qwen-image")
    made = pairs(layers(flux.transformer, ATTENTION))
    load_lora(flux, kohya(made, "lora_transformer_"), "a")
    same(deltas(flux.transformer), expected(made))
    made = pairs(layers(qwen.transformer, ATTENTION))
    load_lora(qwen, kohya(made, "diffusion_model.", str), "a")
    same(deltas(qwen.transformer), expected(made))


def test_each_of_two_denoisers_has_a_file():
    """Names that do not say whose they are need a place; names with a component go there."""
    pipe = tiny_pipeline("wan2.2")
    high, low = (pairs(layers(getattr(pipe, c), "attn1.to_q"), torch.Generator().manual_seed(k)) for k, c in BOTH)
    rename = {"attn1.to_q": "self_attn.q"}
    files = [
        {k.replace(*next(iter(rename.items()))): v for k, v in kohya(made, "diffusion_model.", str).items()}
        for made in (high, low)
    ]
    with pytest.raises(ValueError, match=r"for which of transformer, transformer_2 .* needs a place"):
        load_lora(pipe, files[0], "a")
    members = load_members(pipe, {"a": dict(zip(("transformer", "transformer_2"), files, strict=True))})
    same(deltas(pipe.transformer), expected(high))
    same(deltas(pipe.transformer_2), expected(low))
    members.remove()
    assert load_lora(pipe, {"transformer_2": files[1]}, "a") == ("transformer_2",)
    assert not deltas(pipe.transformer)
    with pytest.raises(ValueError, match=r"some of transformer, transformer_2, got one for 'unet'"):
        load_lora(pipe, {"unet": files[0]}, "b")
    bare = {k.removeprefix("diffusion_model."): v for k, v in kohya(high, "", str).items()}
    with pytest.raises(ValueError, match="needs a place"):
        load_lora(pipe, bare, "b")
    named = {f"transformer.{k}": v for k, v in bare.items()}
    assert load_lora(pipe, named, "b") == ("transformer",)
    assert load_lora(pipe, {"transformer_2": named}, "c") == ("transformer_2",)


BOTH = ((1, "transformer"), (2, "transformer_2"))


def test_lengths_of_rows_and_biases_load_exactly():
    """kohya's DoRA is W' = m (W + s B A) / |W + s B A| by rows; a bias of B adds to the output."""
    pipe = tiny_pipeline("sd15")
    found = layers(pipe.unet, "attn1.to_q")
    made, tensors, want = pairs(found), {}, {}
    x = torch.randn(2, 16, generator=torch.Generator().manual_seed(2))
    for name, delta in expected(made).items():
        weight = found[name].weight + delta
        lengths = 1 + torch.rand(len(weight), 1, generator=torch.Generator().manual_seed(3))
        tensors["lora_unet_" + name.replace(".", "_") + ".dora_scale"] = lengths
        want[name] = x @ (lengths * weight / weight.norm(dim=1, keepdim=True)).T
    load_lora(pipe, kohya(made, "lora_unet_") | tensors, "a")
    for name, value in want.items():
        torch.testing.assert_close(pipe.unet.get_submodule(name)(x), value, rtol=1e-5, atol=1e-5)
    wan = tiny_pipeline("wan2.1")
    found = layers(wan.transformer, "attn1.to_q")
    made = pairs(found)
    width = next(iter(found.values())).weight.shape[0]
    rename = lambda name: name.replace("attn1.to_q", "self_attn.q")  # noqa: E731
    biases = {f"diffusion_model.{rename(name)}.diff_b": torch.arange(width) + 1.0 for name in made}
    x = torch.randn(2, width, generator=torch.Generator().manual_seed(2))
    want = {name: layer(x) + x @ expected(made)[name].T + torch.arange(width) + 1 for name, layer in found.items()}
    load_lora(wan, kohya(made, "diffusion_model.", rename) | biases, "a")
    for name, value in want.items():
        torch.testing.assert_close(wan.transformer.get_submodule(name)(x), value, rtol=1e-5, atol=1e-5)


def more(**tensors):
    return lambda key: {f"{key}.{name}": value for name, value in tensors.items()}


REFUSED = {
    "LoHa of 1 layers": more(hada_w1_a=torch.ones(2, 2), hada_w1_b=torch.ones(2, 2)),
    "LoKr of 1 layers": more(lokr_w1=torch.ones(2, 2)),
    "OFT": more(oft_blocks=torch.ones(2, 2)),
    "differences of biases": more(diff_b=torch.ones(2)),
    "full differences of weights": more(diff=torch.ones(2)),
    "a core between its factors": more(**{"lora_mid.weight": torch.ones(2, 2)}),
    "without their partner": more(**{"lora_down.weight": torch.ones(2, 2)}),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_pair_is_named_and_nothing_loads(kind):
    pipe = tiny_pipeline("sd15")
    tensors = kohya(pairs(layers(pipe.unet, "attn1.to_q")), "lora_unet_")
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_q"
    with pytest.raises(ValueError, match=kind) as refusal:
        load_lora(pipe, tensors | REFUSED[kind](key), "a")
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 600
    assert not any(isinstance(module, LoraLayer) for module in pipe.unet.modules())
    zero = {name: 0 * value for name, value in REFUSED[kind](key).items()}
    if "differences" in kind:
        load_lora(pipe, tensors | zero, "a")  # a difference of nothing is none


@pytest.mark.parametrize(
    "family, key",
    [
        ("sd15", "lora_unet_down_blocks_3_attentions_0_transformer_blocks_0_attn1_to_q"),
        ("sd15", "lora_te2_text_model_encoder_layers_0_self_attn_q_proj"),
        ("sd15", "lora_unet_double_blocks_0_img_attn_qkv"),
        ("flux", "lora_te3_encoder_block_0_layer_0_SelfAttention_q"),
        ("flux", "lora_unet_double_blocks_7_img_mod_lin"),
    ],
)
def test_a_layer_that_the_pipeline_lacks_is_named(family, key):
    pipe = tiny_pipeline(family)
    good = {"mid_block.attentions.0.transformer_blocks.0.attn1.to_q": "lora_unet_", "x": ""}
    made = pairs(layers(pipe.unet, tuple(good))) if family == "sd15" else {"double_blocks_0_img_attn_proj": FLUX}
    tensors = kohya(made, "lora_unet_")
    extra = {f"{key}.lora_down.weight": torch.ones(2, 16), f"{key}.lora_up.weight": torch.ones(48, 2)}
    with pytest.raises(ValueError, match="a LoRA") as refusal:
        load_lora(pipe, tensors | extra, "a")
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 500
    assert not any(isinstance(m, LoraLayer) for part in lora_components(pipe).values() for m in part.modules())
    load_lora(pipe, tensors, "a")


FLUX = (torch.ones(2, 32), torch.ones(32, 2), 1.0)


def loader(convert):
    """Return what stands for a pipeline: its loader translates tensors."""
    return SimpleNamespace(lora_state_dict=lambda tensors, **_: convert(tensors))


def joint(*names, scale=2.0):
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name in names:
        tensors |= {f"{name}.lora_down.weight": torch.randn(3, 5, generator=generator)}
        tensors |= {
            f"{name}.lora_up.weight": torch.randn(8, 3, generator=generator),
            f"{name}.alpha": torch.tensor(scale),
        }
    return LoraFile(tensors, None)


def renamed(tensors, change=lambda down, up: (down, up), names=("x",)):
    out = {}
    for name in names:
        down, up = change(tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"])
        out |= {f"new.{name}.lora_A.weight": down, f"new.{name}.lora_B.weight": up}
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_are_found_again_whatever_a_loader_does(dtype):
    """Renamed, times alpha / rank or not, halves turned around, two put together."""
    file = joint("x", "y")
    file = LoraFile({k: v.to(dtype) if v.ndim else v for k, v in file.tensors.items()}, None)
    said = changes_of(file)
    want = {name: change.scale * change.up.double() @ change.down.double() for name, change in said.items()}

    def total(convert):
        found = converted(loader(convert), file, said)
        return {name: change.scale * change.up.double() @ change.down.double() for name, change in found.items()}

    both, tolerance = ("x", "y"), {"rtol": 0, "atol": 1e-6 if dtype == torch.float32 else 0.05}
    for convert in (
        lambda t: renamed(t, names=both),
        lambda t: renamed(t, lambda down, up: (down * (2 / 3), up), names=both),
    ):
        for name, value in total(convert).items():
            torch.testing.assert_close(value, want[name.removeprefix("new.")], **tolerance)
    turned = total(lambda t: renamed(t, lambda down, up: (down, torch.cat([up[4:], up[:4]])), names=both))
    torch.testing.assert_close(turned["new.x"], torch.cat([want["x"][4:], want["x"][:4]]), **tolerance)

    def together(t):
        down = torch.cat([t["x.lora_down.weight"], t["y.lora_down.weight"]])
        up = torch.block_diag(t["x.lora_up.weight"], t["y.lora_up.weight"])
        return {"new.lora_A.weight": down, "new.lora_B.weight": up}

    torch.testing.assert_close(total(together)["new"], torch.cat([want["x"], want["y"]]), **tolerance)


def test_what_a_loader_leaves_out_or_changes_is_refused():
    file = joint("x", "y")
    said = changes_of(file)
    for convert, message in (
        (lambda t: renamed(t, names=("x",)), "got y in"),
        (lambda t: renamed(t, lambda down, up: (down, up[:6]), names=("x", "y")), "got x and 1 more in"),
        (lambda t: renamed(t, lambda down, up: (3 * down, up), names=("x", "y")), "names or strength"),
        (
            lambda t: renamed(t, lambda down, up: (down, up[torch.randperm(8)] * up), names=("x", "y")),
            "names or strength",
        ),
        (lambda t: {}["nothing"], "must be in names that"),
    ):
        with pytest.raises(ValueError, match=message):
            converted(loader(convert), file, said)
