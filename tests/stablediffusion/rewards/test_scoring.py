"""Rewards by name, and scores that one bad image does not spoil."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdeblend.evaluate.plan import load_plan
from sdeblend.evaluate.run import evaluate
from sdeblend.evaluate.store import Folder
from sdeblend.reward import Reward
from sdeblend.shell.processes import Processes
from stablediffusion.rewards import REWARDS
from stablediffusion.rewards.registry import image_reward
from stablediffusion.rewards.scoring import Prompts, score_each
from tests.support.strategies import refuses

PROMPTS = Prompts(("a ring", "a bad ring", "a square"))


def pictures(count=3, seed=0):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def reward(function, name="made up"):
    return Reward(name, function, False, "units")


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


def test_scores_have_gradients_where_they_are_asked_for(tmp_path):
    images = pictures().requires_grad_()
    values, failures = score_each({"bad": reward(refuses_bad)}, images, PROMPTS, keep=tmp_path, differentiate=True)
    (gradient,) = torch.autograd.grad(values["bad"][[0, 2]].sum(), images)
    torch.testing.assert_close(gradient[[0, 2]], torch.full((2, 3, 16, 16), 1 / 768))
    assert len(failures) == 1 and (tmp_path / "bad-1.png").exists() and not bool(gradient[1].any())
    assert not score_each({"bad": reward(refuses_bad)}, images, PROMPTS)[0]["bad"].requires_grad


STEERED = ("steer-difference", "steer-maximum", "steer-sum")
CONFIG = """
[backend]
kind = "pipeline"
captions = 1
guidances = [1.0]
steps = 4
members = { vivid = "vivid", picky = "vivid" }
[grid]
methods = ["mpa", "code", "best-of-n", "steer-difference", "steer-maximum", "steer-sum", "guidance"]
seeds = 4
[methods]
code = { candidates = 2, block = 2 }
best-of-n = { candidates = 2 }
steer-difference = { every = 2 }
steer-maximum = { every = 2 }
steer-sum = { every = 2 }
"""


@pytest.mark.parametrize("how", ["raises", "nan"])
def test_a_reward_that_fails_on_the_way_costs_that_image_alone(tmp_path, monkeypatch, how):
    """Searches, steering and guidance go on without it; it is told, and the image kept."""
    worst = [torch.empty(0)]

    def picky(images, condition):
        values = images.mean((1, 2, 3))
        if len(images) > 1:  # and not each by itself, after an error
            worst[0] = images[values.argmax()].detach().clone()
        bad = (images == worst[0]).flatten(1).all(1)
        if how == "raises" and bool(bad.any()):
            raise RuntimeError("cannot read this")
        return torch.where(bad, torch.nan, values)

    monkeypatch.setitem(REWARDS, "picky", Reward("picky", picky, True, "none"))
    (tmp_path / "c.toml").write_text(CONFIG)
    plan, folder = load_plan(tmp_path / "c.toml"), Folder(tmp_path / "out")
    notes = evaluate(plan, folder, world=Processes())
    cells = [folder.read(key) for key in folder.stored()]
    assert len(cells) == 7 and not any(record.failed or record.left_out for record, _, _ in cells)
    kept = [Path(place) for note in notes for place in re.findall(r"failed on image \d+ \((.+?\.png)\)", note)]
    assert len(set(kept)) == len(kept) == len(notes) == len(list((tmp_path / "out" / "failed").glob("*.png")))
    assert all(("RuntimeError: cannot read this" if how == "raises" else "its value is nan") in note for note in notes)
    asked = Counter(path.name.partition("-")[0] for path, note in zip(kept, notes, strict=True) if "on the way" in note)
    found = {record.method: (asked[key], rows) for key, (record, rows, _) in zip(folder.stored(), cells, strict=True)}
    # As often as a method asks, and once more for the rows.
    assert {name: times for name, (times, _) in found.items()} == {
        "mpa": 0, "code": 2, "best-of-n": 1, "guidance": 4, **dict.fromkeys(STEERED, 2)
    }  # fmt: skip
    for name, (_, rows) in found.items():
        lost = [row.log_weight is None for row in rows if row.rewards["picky"] is None]
        assert lost == [name in STEERED] and sum(row.log_weight is None for row in rows) < 3


def test_a_reward_that_always_fails_costs_the_methods_that_need_it(tmp_path, monkeypatch):
    def broken(images, condition):
        raise RuntimeError("no weights")

    monkeypatch.setitem(REWARDS, "picky", Reward("picky", broken, True, "none"))
    (tmp_path / "c.toml").write_text(CONFIG)
    plan, folder = load_plan(tmp_path / "c.toml"), Folder(tmp_path / "out")
    notes = evaluate(plan, folder, world=Processes())
    failed = {record.method: record.failed for record, _, _ in map(folder.read, folder.stored())}
    assert len(failed) == 7 and not failed.pop("mpa")
    assert all("finite for at least one of" in why for why in failed.values())
    assert sum("finite for at least one of" in note for note in notes) == 6
    assert evaluate(plan, folder, world=Processes(), resume=True) == []


def test_rewards_by_name():
    assert image_reward("vivid") is REWARDS["vivid"]
    assert image_reward("torch:sum").function is torch.sum
    refuses(lambda: image_reward("beauty"), "compress", "package.module:function", "'beauty'")
    refuses(lambda: image_reward("vivid", "somewhere"), "takes no options", "'somewhere'")
