"""Rewards by name, and scores that one bad image does not spoil."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from stablediffusion.rewards import REWARDS, ImageReward
from stablediffusion.scoring import Prompts, image_reward, score_each
from tests.strategies import refuses

PROMPTS = Prompts(("a ring", "a bad ring", "a square"))


def pictures(count=3, seed=0):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def reward(function, name="made up"):
    return ImageReward(name, function, False, "units")


def lengths(images, condition):
    return images.mean((1, 2, 3)) + torch.tensor([len(prompt) for prompt in condition.prompts])


def refuses_bad(images, condition):
    if any("bad" in prompt for prompt in condition.prompts):
        raise RuntimeError("cannot read\nthis")
    return lengths(images, condition)


def nan_for_bad(images, condition):
    bad = torch.tensor(["bad" in prompt for prompt in condition.prompts])
    return torch.where(bad, torch.inf, lengths(images, condition))


def only_one(images, condition):
    if len(images) > 1:
        raise MemoryError
    return lengths(images, condition)


@pytest.mark.rng_untouched
@pytest.mark.parametrize(("function", "part"), [(refuses_bad, "RuntimeError: cannot read"), (nan_for_bad, "inf")])
def test_one_bad_image_costs_itself_alone(function, part, tmp_path):
    """It is kept, named in one sentence, and NaN; all else is as without it."""
    images = pictures()
    images[1, 0, 0, 0] = torch.nan
    rewards = {"own.mod:f": reward(function), "vivid": REWARDS["vivid"], "length": reward(lengths)}
    values, failures = score_each(rewards, images, PROMPTS, keep=tmp_path / "kept", stem="cell-3")
    expected = lengths(images, PROMPTS)
    assert list(values) == list(rewards)
    torch.testing.assert_close(values["own.mod:f"][[0, 2]], expected[[0, 2]])
    torch.testing.assert_close(values["vivid"][[0, 2]], REWARDS["vivid"](images, None)[[0, 2]])
    assert all(bool(value[1].isnan()) and int(value.isnan().sum()) == 1 for value in values.values())
    assert len(failures) == 3 and not any("\n" in sentence for sentence in failures)
    path = tmp_path / "kept" / "cell-3-own.mod_f-1.png"
    assert "'own.mod:f' failed on image 1" in failures[0] and part in failures[0] and str(path) in failures[0]
    assert sorted(file.name for file in path.parent.iterdir()) == [
        "cell-3-length-1.png", "cell-3-own.mod_f-1.png", "cell-3-vivid-1.png"
    ]  # fmt: skip
    stored = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 255
    assert (stored - images[1].nan_to_num(0)).abs().max() <= 0.5 / 255 + 1e-6


def test_what_fails_together_may_succeed_alone():
    values, failures = score_each({"one": reward(only_one)}, pictures(), PROMPTS)
    assert torch.equal(values["one"], lengths(pictures(), PROMPTS)) and failures == []


def test_every_failure_is_told_whatever_it_is(tmp_path):
    """Another shape, no tensor, half precision, a folder that cannot be written."""
    images = pictures()
    values, failures = score_each(
        {"sum": reward(lambda x, _: x.sum()), "list": reward(lambda x, _: [1.0] * len(x)),
         "half": reward(lambda x, _: x.mean((1, 2, 3)).half())}, images, None,
    )  # fmt: skip
    assert values["half"].dtype == torch.float32 and bool(values["half"].isfinite().all())
    assert bool(values["sum"].isnan().all()) and bool(values["list"].isnan().all()) and len(failures) == 6
    assert "shape (1,), got shape ()" in failures[0] and "got list" in failures[3]
    (tmp_path / "file").write_text("in the way")
    _, failures = score_each({"bad": reward(refuses_bad)}, images, PROMPTS, keep=tmp_path / "file")
    assert len(failures) == 1 and "could not be kept" in failures[0]
    with pytest.raises(KeyboardInterrupt):
        score_each({"stop": reward(interrupt)}, images, PROMPTS)
    assert score_each({"vivid": REWARDS["vivid"]}, images[:0], None)[0]["vivid"].shape == (0,)


def interrupt(images, condition):
    raise KeyboardInterrupt


def test_rewards_by_name():
    assert image_reward("vivid") is REWARDS["vivid"]
    assert image_reward("torch:sum").function is torch.sum
    refuses(lambda: image_reward("beauty"), "compress", "package.module:function", "'beauty'")
    refuses(lambda: image_reward("vivid", "somewhere"), "loads no weights", "'somewhere'")
