"""Pipelines as what the trainers tune: gradients, the chain against diffusers, saved members, rewards."""

from __future__ import annotations

import json

import diffusers
import numpy as np
import pytest
import torch

from sdeblend.finetune.paths import draw_noise, draw_states
from sdeblend.finetune.trainers import TRAINERS
from sdeblend.reward import WeightedReward
from sdeblend.shell.settings import parse
from sdeblend.steps import Ancestral
from stablediffusion import load_lora, load_members, pipeline_score, read_lora, save_lora, scheduler_grid
from stablediffusion.finetune import PipelineSettings
from stablediffusion.finetune.tunable import ADAPTER, PipelineTunable
from stablediffusion.pipelines.families import FAMILIES
from stablediffusion.pipelines.identity import base_identity, same_base
from stablediffusion.pipelines.prompts import PromptCondition
from stablediffusion.rewards import REWARDS, colourfulness, image_reward, jpeg_size
from stablediffusion.testing import FAMILIES as TINY
from stablediffusion.testing import tiny_call, tiny_lora, tiny_pipeline
from tests.support.strategies import refuses

PROMPTS = ["a red circle", "a blue square", "a ring"]
EVERY = ("attention", "feed-forward", "convolutions")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def tunable(family="sd15", pipe=None, **options):
    layers = EVERY if family.startswith("sd15") else EVERY[:2]
    pipe = pipe or tiny_pipeline(family, seed=1)
    return PipelineTunable(pipe, PROMPTS, **({"layers": layers, "height": 16, "width": 16} | options))


def changed(model, size=0.3):
    """Make the adapter do something."""
    g = seeded(7)
    for name, factor in sorted(model.trainable().items()):
        factor.data.copy_(size * torch.randn(factor.shape, generator=g) * (2 if name.endswith("B") else 1))
    return model


def batch(model, groups=2, size=2):
    g = seeded(3)
    condition = model.conditions(groups, size, g)
    x = torch.randn((groups * size, *model.event), generator=g)
    return x, torch.linspace(0.1, 0.9, len(x), dtype=torch.float64), condition


@pytest.mark.rng_untouched
@pytest.mark.parametrize("family", [family for family in TINY if TINY[family].stem in FAMILIES])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_predictions_of_every_family(family, guidance):
    """One time a row, a fresh adapter changes nothing, a trained one does, and the base is what it was."""
    model = tunable(family, guidance=guidance)
    x, t, condition = batch(model)
    base = model.base(x, t, condition)
    assert base.shape == x.shape
    assert torch.equal(model.tuned(x, t, condition), base)
    with torch.no_grad():
        model.batch = 3
        torch.testing.assert_close(model.base(x, t, condition), base, atol=1e-4, rtol=1e-4)
    alone = [model.tuned(x[i : i + 1], t[i : i + 1], condition.rows(torch.tensor([i]))) for i in range(len(x))]
    torch.testing.assert_close(torch.cat(alone), base, atol=1e-4, rtol=1e-4)
    other = model.tuned(x, t.flip(0), condition) - base
    assert other.abs().max() > 1e-3, "the time must count"
    changed(model)
    assert (model.tuned(x, t, condition) - base).abs().max() > 1e-3
    assert torch.equal(model.base(x, t, condition), base)


@pytest.mark.parametrize("family", ["sd15", "sdxl", "flux", "flux2-klein", "qwen-image", "z-image"])
def test_predictions_are_those_of_the_score_on_latents(family):
    model = tunable(family, guidance=3.0, negative="a ring")
    x, _, _ = batch(model, 1, 2)
    t = torch.tensor(0.4, dtype=torch.float64)
    score = pipeline_score(
        model.pipe, PROMPTS[0], images=2, guidance_scale=3.0, negative_prompt="a ring", height=16, width=16
    )
    from sdeblend.finetune.model import converted

    times = t.expand(2)
    got = converted(model, model.base(x, times, model.condition(PROMPTS[:1] * 2)), x, times, "score")
    torch.testing.assert_close(got, score(x, t)[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_adapter_gets_gradients(checkpointing, dtype):
    model = changed(tunable(pipe=tiny_pipeline("sd15", seed=1, dtype=dtype), checkpointing=checkpointing))
    x, t, condition = batch(model)
    x.requires_grad_()
    (model.tuned(x, t, condition).square().sum() + model.decode(x).sum()).backward()
    trainable = model.trainable()
    assert all(p.dtype == torch.float32 and bool(p.grad.abs().sum() > 0) for p in trainable.values())
    assert bool(x.grad.abs().sum() > 0)
    every = [
        p for part in model.pipe.components.values() if isinstance(part, torch.nn.Module) for p in part.parameters()
    ]
    assert {id(p) for p in every if p.grad is not None} == {id(p) for p in trainable.values()}
    assert {id(p) for p in every if p.requires_grad} == {id(p) for p in trainable.values()}
    for p in trainable.values():
        p.grad = None
    model.base(x, t, condition).square().sum().backward()
    assert all(p.grad is None for p in trainable.values()), "the base must not know the adapter"


def test_checkpointing_changes_no_gradient():
    """Also of the base, whose activations are computed again with the adapter off."""
    gradients = []
    for checkpointing in (False, True):
        model = changed(tunable(checkpointing=checkpointing))
        x, t, condition = batch(model)
        x.requires_grad_()
        difference = model.tuned(x, t, condition) - model.base(x, t, condition)
        (difference.square().sum() + model.decode(x).square().sum()).backward()
        gradients.append([x.grad, *(p.grad for p in model.trainable().values())])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("family", ["sd15", "sd21"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_untrained_chain_is_the_pipelines_own_ddim(family, guidance):
    """eta = 1 on the same noise, images compared; another guidance is the control."""
    model = tunable(family, guidance=guidance)
    pipe = model.pipe
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=True)
    steps, prompts = 10, PROMPTS[:2]
    call = tiny_call(pipe, steps) | {"eta": 1.0, "guidance_scale": guidance}
    expected = pipe(prompts, generator=seeded(5), **call).images
    grid = scheduler_grid(pipe, steps)
    noise = draw_noise(model, steps, slice(0, 2), 2, seeded(5))
    condition = model.condition(prompts)
    with torch.no_grad():
        images = model.decode(draw_states(model, Ancestral(), grid, noise, condition)[-1]).permute(0, 2, 3, 1).numpy()
        other = condition.rows(torch.tensor([1, 0]))
        control = model.decode(draw_states(model, Ancestral(), grid, noise, other)[-1])
    assert np.abs(images - expected).max() < 2e-4
    assert np.abs(control.permute(0, 2, 3, 1).numpy() - expected).max() > 1e-2


@pytest.mark.parametrize(
    ("name", "family"),
    [(name, "sd15") for name in TRAINERS]
    + [("regression", "z-image"), ("backprop", "qwen-image"), ("ddpo", "flux2-klein")],
)
def test_one_iteration_of_each_trainer(name, family):
    """Changes the adapter and nothing else."""
    kind = TRAINERS[name]
    settings = kind.settings_class
    model = tunable(family, layers=("attention",))
    x, t, condition = batch(model)
    base, before = model.base(x, t, condition), {k: p.detach().clone() for k, p in model.trainable().items()}
    reward = WeightedReward({"vivid": image_reward("vivid")})
    few = {"dpok": {"updates": 1, "batch": 4, "value_updates": 1, "value_batch": 4}}.get(name, {})
    trainer = kind(model, reward, settings(kl_weight=0.1, groups=2, group_size=2, steps=3, learning_rate=1e-2, **few))
    metrics = trainer.iterate()
    assert {"reward", "kl", "loss"} <= metrics.keys()
    assert all(np.isfinite(value) for value in metrics.values())
    assert any(not torch.equal(before[k], p) for k, p in model.trainable().items())
    assert torch.equal(model.base(x, t, condition), base)


METADATA = {"sdeblend.kl_weight": "0.25", "sdeblend.reward": json.dumps({"vivid": 1.0}), "sdeblend.trainer": "ddpo"}


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux2-klein", "qwen-image", "z-image"])
def test_saved_member_is_the_tuned_network(family, tmp_path):
    model = changed(tunable(family, alpha=8.0))
    x, t, condition = batch(model)
    expected = model.tuned(x, t, condition).detach()
    path = model.save(tmp_path / "new" / "a.safetensors", METADATA | {"sdeblend.base": model.identity()})
    assert path.read_bytes() == model.save(tmp_path / "b.safetensors", read_about(path)).read_bytes()
    other = tunable(family)
    members = load_members(
        other.pipe, {"a": path, "old": tiny_lora(tiny_pipeline(family), tmp_path / "c.safetensors", seed=1)}
    )
    assert members["a"].kl_weight == 0.25
    assert members["a"].reward == {"vivid": 1.0}
    assert members["a"].guidance == model._family.unguided
    assert members["old"].kl_weight is None and members["old"].reward is None
    assert torch.equal(other.base(x, t, condition), model.base(x, t, condition)), "no member is active by itself"
    other.network.set_adapter("a")
    assert torch.equal(other.base(x, t, condition), expected)
    again = save_lora(other.pipe, tmp_path / "d.safetensors", "a", about=read_lora(path).about, dtype=torch.float16)
    assert read_lora(again).about == read_lora(path).about
    assert again.stat().st_size < path.stat().st_size


def test_saved_member_is_loaded_again(tmp_path):
    model = changed(tunable(rank=2, alpha=6.0))
    x, t, condition = batch(model)
    path = model.save(tmp_path / "a.safetensors", {})
    other = tunable(rank=2, alpha=6.0)
    other.load(path)
    assert torch.equal(other.tuned(x, t, condition), model.tuned(x, t, condition))
    assert (other.tuned(x, t, condition) - other.base(x, t, condition)).abs().max() > 1e-3
    for options in ({"rank": 4, "alpha": 6.0}, {"rank": 2}, {"rank": 2, "alpha": 6.0, "layers": ("attention",)}):
        fresh = tunable(**options)
        refuses(lambda fresh=fresh: fresh.load(path), "a member to load must have rank")
        assert torch.equal(fresh.tuned(x, t, condition), fresh.base(x, t, condition))


def read_about(path):
    return {f"sdeblend.{key}": value for key, value in read_lora(path).about.items()}


def test_member_of_another_base_is_refused(tmp_path):
    model = tunable()
    path = model.save(tmp_path / "a.safetensors", {"sdeblend.base": model.identity()})
    other = tiny_pipeline("sd15", seed=2)
    refuses(lambda: load_members(other, {"a": path}), "the base it was tuned on", "load the pipeline it was made for")
    assert not getattr(other.unet, "peft_config", {})
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        load_members(tiny_pipeline("sd15", seed=1, dtype=dtype), {"a": path})
    for about in ({"kl_weight": "much"}, {"kl_weight": "-1"}, {"reward": "[1]"}, {"reward": "{"}):
        bad = save_lora(model.pipe, tmp_path / "bad.safetensors", ADAPTER, about=about)
        refuses(lambda bad=bad: load_members(tiny_pipeline("sd15", seed=1), {"a": bad}), "needs readable")


def test_identity_is_of_the_weights_alone():
    pipe = tiny_pipeline("sd15", seed=1)
    identity = base_identity(pipe.unet)
    model = changed(tunable(pipe=pipe))
    assert model.identity() == identity
    assert not same_base(identity, base_identity(tiny_pipeline("sd15", seed=2).unet))
    bias = pipe.unet.conv_out.bias
    bias.data[0] += 0.1
    assert not same_base(identity, model.identity())


def test_pipeline_draws_as_before(tmp_path):
    """Before, while and after being tuned; with a background adapter that belongs to the base."""
    pipe = tiny_pipeline("sd15", seed=1)
    load_lora(pipe, tiny_lora(pipe, tmp_path / "style.safetensors", seed=3), "style")
    pipe.unet.set_adapter("style")
    call = tiny_call(pipe) | {"prompt": "a ring"}
    before = pipe(generator=seeded(), **call).images
    model = changed(tunable(pipe=pipe))
    x, t, condition = batch(model)
    styled = model.base(x, t, condition)
    assert (model.tuned(x, t, condition) - styled).abs().max() > 1e-3
    assert np.array_equal(before, pipe(generator=seeded(), **call).images)
    pipe.unet.disable_adapters()
    assert (model.base(x, t, condition) - styled).abs().max() > 1e-3


def test_conditions_are_drawn_from_the_source(tmp_path):
    pipe = tiny_pipeline("sd15", seed=1)
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join([*PROMPTS, "", "  "]))
    model = PipelineTunable(pipe, path)
    condition = model.conditions(3, 2, seeded())
    assert sorted(condition.prompts[::2]) == sorted(PROMPTS) and condition.prompts[::2] == condition.prompts[1::2]
    assert set(model.conditions(9, 1, seeded()).prompts) <= set(PROMPTS)
    part = condition.rows(torch.tensor([4, 0, 4]))
    assert part.prompts == tuple(condition.prompts[i] for i in (4, 0, 4))
    whole = condition.of_rows()[0]
    assert [text is whole[i] for text, i in zip(part.of_rows()[0], (4, 0, 4), strict=True)] == [True] * 3
    assert whole[0] is whole[1] and not torch.equal(whole[0]["text"], whole[2]["text"])
    fresh = PipelineTunable(tiny_pipeline("sd15", seed=1), lambda n, g: ["a ring"] * n)
    ring = fresh.conditions(2, 1, seeded()).of_rows()[0]
    assert torch.equal(ring[1]["text"], model.condition(["a ring", "a red circle"]).of_rows()[0][0]["text"])


def test_what_cannot_be_tuned_is_refused(tmp_path):
    pipe = tiny_pipeline("sd15", "img2img")
    refuses(lambda: PipelineTunable(pipe, PROMPTS), "tuning needs a text-to-image pipeline", "Img2Img")
    chroma = diffusers.ChromaPipeline.__new__(diffusers.ChromaPipeline)
    refuses(lambda: PipelineTunable(chroma, PROMPTS), "tuning needs a text-to-image pipeline of", "ChromaPipeline")
    for options, part in (
        ({"rank": 0}, "rank must be"), ({"decode_batch": 0}, "decode_batch"), ({"layers": ()}, "layers must be"),
        ({"layers": ("heads",)}, "layers must be"), ({"prompts": []}, "at least one prompt"),
        ({"prompts": tmp_path / "none.txt"}, "readable text file"),
    ):  # fmt: skip
        refuses(lambda o=options: PipelineTunable(tiny_pipeline("sd15"), **({"prompts": PROMPTS} | o)), part)
    refuses(lambda: tunable("sd3", layers=EVERY), "convolutions", "lacks")
    model = tunable()
    refuses(lambda: tunable(pipe=model.pipe), "without an adapter 'tuned'")
    x, t, condition = batch(model)
    refuses(lambda: model.tuned(x[:1], t[:1], condition), "one prompt a row")
    refuses(lambda: model.base(x, t, None), "one prompt a row")
    short = PipelineTunable(tiny_pipeline("sd15"), lambda n, g: ["a"])
    refuses(lambda: short.conditions(2, 2, seeded()), "must give 2 prompts")


def test_jpeg_size_and_colourfulness():
    g = seeded()
    noise, grey = torch.rand(1, 3, 32, 32, generator=g), torch.full((1, 3, 32, 32), 0.5)
    half = torch.cat([grey[..., :16], torch.tensor([1.0, 0, 0]).reshape(1, 3, 1, 1).expand(1, 3, 32, 16)], -1)
    images = torch.cat([noise, grey, half])
    sizes = jpeg_size(images)
    assert sizes[0] > 2 * sizes[1] and sizes[1] < sizes[2] < sizes[0]
    assert 0.5 < float(sizes[1]) < 1, "kB: a grey image is little but a header"
    assert torch.equal(REWARDS["compress"](images, None), -REWARDS["incompress"](images, None))
    # half grey, half red: rg and yb are 0 or (1, 1/2) each half the time
    expected = (0.25 + 0.0625) ** 0.5 + 0.3 * (0.25 + 0.0625) ** 0.5
    torch.testing.assert_close(colourfulness(images)[1:], torch.tensor([0.0, expected]), atol=2e-4, rtol=1e-3)
    grey.requires_grad_()
    assert image_reward("vivid").differentiable and not image_reward("compress").differentiable
    colourfulness(grey).sum().backward()
    assert bool(grey.grad.isfinite().all())
    x = noise.double().requires_grad_()
    assert torch.autograd.gradcheck(colourfulness, x[..., :4, :4])


def test_alignment_is_of_what_the_prompt_asks():
    """The caption that was drawn scores above another; an empty prompt asks for nothing."""
    from stablediffusion.scenes.captions import parse
    from stablediffusion.scenes.drawing import draw

    prompts = ("a large red circle in the center on a plain blue background", "a green cross on a white background", "")
    scene = parse(prompts[0])
    images = ((draw([scene] * 3) + 1) / 2).requires_grad_()
    values = image_reward("align")(images, PromptCondition(prompts, (), torch.arange(3)))
    assert values[0] > -0.5 and values[1] < values[0] - 5 and values[2] == 0
    values.sum().backward()
    assert images.grad.flatten(1).abs().sum(1)[:2].min() > 0


def test_rewards_by_name():
    assert image_reward("torch:sum").function is torch.sum
    assert image_reward("stablediffusion.rewards:jpeg_size").differentiable
    refuses(lambda: image_reward("beauty"), "compress", "package.module:function")
    refuses(lambda: image_reward("nowhere.at.all:f"), "importable")
    refuses(lambda: image_reward("torch:nothing"), "importable")
    refuses(lambda: image_reward("torch:float32"), "must be a function")


def test_backend_of_the_command(tmp_path):
    """The table becomes model and rewards, the same from the same seed; what is wrong in it is named."""
    pipe = tiny_pipeline("sd15", seed=1)
    pipe.save_pretrained(tmp_path / "model")
    file, table = tmp_path / "c.toml", {"path": str(tmp_path / "model"), "prompts": PROMPTS, "rank": 2}

    def built(change=None, rewards=("compress", "vivid"), seed=0):
        options = parse(PipelineSettings, table | (change or {}), file=file, section="[model]")
        return options.build(rewards, file=file, seed=seed, device=torch.device("cpu"))

    model, rewards = built()
    assert list(rewards) == ["compress", "vivid"]
    first = {k: p.detach() for k, p in model.trainable().items()}
    assert all(torch.equal(p, first[k]) for k, p in built()[0].trainable().items())
    assert any(not torch.equal(p, first[k]) for k, p in built(seed=1)[0].trainable().items())
    assert same_base(model.identity(), base_identity(pipe.unet))
    refuses(lambda: built({"ranks": 2}), "c.toml", "unknown key 'ranks'")
    refuses(lambda: built({"path": str(tmp_path)}), "c.toml", "path must be a folder or hub id")
    refuses(lambda: built({"rank": 0}), "c.toml: [model] rank")
    refuses(lambda: built(rewards=("beauty",)), "c.toml: [rewards]", "beauty")
