"""The bundled members: what they are tuned on, what their files say, and that blends of them draw."""

import json
import math

import pytest
import torch

from sdeblend import Preference, cli
from stablediffusion import load_members
from stablediffusion.bundled import MEMBERS, bundled_member, bundled_names
from stablediffusion.small import demo, load_small, members
from stablediffusion.small.cells import draw_cell
from stablediffusion.small.drawing import draw
from stablediffusion.small.scenes import Scene, Thing, held_out
from tests.strategies import refuses

PROMPTS = ("a large red circle on a striped blue background", "a ring on a checkered background")


@pytest.fixture(scope="module")
def pipe():
    return load_small()


@pytest.fixture
def loaded(pipe):
    found = load_members(pipe, {name: bundled_member(name) for name in ("compress", "vivid")})
    yield found
    found.remove()


def test_tilted_drawings_move_the_rewards_and_the_control_does_not(monkeypatch):
    for name, value in {"CAPTIONS": 40, "CANDIDATES": 64, "KEPT": 6}.items():
        monkeypatch.setattr(members, name, value)
    captions, pictures, nats = members.tilted_drawings(tuple(members.RECIPES))
    assert len(captions) == 40 and "" in captions
    means = {name: members.rewards_of(p.flatten(0, 1).float() / 255) for name, p in pictures.items()}

    def moved(name, reward):
        a, b = means[name][reward].reshape(40, -1).mean(1), means["control"][reward].reshape(40, -1).mean(1)
        return float((a - b).mean() / ((a - b).std() / math.sqrt(40)))

    assert moved("compress", "compress") > 5 and moved("vivid", "vivid") > 5
    assert abs(moved("compress", "vivid")) < moved("vivid", "vivid")
    assert nats["control"] == pytest.approx(0, abs=1e-9)
    assert 0 < nats["compress-half"] < nats["compress"] < math.log(64)


def test_candidates_keep_what_the_caption_says():
    mentioned = Scene((Thing("circle", "red"),), "blue")
    found = members.candidates(mentioned, 50, torch.Generator().manual_seed(0))
    assert len(found) == 50 and len({(s.texture, s.things[0].position) for s in found}) > 5
    assert all(s.things[0].shape == "circle" and s.things[0].colour == "red" for s in found)
    assert all(s.background == "blue" and not held_out(s) for s in found)


def test_a_step_on_tilted_drawings_reaches_the_adapter_alone(pipe):
    model = members.tunable(pipe)
    images = draw(members.candidates(Scene(()), 4, torch.Generator().manual_seed(0)))
    loss = members.denoising_loss(model, images, model.condition(["a circle"] * 4), torch.Generator().manual_seed(1))
    loss.backward()
    assert any(float(p.grad.abs().sum()) > 0 for p in model.trainable().values())
    frozen = [p for p in pipe.unet.parameters() if not any(p is q for q in model.trainable().values())]
    assert frozen and all(p.grad is None for p in frozen)
    pipe.unet.delete_adapters("tuned")


def test_files_are_small_and_say_what_they_are(loaded):
    assert {"compress", "vivid", "compress-half", "morl-25", "morl-50", "morl-75"} <= {*bundled_names()}
    assert "control" not in bundled_names()
    assert all(path.stat().st_size < 5e5 for path in MEMBERS.glob("*.safetensors"))
    assert loaded["compress"].kl_weight == members.KL_WEIGHT
    assert dict(loaded["vivid"].reward) == {"vivid": 1.0}
    refuses(lambda: bundled_member("nothing"), "the bundled model's members are")


def test_one_member_is_the_same_blended_and_averaged_and_strength_zero_is_the_base(pipe, loaded):
    settings = {"prompts": PROMPTS, "each": 1, "steps": 4}
    alone = [draw_cell(pipe, loaded, Preference({"vivid": 1.0}), mode=m, **settings) for m in ("mpa", "soup")]
    torch.testing.assert_close(alone[0].images, alone[1].images, atol=1e-4, rtol=0)
    bases = [draw_cell(pipe, loaded, Preference({name: 0.0}), **settings) for name in ("compress", "vivid")]
    assert torch.equal(bases[0].images, bases[1].images)
    assert float((alone[0].images - bases[0].images).abs().mean()) > 1e-3
    mixed = draw_cell(pipe, loaded, Preference({"compress": 0.5, "vivid": 0.5}), **settings)
    assert bool((mixed.nats > 0).all()) and float(alone[0].nats.abs().max()) < 1e-9
    assert mixed.evaluations == 2 * alone[0].evaluations


def test_generate_needs_no_model(tmp_path, capsys):
    prompt = ["--prompt", PROMPTS[0], "--images", "1", "--steps", "2", "--out", str(tmp_path / "run")]
    assert cli.main(["generate", "--weights", "compress=0.3,vivid=0.7", *prompt]) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["settings"]["model"] == "bundled" and record["settings"]["guidance"] == 3.0
    assert cli.main(["generate", "--weights", "dull=1", *prompt[:-1], str(tmp_path / "other")]) == 2
    assert "the bundled model's members are" in capsys.readouterr().err


def test_the_demo_draws_its_sheet(tmp_path, capsys):
    assert demo.main(["--out", str(tmp_path / "sheet.png"), "--images", "4", "--steps", "2"]) == 0
    numbers = json.loads((tmp_path / "sheet.json").read_text())
    assert len(numbers) == len(demo.MODES) * len(demo.WEIGHTS)
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
    assert "certificate" in capsys.readouterr().out
