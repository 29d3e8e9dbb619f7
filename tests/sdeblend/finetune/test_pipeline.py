"""Pipelines within a trainer: what is evaluated at once for a gradient, guidance, and members to go on from."""

from __future__ import annotations

import pytest
import torch

from sdeblend.finetune.trainers import TRAINERS
from sdeblend.reward import WeightedReward
from stablediffusion.finetune.tunable import PipelineTunable
from stablediffusion.rewards import image_reward
from stablediffusion.testing import tiny_pipeline
from tests.support.strategies import generator, refuses

REWARD = WeightedReward({"vivid": image_reward("vivid")})


def tunable(seed=1, dtype=torch.float32, **options):
    pipe = tiny_pipeline("sd15", seed=seed, dtype=dtype)
    return PipelineTunable(pipe, ["a red circle", "a ring"], height=16, width=16, **options)


def changed(model, size=0.05):
    """Make the adapter do something."""
    for i, (_, factor) in enumerate(sorted(model.trainable().items())):
        factor.data.copy_(size * torch.randn(factor.shape, generator=generator(i)))
    return model


@pytest.mark.parametrize("name", TRAINERS)
def test_gradients_are_accumulated_within_the_graded_batch(name):
    """The largest pass that keeps anything for a gradient is the model's cap, and the gradient that of the whole."""
    kind = TRAINERS[name]
    few = {"dpok": {"updates": 1, "batch": 12, "value_updates": 1}, "ddpo": {"updates": 1}}.get(name, {})
    gradients, largest = [], []
    for cap in (3, 64):
        model, seen = changed(tunable(graded_batch=cap)), [0]
        rows = lambda network, inputs, seen=seen: seen.append(len(inputs[0]) * torch.is_grad_enabled())  # noqa: E731
        model.network.register_forward_pre_hook(rows)
        trainer = kind(model, REWARD, kind.settings_class(
            kl_weight=0.1, groups=2, group_size=4, steps=3, clip_norm=float("inf"), **few))  # fmt: skip
        trainer.iterate()
        largest.append(max(seen))
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.parameters]))
    assert largest[0] == 3 and largest[1] >= 8
    assert gradients[1].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-4 * float(gradients[1].abs().max()), rtol=1e-3)


def test_computing_again_changes_no_gradient_of_backprop():
    """As is the default with a path; base and tuned network are one, with the adapter off and on."""
    kind = TRAINERS["backprop"]
    gradients = []
    for recompute, checkpointing in ((False, False), (True, False), (True, True)):
        model = changed(tunable(checkpointing=checkpointing))
        trainer = kind(model, REWARD, kind.settings_class(kl_weight=0.1, group_size=2, steps=3, recompute=recompute))
        trainer.iterate()
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.parameters]))
    for again in gradients[1:]:
        torch.testing.assert_close(again, gradients[0], atol=1e-5, rtol=1e-4)


def test_the_graded_batch_fits_where_the_batch_does():
    """A quarter of the batch, half of that with guidance, and all where activations are computed again."""
    assert tunable().graded_batch == 4
    assert tunable(guidance=3.0).graded_batch == 2
    assert tunable(checkpointing=True).graded_batch == 16
    assert tunable(batch=2, guidance=3.0).graded_batch == 1
    model, seen = tunable(decode_batch=8), []
    decode = model.pipe.vae.decode
    model.pipe.vae.decode = lambda x, *args, **options: seen.append(len(x)) or decode(x, *args, **options)
    x = torch.randn((5, *model.event), generator=generator(0))
    images = model.decode(x)
    assert seen == [5]
    again = model.decode(x.requires_grad_())
    assert seen == [5, 2, 2, 1]
    torch.testing.assert_close(again, images, atol=1e-5, rtol=1e-4)
    again.square().sum().backward()
    whole = x.detach().clone().requires_grad_()
    model.decode_batch = 64
    model.decode(whole).square().sum().backward()
    torch.testing.assert_close(x.grad, whole.grad, atol=1e-5, rtol=1e-4)


def test_regression_refuses_guidance():
    """Which no forward process has for its score; the chain's own trainers take it."""
    for name in TRAINERS:
        kind = TRAINERS[name]
        guided = lambda kind=kind: kind(tunable(guidance=3.0), REWARD, kind.settings_class(steps=3))  # noqa: E731
        if name == "regression":
            refuses(guided, "takes no guidance, got g = 3", "choose another trainer")
        else:
            assert guided().calibrated


def test_a_member_of_another_base_is_not_loaded_to_go_on(tmp_path):
    model = changed(tunable(), 0.3)
    path = model.save(tmp_path / "a.safetensors", {"sdeblend.base": model.identity()})
    other, condition = tunable(seed=2), model.condition(["a ring"] * 2)
    x, t = torch.randn((2, *model.event), generator=generator(0)), torch.tensor([0.2, 0.8], dtype=torch.float64)
    refuses(lambda: other.load(path), "needs the base it was tuned on", "the pipeline it was made for")
    assert torch.equal(other.tuned(x, t, condition), other.base(x, t, condition))
    tunable(dtype=torch.bfloat16).load(path)
    other.load(model.save(tmp_path / "b.safetensors", {}))
    assert not torch.equal(other.tuned(x, t, condition), other.base(x, t, condition))
