"""Preferences on every path of a pipeline: by name whatever the order, and no name that the members lack."""

from __future__ import annotations

import pytest
import torch

from sdeblend import Blend, OneMemberPerStep, Preference
from stablediffusion import blend, load_members, pipeline_score
from stablediffusion.blending.latents import SoupScore
from stablediffusion.testing import tiny_call, tiny_lora, tiny_pipeline

MODES = ("mpa", "ls", "soup", "soup-factors", "an image")
WEIGHTS = {"a": 0.7, "b": 0.2}
EACH = {"a": torch.tensor([0.7, 0.1]), "b": torch.tensor([0.2, 0.3])}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return a pipeline with members a and b, and one without any of them."""
    folder, (pipe, plain) = tmp_path_factory.mktemp("models"), (tiny_pipeline("sd15", seed=1) for _ in range(2))
    paths = {n: tiny_lora(pipe, folder / f"{n}.safetensors", seed=i + 1) for i, n in enumerate("ab")}
    return pipe, load_members(pipe, paths), plain


def turned(weights):
    return dict(reversed(weights.items()))


def exchanged(weights):
    return dict(zip(weights, reversed(weights.values()), strict=True))


def paths(pipe, members):
    """Yield each way to use a preference: name, weights, preference -> what comes out."""

    def attached(mode):
        def run(weights):
            options = {"num_images_per_prompt": 2, "output_type": "latent", "generator": seeded()}
            with blend(pipe, members, weights, mode=mode):
                return pipe("a red circle", **(tiny_call(pipe, 2) | options)).images

        return run

    stack = pipeline_score(pipe, "a red circle", members=members, images=2, height=16, width=16)
    x, t = torch.randn(stack.shape, generator=seeded()), torch.tensor(0.5, dtype=torch.float64)

    def one(weights):
        return OneMemberPerStep(stack, Preference(weights), t[None], 2, generator=seeded(3))(x, t)

    for mode in ("mpa", "ls", "soup", "soup-factors"):
        yield f"blend {mode}", WEIGHTS, attached(mode)
    yield "blend, weights an image", EACH, attached("mpa")
    yield "blend ls, weights an image", EACH, attached("ls")
    yield "score", WEIGHTS, lambda w: Blend(stack, Preference(w))(x, t)
    yield "score, weights an image", EACH, lambda w: Blend(stack, Preference(w))(x, t)
    yield "score ls", WEIGHTS, one
    yield "score soup", WEIGHTS, lambda w: SoupScore(stack, members, Preference(w), "soup")(x, t)
    yield "score soup-factors", WEIGHTS, lambda w: SoupScore(stack, members, Preference(w), "soup-factors")(x, t)


def test_order_of_names_does_not_matter_and_names_must_exist(models):
    """On every path; the weights of one another's members are the control."""
    pipe, members, _ = models
    ran = 0
    for name, weights, run in paths(pipe, members):
        expected = run(weights)
        assert torch.equal(run(turned(weights)), expected), name
        assert (run(exchanged(weights)) - expected).abs().max() > 1e-3, name
        with pytest.raises(ValueError, match="can weigh only a, b, got c"):
            run({"a": weights["a"], "c": weights["b"]})
        ran += 1
    assert ran == 11


@pytest.mark.parametrize("mode", ["soup", "soup-factors"])
def test_a_soup_is_the_same_whatever_the_stack_holds(mode, models):
    """On a stack with members, some of them or none; the base, which it must not be, is the control."""
    pipe, members, _ = models
    options = {"height": 16, "width": 16, "guidance_scale": 2.0, "images": 3}
    stacks = [pipeline_score(pipe, "a red circle", members=m, **options) for m in (None, members.chosen("a"), members)]
    x, t = torch.randn(stacks[0].shape, generator=seeded()), torch.tensor(0.5, dtype=torch.float64)
    alone, *others = (SoupScore(stack, members, WEIGHTS, mode) for stack in stacks)
    expected, base = alone(x, t), stacks[0](x, t)[0]
    index = torch.tensor([2, 0])
    for soup in others:
        torch.testing.assert_close(soup(x, t), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(soup.rows(index)(x[index], t), expected[index], rtol=1e-5, atol=1e-5)
    assert (expected - base).abs().max() > 1e-2
    assert torch.equal(stacks[2](x, t, [0])[0], base)  # and it leaves the stack alone
    with pytest.raises(ValueError, match="one preference"):
        SoupScore(stacks[2], members, Preference(EACH), mode)


def test_knobs_read_and_weigh_and_do_nothing_else(models):
    pipe, members, _ = models
    with blend(pipe, members, WEIGHTS) as knobs:
        pipe("a red circle", **tiny_call(pipe, 2))
    assert {name for name in dir(knobs) if not name.startswith("_")} == {
        "calls", "certificate", "certificates", "disagreement", "effective_samples", "ess", "evaluations",
        "log_weights", "members", "nats", "notes", "preference", "reason", "resampled",
    }  # fmt: skip
    with pytest.raises(AttributeError):
        knobs.calls = 0
