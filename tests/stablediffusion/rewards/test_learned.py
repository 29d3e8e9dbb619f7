"""Learned rewards on tiny random weights: values against transformers, pixels, gradients, wrong folders."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from sdeblend.finetune.trainers import TRAINERS
from sdeblend.reward import WeightedReward
from sdeblend.shell.settings import parse
from stablediffusion.finetune import PipelineSettings
from stablediffusion.rewards.learned import LEARNED, blip
from stablediffusion.rewards.learned.pixels import CLIP_STD, Pixels, pixels_of
from stablediffusion.rewards.registry import image_reward
from stablediffusion.rewards.scoring import Prompts, score_each
from stablediffusion.testing import tiny_pipeline
from tests.support import scorer_models
from tests.support.scorer_models import (
    SIDE,
    aesthetic_folder,
    blip_folder,
    clip_folder,
    openclip_folder,
    processor,
    seeded,
)
from tests.support.strategies import refuses

PROMPTS = Prompts(("a red circle", "a ring", "a red circle", "x y z " * 50, ""))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders and what is in them, by the kind of model."""
    folder = tmp_path_factory.mktemp("scorers")
    return folder, {"clip": clip_folder(folder / "clip"), "aesthetic": aesthetic_folder(folder / "aesthetic"),
                    "blip": blip_folder(folder / "blip")}  # fmt: skip


def place(models, name):
    return str(models[0] / {"aesthetic": "aesthetic", "imagereward": "blip"}.get(name, "clip"))


def pictures(count=5, height=SIDE, width=SIDE, seed=0):
    """Smooth images with some noise, of whole levels, as a file has them."""
    g = seeded(seed)
    coarse = torch.rand(count, 3, 5, 5, generator=g)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    noisy = smooth + 0.1 * torch.randn(count, 3, height, width, generator=g)
    return (noisy.clamp(0, 1) * 255).round() / 255


def as_files(images):
    return [Image.fromarray((x.permute(1, 2, 0) * 255).round().byte().numpy()) for x in images]


def reward_of(models, name, **options):
    return image_reward(name, place(models, name), **options)


@pytest.mark.rng_untouched
@pytest.mark.parametrize("name", ["clipscore", "pickscore", "hpsv2"])
def test_similarities_are_those_of_transformers(models, name):
    """Of images of the model's own size no resizing is done; another prompt is the control."""
    model, reward, images = models[1]["clip"], reward_of(models, name), pictures()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(place(models, name))
    tokens = tokenizer(list(PROMPTS.prompts), padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    pixels = processor()(as_files(images), return_tensors="pt").pixel_values
    with torch.no_grad():
        logits = model(pixel_values=pixels, **tokens).logits_per_image / model.logit_scale.exp()
    factor = {"clipscore": 100, "pickscore": model.logit_scale.exp().item(), "hpsv2": 1}[name]
    expected = factor * logits.diag()
    values = reward(images, PROMPTS)
    assert values.shape == (5,) and values.dtype == torch.float32 and reward.differentiable and reward.unit
    torch.testing.assert_close(values, expected, atol=1e-5 * factor, rtol=1e-4)
    assert (values - factor * logits.roll(1, 1).diag()).abs().max() > 1e-2 * factor


def test_human_preference_score_under_openclips_names(models, tmp_path):
    """As it is published; the same model with another activation is the control."""
    model, images = openclip_folder(tmp_path), pictures()
    pixels = processor()(as_files(images), return_tensors="pt").pixel_values
    tokens = transformers.CLIPTokenizer.from_pretrained(tmp_path)(
        list(PROMPTS.prompts), padding=True, max_length=77, truncation=True, return_tensors="pt"
    )

    def scores():
        with torch.no_grad():
            return (model(pixel_values=pixels, **tokens).logits_per_image / model.logit_scale.exp()).diag()

    values = image_reward("hpsv2", str(tmp_path))(images, PROMPTS)
    torch.testing.assert_close(values, scores(), atol=1e-5, rtol=1e-4)
    for layer in model.vision_model.encoder.layers:
        layer.mlp.activation_fn = torch.nn.SiLU()
    assert (values - scores()).abs().max() > 1e-3
    state = load_file(tmp_path / "model.safetensors")
    for lost, part in (("visual.proj", "visual_projection.weight"), ("ln_final.bias", "final_layer_norm.bias is mis")):
        save_file({k: v for k, v in state.items() if k != lost}, tmp_path / "model.safetensors")
        refuses(lambda: image_reward("hpsv2", str(tmp_path)), part)
    (tmp_path / "model.safetensors").rename(tmp_path / "HPS_v2.1_compressed.pt")
    refuses(lambda: image_reward("hpsv2", str(tmp_path)), "HPS_v2.1_compressed.pt, a pickle", "['state_dict']")


@pytest.mark.rng_untouched
def test_aesthetic_score_is_the_head_on_the_unit_embedding(models):
    """The embedding as it is, without its length taken out, is the control."""
    (model, top), images = models[1]["aesthetic"], pictures()
    with torch.no_grad():
        seen = model(pixel_values=processor()(as_files(images), return_tensors="pt").pixel_values).image_embeds
        expected, control = top(seen / seen.norm(dim=1, keepdim=True))[:, 0], top(seen)[:, 0]
    values = reward_of(models, "aesthetic")(images, None)
    torch.testing.assert_close(values, expected, atol=1e-5, rtol=1e-4)
    assert (values - control).abs().max() > 1e-2


@pytest.mark.rng_untouched
def test_image_reward_is_that_of_its_formulas(models):
    """Every tensor of the original's names finds its place; tokens that are not masked are the control."""
    state, images = models[1]["blip"], pictures()
    tokens = transformers.BertTokenizer.from_pretrained(place(models, "imagereward"))(
        list(PROMPTS.prompts), padding="max_length", max_length=35, truncation=True, return_tensors="pt"
    )
    pixels = processor()(as_files(images), return_tensors="pt").pixel_values
    expected = scorer_models.image_reward_by_hand(state, pixels, tokens.input_ids, tokens.attention_mask)
    control = scorer_models.image_reward_by_hand(state, pixels, tokens.input_ids, torch.ones_like(tokens.input_ids))
    values = reward_of(models, "imagereward")(images, PROMPTS)
    torch.testing.assert_close(values, expected, atol=1e-4, rtol=1e-4)
    assert (values - control).abs().max() > 1e-2 and expected.std() > 1e-2


def test_every_tensor_of_an_image_reward_checkpoint_is_used(models):
    state = models[1]["blip"]
    parts = blip.transformers_names(state)
    unused = {k for k in state if k.startswith(("blip.vision_proj", "blip.text_proj"))}
    assert len(unused) == 4 and sum(map(len, parts)) == len(state) - len(unused)
    used = {value.data_ptr() for part in parts for value in part.values()}
    assert used == {value.data_ptr() for key, value in state.items() if key not in unused}
    refuses(lambda: blip.transformers_names(state | {"blip.queue": torch.zeros(1)}), "'blip.queue'", "converted")


@pytest.mark.parametrize("name", LEARNED)
def test_batches_and_gradients(models, name):
    """One at a time, two at a time, all at once; each image's gradient is its own and points uphill."""
    images = pictures(height=40, width=56)
    whole = reward_of(models, name)(images, PROMPTS)
    for batch in (1, 2):
        torch.testing.assert_close(reward_of(models, name, batch=batch)(images, PROMPTS), whole, atol=1e-4, rtol=1e-4)
    reward, x = reward_of(models, name, batch=2), images.clone().requires_grad_()
    reward(x, PROMPTS)[1].backward()
    lengths = x.grad.flatten(1).norm(dim=1)
    assert lengths[1] > 0 and lengths[[0, 2, 3, 4]].eq(0).all()
    step = 1e-2 * x.grad[1] / lengths[1]
    with torch.no_grad():
        sides = [reward(images[1:2] + s * step, Prompts(("a ring",))) for s in (1, -1)]
    slope = (sides[0] - sides[1]) / 2e-2
    torch.testing.assert_close(slope[0], lengths[1], rtol=0.05, atol=1e-4)
    assert all(not p.requires_grad for part in vars(reward.function).values()
               if isinstance(part, torch.nn.Module) for p in part.parameters())  # fmt: skip
    assert reward(images[:0], Prompts(())).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["pickscore", "aesthetic", "imagereward"])
def test_half_precision_is_near(models, name, dtype):
    """Within what rounding to the precision's own step makes of the spread; values of float32, gradients finite."""
    images = pictures().requires_grad_()
    full = reward_of(models, name)(images.detach(), PROMPTS)
    half = reward_of(models, name, dtype=dtype)(images, PROMPTS)
    half.sum().backward()
    assert half.dtype == torch.float32 and bool(images.grad.isfinite().all()) and not torch.equal(half, full)
    scale = full.abs().max()
    assert (half - full).abs().max() < 30 * torch.finfo(dtype).eps * scale


def test_pixels_are_those_of_transformers():
    """Larger, smaller, upright and lying images, with saturated pixels.

    Pillow rounds to 8 bits after each of two passes: half a level from the second, and half a level times the sum of
    absolute weights, at most 1.3 for this filter, from the first: 1.15 levels of 255, over the channel's deviation.
    A filter without antialiasing is the control.
    """
    bound = 1.15 / 255 / torch.tensor(CLIP_STD).reshape(3, 1, 1)
    pixels = pixels_of("test", processor().to_dict(), SIDE, "")
    for height, width in ((97, 61), (64, 64), (50, 131), (20, 21), (32, 45), (33, 32)):
        images = pictures(2, height, width)
        expected = processor()(as_files(images), return_tensors="pt").pixel_values
        assert bool(((pixels(images) - expected).abs() <= bound).all())
    images = pictures(2, 97, 97)
    expected = processor()(as_files(images), return_tensors="pt").pixel_values
    plain = torch.nn.functional.interpolate(images, (SIDE, SIDE), mode="bicubic")
    control = (plain - torch.tensor(pixels.mean).reshape(3, 1, 1)) / torch.tensor(pixels.std).reshape(3, 1, 1)
    assert not bool(((control - expected).abs() <= bound).all())


def test_pixels_read_older_settings():
    old = pixels_of("test", {"size": 24, "crop_size": 24, "resample": 2}, 24, "")
    assert old == Pixels(24, (24, 24), mode="bilinear")
    square = {"size": {"height": 24, "width": 24}, "do_center_crop": False, "do_normalize": False}
    assert pixels_of("test", square, 24, "")(pictures(1, 50, 30)).shape == (1, 3, 24, 24)
    refuses(lambda: pixels_of("test", {"size": 24, "crop_size": 20}, 24, "here"), "24 x 24", "(20, 20)")
    refuses(lambda: pixels_of("test", {"resample": 9}, 24, "here"), "preprocessor_config.json")
    refuses(lambda: Pixels(None, (24, 24))(pictures(1, 20, 30)), "at least 24 x 24", "20 x 30")
    refuses(lambda: Pixels()(torch.rand(3, 8, 8)), "(B, 3, H, W)")


def test_pixels_of_a_whole_image(models):
    """The longer side fits, the rest is black: HPSv2 sees a wide image as it sees that image on a black square."""
    padded, cut = Pixels(SIDE, (SIDE, SIDE), pad=True), Pixels(SIDE, (SIDE, SIDE))
    images = pictures(2, 48, 96)
    square = torch.nn.functional.pad(images, (0, 0, 24, 24))
    inside = slice(10, 22)  # away from the edge between image and black, which resizing blurs
    torch.testing.assert_close(padded(images)[:, :, inside], cut(square)[:, :, inside], atol=1e-5, rtol=1e-5)
    assert torch.equal(padded(images)[:, :, :8], cut(0 * square)[:, :, :8])
    assert padded(pictures(1, 33, 97)).shape == padded(pictures(1, 20, 7)).shape == (1, 3, SIDE, SIDE)
    assert torch.equal(padded(pictures(1, 40, 40)), cut(pictures(1, 40, 40)))
    images = pictures(5, SIDE // 2, SIDE)
    square = torch.nn.functional.pad(images, (0, 0, SIDE // 4, SIDE // 4))
    whole, centre = reward_of(models, "hpsv2"), reward_of(models, "clipscore")
    torch.testing.assert_close(whole(images, PROMPTS), whole(square, PROMPTS), atol=1e-5, rtol=1e-4)
    assert (centre(images, PROMPTS) - centre(square, PROMPTS)).abs().max() > 1


def test_weights_in_several_files_and_without_a_processor(models, tmp_path, monkeypatch):
    """A tokenizer that the folder lacks is fetched, never the weights beside it."""
    clip_folder(tmp_path, max_shard_size="50KB")
    assert not (tmp_path / "model.safetensors").exists()
    images = pictures()
    expected = reward_of(models, "clipscore")(images, PROMPTS)
    torch.testing.assert_close(image_reward("clipscore", str(tmp_path))(images, PROMPTS), expected)
    asked = []

    def fetched(repo, revision=None, allow_patterns=()):
        asked.append((repo, revision, tuple(allow_patterns)))
        return str(models[0] / "clip")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    for file in tmp_path.iterdir():
        if "token" in file.name or "preprocessor" in file.name:
            file.unlink()
    torch.testing.assert_close(image_reward("clipscore", str(tmp_path))(images, PROMPTS), expected)
    assert {repo for repo, _, _ in asked} == {"openai/clip-vit-large-patch14"}
    assert not any("safetensors" in pattern for _, _, patterns in asked for pattern in patterns)
    asked.clear()
    image_reward("pickscore", revision="abc")
    assert asked[0][:2] == ("yuvalkirstain/PickScore_v1", "abc") and "model.safetensors" in asked[0][2]
    assert not any(pattern.endswith((".bin", ".pt", ".py")) for pattern in asked[0][2])


def test_prompts_of_any_length_give_no_warning(models, caplog, capfd):
    """Cut at the model's length: the end of a long prompt does not count, its beginning does."""
    reward, images = reward_of(models, "clipscore"), pictures(3, seed=1)[:1].expand(3, -1, -1, -1)
    with caplog.at_level("WARNING"):
        values = reward(images, Prompts(("a" * 400, "a" * 80 + "b", "b" + "a" * 400)))
    assert values[0] == values[1] != values[2]
    assert not caplog.records and capfd.readouterr() == ("", "")


def test_a_learned_reward_that_fails_on_one_image(models, tmp_path):
    images = pictures()
    images[2] = torch.nan
    values, failures = score_each({"clipscore": reward_of(models, "clipscore")}, images, PROMPTS, keep=tmp_path)
    assert bool(values["clipscore"].isnan().eq(torch.arange(5) == 2).all())
    assert len(failures) == 1 and str(tmp_path / "clipscore-2.png") in failures[0]


def test_wrong_models_are_refused(models, tmp_path, monkeypatch):
    root = models[0]
    refuses(lambda: image_reward("hpsv2"), "pickle", "folder", "HPS_v2.1_compressed.pt", "model.safetensors")
    refuses(lambda: image_reward("imagereward"), "pickle", "ImageReward.safetensors")
    refuses(lambda: reward_of(models, "clipscore", batch=0), "batch must be at least 1")
    refuses(lambda: reward_of(models, "clipscore", dtype=torch.int8), "floating point")
    refuses(lambda: reward_of(models, "clipscore", revision="main"), "revision is of a hub id")
    refuses(lambda: reward_of(models, "clipscore")(pictures(2), PROMPTS), "2 images and 5 prompts")
    # a folder of another kind
    refuses(lambda: image_reward("clipscore", str(root / "blip")), "config.json", "download")
    refuses(lambda: image_reward("clipscore", str(root / "aesthetic")), "model_type 'clip'", "aesthetics_predictor")
    refuses(lambda: image_reward("aesthetic", str(root / "clip")), "layers.0.weight", "'clip'")
    refuses(lambda: image_reward("imagereward", str(root / "clip")), "ImageReward.safetensors")

    def missing(*args, **options):
        raise FileNotFoundError("no network\nat all")

    monkeypatch.setattr("huggingface_hub.snapshot_download", missing)
    refuses(lambda: image_reward("pickscore"), "yuvalkirstain/PickScore_v1", "model.safetensors", "download it")
    refuses(lambda: image_reward("clipscore", "no/such"), "'no/such'", "config.json")
    # pickles, damaged and incomplete files
    folder = tmp_path / "clip"
    shutil.copytree(root / "clip", folder)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    refuses(lambda: image_reward("clipscore", str(folder)), "model.safetensors", "no such file")
    (folder / "pytorch_model.bin").write_bytes(b"")
    refuses(lambda: image_reward("clipscore", str(folder)), "pytorch_model.bin, a pickle", "save_pretrained")
    (folder / "model.safetensors").write_bytes(b"nothing")
    refuses(lambda: image_reward("clipscore", str(folder)), "damaged")
    for change, part in (
        ({"logit_scale": None}, "logit_scale is missing"),
        ({"more": torch.zeros(1)}, "more is unknown"),
        ({"logit_scale": torch.zeros(2)}, "shape (2,) for ()"),
    ):
        save_file({k: v for k, v in (state | change).items() if v is not None}, folder / "model.safetensors")
        refuses(lambda: image_reward("clipscore", str(folder)), "weights of CLIPModel", part)
    save_file(state, folder / "model.safetensors")
    table = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(table | {"vision_config": 3}))
    refuses(lambda: image_reward("clipscore", str(folder)), "config.json that transformers")
    (folder / "config.json").write_text("[]")
    refuses(lambda: image_reward("clipscore", str(folder)), "table")
    (folder / "config.json").write_text(json.dumps(table))
    (folder / "tokenizer.json").write_text("{}")
    refuses(lambda: image_reward("clipscore", str(folder)), "tokenizer")
    for file in folder.glob("*token*"):
        file.unlink()
    refuses(lambda: image_reward("clipscore", str(folder)), "tokenizer.json or vocab.json", "copy it there")
    # the original ImageReward as it is published, and half of it
    folder = tmp_path / "blip"
    shutil.copytree(root / "blip", folder)
    (folder / "ImageReward.safetensors").rename(folder / "ImageReward.pt")
    refuses(lambda: image_reward("imagereward", str(folder)), "ImageReward.pt, a pickle", "weights_only=True")
    save_file({k: v for k, v in models[1]["blip"].items() if "visual" not in k}, folder / "ImageReward.safetensors")
    refuses(lambda: image_reward("imagereward", str(folder)), "BLIP's encoders")


def test_image_sizes_need_not_be_the_models(models):
    """Any size gives nearly the score of its own file at that size: what a user of the original code would see."""
    images = pictures(5, 70, 90)
    reward, model = reward_of(models, "clipscore"), models[1]["clip"]
    tokens = transformers.CLIPTokenizer.from_pretrained(place(models, "clipscore"))(
        list(PROMPTS.prompts), padding=True, max_length=77, truncation=True, return_tensors="pt"
    )
    pixels = processor()(as_files(images), return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = 100 * (model(pixel_values=pixels, **tokens).logits_per_image / model.logit_scale.exp()).diag()
    values = reward(images, PROMPTS)
    assert np.abs((values - expected).numpy()).max() < 0.1 * float(expected.std())


def test_tuning_on_a_learned_reward(models, tmp_path):
    """A table says where the weights are; a trainer that needs gradients takes a step on them."""
    tiny_pipeline("sd15", seed=1).save_pretrained(tmp_path / "model")
    file, folder = tmp_path / "c.toml", place(models, "hpsv2")
    table = {"path": str(tmp_path / "model"), "prompts": ["a ring", "a red circle"], "rank": 2, "height": 16,
             "width": 16}  # fmt: skip

    def built(models, names=("hpsv2", "vivid")):
        options = parse(PipelineSettings, table | {"rewards": models}, file=file, section="[model]")
        return options.build(names, file=file, seed=0, device=torch.device("cpu"))

    model, rewards = built({"hpsv2": {"model": folder, "batch": 3, "dtype": "bfloat16"}})
    assert rewards["hpsv2"].function.batch == 3 and rewards["hpsv2"].function.network.dtype == torch.bfloat16
    model, rewards = built({"hpsv2": folder})
    kind = TRAINERS["backprop"]
    before = {k: p.detach().clone() for k, p in model.trainable().items()}
    trainer = kind(model, WeightedReward({"hpsv2": rewards["hpsv2"]}),
                   kind.settings_class(kl_weight=0.1, groups=2, group_size=2, steps=2, learning_rate=1e-2))  # fmt: skip
    assert all(np.isfinite(value) for value in trainer.iterate().values())
    assert any(not torch.equal(before[k], p) for k, p in model.trainable().items())
    refuses(lambda: built({"clipscore": folder}), "c.toml: [model.rewards] 'clipscore'", "hpsv2, vivid")
    refuses(lambda: built({"hpsv2": 3}), "c.toml: [model.rewards] hpsv2 must be", "got 3")
    refuses(lambda: built({"hpsv2": {"folder": folder}}), "c.toml: [model.rewards.hpsv2]", "'folder'")
    refuses(lambda: built({"vivid": folder, "hpsv2": folder}), "c.toml: [model.rewards.vivid]", "takes no options")
    refuses(lambda: built({}), "c.toml: [rewards] reward 'hpsv2'", "folder")
    refuses(lambda: built({}, ("beauty",)), "c.toml: [rewards] a reward must be", "pickscore", "'beauty'")
