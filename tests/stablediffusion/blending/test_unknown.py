"""Pipelines that nobody has listed: they carry a blend, or say in one sentence that they cannot."""

from __future__ import annotations

import diffusers
import pytest
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin

from stablediffusion import blend, load_members
from stablediffusion.testing import tiny_lora
from tests.support.averages import Oracle
from tests.support.strategies import refuses

# peft says so of every second adapter
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
STEPS, WIDTH, TOKENS = 3, 8, 5


class Ornate(diffusers.ModelMixin, diffusers.ConfigMixin, PeftAdapterMixin):
    """A denoiser with names and nests of its own: lists with a tensor a row, pairs of them, sizes a row."""

    @register_to_config
    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (torch.nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, glyphs, timesteps, scrolls, *, sizes, seats):
        words, marks = scrolls["words"], scrolls["marks"]
        assert len({len(part) for part in (glyphs, words, marks, sizes)}) == 1
        x, context = torch.stack(glyphs), torch.stack(words) * torch.stack(marks)
        while words:
            words.pop()  # lists are the network's own for the call
        scores = torch.softmax(self.to_q(x + seats) @ self.to_k(context).transpose(1, 2), -1)
        tall = torch.tensor([height for height, _ in sizes], dtype=x.dtype)[:, None, None]
        painted = list(scores @ self.to_v(context) * tall + (timesteps / 1000).sin()[:, None, None] * x)
        return ((painted,),) if self.nested else (painted,)

    nested = False


class OrnatePipeline(diffusers.DiffusionPipeline):
    """Three rows an image: with the words, with none, and with those of another style."""

    _lora_loadable_modules = ("transformer",)

    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, images):
        generator = torch.Generator().manual_seed(3)
        x, words = (torch.randn(images, n, WIDTH, generator=generator, dtype=torch.float64) for n in (4, TOKENS))
        marks = torch.rand(3 * images, TOKENS, 1, generator=generator, dtype=torch.float64)
        self.scheduler.set_timesteps(STEPS)
        for t in self.scheduler.timesteps:
            rows = torch.cat([words, 0 * words, words.flip(1)])
            scrolls = {"words": list(rows), "marks": list(marks)}
            given = self.transformer(
                list(torch.cat([x, x, x])),
                t.expand(3 * images),
                scrolls,
                sizes=[(1.0 + r % 2, 2) for r in range(3 * images)],
                seats=torch.linspace(0, 1, 4, dtype=torch.float64)[:, None],
            )
            plus, nothing, style = torch.stack(given[0]).chunk(3)
            x = self.scheduler.step(plus + 2 * (plus - nothing) + 0.5 * (plus - style), t, x).prev_sample
        return x


@pytest.fixture
def ornate(tmp_path):
    """Return the pipeline, its members and the oracle of them."""
    torch.manual_seed(0)
    pipe = OrnatePipeline(Ornate().double(), diffusers.FlowMatchEulerDiscreteScheduler())
    paths = {name: tiny_lora(pipe, tmp_path / f"{name}.safetensors", seed=k + 1) for k, name in enumerate("ab")}
    oracle = Oracle(pipe, paths.values())
    for name, path in paths.items():
        pipe.transformer.load_lora_adapter(str(path), prefix="transformer", adapter_name=name)
    members = load_members(pipe, dict.fromkeys(paths))
    pipe.transformer.disable_adapters()
    return pipe, members, oracle


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("batched", [False, True])
def test_a_family_with_names_and_nests_of_its_own(images, batched, ornate):
    pipe, members, oracle = ornate
    each = torch.tensor([[0.6, 0.7, -0.3], [0.2, 0.1, 0.7]], dtype=torch.float64)[:images]
    with blend(pipe, members, {"a": each[:, 1], "b": each[:, 2]}, batched=batched):
        got = pipe(images)
    alone = {"transformer": [oracle.alone("transformer", k) for k in range(3)]}
    expected = oracle(lambda: pipe(images), alone, lambda step: each)
    assert oracle.rows == {"transformer": [3 * images] * STEPS}
    base = pipe(images)
    assert (got - expected).norm() < 1e-6 * (expected - base).norm()
    assert (expected - base).norm() > 1e-2 * base.norm()


def test_one_member_a_step_of_such_a_family(ornate):
    pipe, members, oracle = ornate
    with blend(pipe, members, {"b": 1.0}, mode="ls"):
        got = pipe(2)
    expected = oracle(lambda: pipe(2), {"transformer": [oracle.alone("transformer", 2)]}, lambda step: [1.0])
    assert (got - expected).norm() < 1e-6 * (expected - pipe(2)).norm()


def test_a_nest_within_the_output_is_refused(ornate):
    pipe, members, _ = ornate
    pipe.transformer.nested = True

    def run():
        with blend(pipe, members, {"a": 1.0}):
            pipe(1)

    refuses(run, "gives a tensor, or a list with a tensor a row, got tuple", "cannot carry one")


class Connectors(diffusers.ModelMixin, diffusers.ConfigMixin):
    """What stands between LTX 2's text encoder and its transformer: here nothing."""

    @register_to_config
    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, embeddings, mask, **options):
        return embeddings, embeddings, mask


def test_video_with_sound_is_refused(tmp_path):
    torch.manual_seed(0)
    transformer = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=1,
        caption_channels=16,
    )
    parts = dict.fromkeys(("vae", "audio_vae", "text_encoder", "tokenizer", "vocoder"))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = diffusers.LTX2Pipeline(transformer=transformer, connectors=Connectors(), scheduler=scheduler, **parts)
    pipe.set_progress_bar_config(disable=True)
    members = load_members(pipe, {"a": tiny_lora(pipe, tmp_path / "a.safetensors", seed=1)})
    words, mask = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(0)), torch.ones(1, 4)

    def run():
        with blend(pipe, members, {"a": 1.0}):
            pipe(
                prompt_embeds=words,
                prompt_attention_mask=mask,
                height=64,
                width=64,
                num_frames=9,
                num_inference_steps=2,
                guidance_scale=1.0,
                stg_scale=0.0,
                modality_scale=1.0,
                audio_guidance_scale=1.0,
                audio_stg_scale=0.0,
                audio_modality_scale=1.0,
                output_type="latent",
            )

    refuses(run, "needs a denoiser with one output, got 2 of them", "this pipeline cannot carry one")
