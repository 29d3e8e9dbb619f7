"""The bundled members: what their files say, and that blends of them draw."""

import json

import pytest
import torch

from sdeblend import Preference
from sdeblend.shell import cli
from stablediffusion import load_members
from stablediffusion.making.recipes import KL_WEIGHT
from stablediffusion.small import demo, load_small
from stablediffusion.small.cells import draw_cell
from stablediffusion.small.files import GUIDANCE, MEMBERS, bundled_member, bundled_names
from tests.support.strategies import refuses

PROMPTS = ("a large red circle on a striped blue background", "a ring on a checkered background")


@pytest.fixture(scope="module")
def pipe():
    return load_small()


@pytest.fixture
def loaded(pipe):
    found = load_members(pipe, {name: bundled_member(name) for name in ("compress", "vivid")})
    yield found
    found.remove()


def test_files_are_small_and_say_what_they_are(loaded):
    assert {"compress", "vivid", "align", "compress-half", "morl-25", "morl-50", "morl-75"} <= {*bundled_names()}
    assert "control" not in bundled_names() and bundled_member("compress+vivid") == bundled_member("morl-50")
    assert all(path.stat().st_size < 5e5 for path in MEMBERS.glob("*.safetensors"))
    assert loaded["compress"].kl_weight == KL_WEIGHT
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
    assert record["settings"]["model"] == "bundled" and record["settings"]["guidance"] == GUIDANCE
    assert cli.main(["generate", "--weights", "dull=1", *prompt[:-1], str(tmp_path / "other")]) == 2
    assert "the bundled model's members are" in capsys.readouterr().err


def test_the_demo_draws_its_sheet(tmp_path, capsys):
    assert demo.main(["--out", str(tmp_path / "sheet.png"), "--images", "4", "--steps", "2"]) == 0
    numbers = json.loads((tmp_path / "sheet.json").read_text())
    assert len(numbers) == len(demo.MODES) * len(demo.WEIGHTS)
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
    assert "certificate" in capsys.readouterr().out
