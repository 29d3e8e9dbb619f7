"""``sdeblend generate``: files, resume, refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from stablediffusion.command import main, sweep_points
from stablediffusion.testing import tiny_lora, tiny_pipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    pipe = tiny_pipeline("sd15", seed=1)
    for i, name in enumerate("ab"):
        tiny_lora(pipe, folder / f"{name}.safetensors", seed=i + 1)
    pipe.save_pretrained(folder / "pipe")
    return folder


def arguments(model, out, **changes):
    options = {
        "model": str(model / "pipe"),
        "weights": "a=0.3,b=0.7",
        "prompt": "a red circle",
        "images": "2",
        "steps": "3",
        "out": str(out),
    } | changes
    members = [f"--member={name}={model / name}.safetensors" for name in "ab"]
    return members + [f"--{name}={value}" for name, value in options.items() if value is not None]


def pixels(path):
    return np.asarray(Image.open(path))


def test_images_sheet_and_record(model, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(arguments(model, out, sweep="a=0:1:3", strength="1.2")) == 0
    record = json.loads((out / "run.json").read_text())
    assert capsys.readouterr().out.strip() == str(out / "run.json")
    assert [r["coefficients"]["a"] for r in record["results"].values()] == pytest.approx([0, 0.6, 1.2])
    assert [r["coefficients"]["base"] for r in record["results"].values()] == pytest.approx([-0.2] * 3)
    for result in record["results"].values():
        assert len(result["certificate"]["per_image"]) == 2
        assert len(result["certificate"]["profile"]) == 3
        assert all((out / name).is_file() for name in result["files"])
    assert pixels(out / "sheet.png").shape[0] == 3 * (16 + 14)
    first, last = (pixels(out / f"point-00{k}-seed-0.png").astype(int) for k in (0, 2))
    assert abs(first - last).max() > 5


def test_a_rerun_resumes_and_overwrites_nothing(model, tmp_path):
    out = tmp_path / "out"
    settings = arguments(model, out, sweep="a=0:1:3")
    main(settings)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    times = {path: path.stat().st_mtime_ns for path in out.glob("point*")}
    main(settings)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert {path: path.stat().st_mtime_ns for path in out.glob("point*")} == times
    # interrupted: the record knows two points, one image of the second is gone
    record = json.loads(before["run.json"])
    del record["results"]["2"]
    (out / "run.json").write_text(json.dumps(record))
    (out / "point-001-seed-1.png").unlink()
    main(settings)
    after = {path.name: path.read_bytes() for path in out.iterdir()}
    assert after.keys() == before.keys()
    assert all(after[name] == before[name] for name in before if name.endswith(".png"))
    assert times[out / "point-000-seed-0.png"] == (out / "point-000-seed-0.png").stat().st_mtime_ns
    with pytest.raises(ValueError, match="other settings"):
        main(arguments(model, out, sweep="a=0:1:3", seed="5"))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == after


@pytest.mark.parametrize("options", [{"mode": "ls"}, {"mode": "soup"}, {"mode": "soup-factors"}, {"eta": "0"}])
def test_modes_without_a_certificate_say_why(options, model, tmp_path):
    main(arguments(model, tmp_path, **options))
    result = json.loads((tmp_path / "run.json").read_text())["results"]["0"]
    assert result["certificate"] is None
    assert result["reason"]


def test_resampling_is_recorded(model, tmp_path):
    main(arguments(model, tmp_path, correct="resample", images="4"))
    result = json.loads((tmp_path / "run.json").read_text())["results"]["0"]
    assert len(result["log_weights"]) == 4
    assert result["resampled"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "a=0.3,c=0.7"}, "must name members"),
        ({"weights": "a"}, "NAME=VALUE"),
        ({"weights": "a=x"}, "finite number"),
        ({"sweep": "c=0:1:3"}, "NAME=FROM:TO:COUNT"),
        ({"sweep": "a=0:1"}, "NAME=FROM:TO:COUNT"),
        ({"images": "0"}, "at least 1"),
        ({"mode": "ls", "strength": "3"}, "probabilities"),
    ],
)
def test_settings_that_cannot_be_used(changes, message, model, tmp_path):
    with pytest.raises(ValueError, match=message):
        main(arguments(model, tmp_path / "out", **changes))
    assert not list(tmp_path.glob("out/*.png"))


def test_a_sweep_keeps_the_sum_and_the_proportions():
    points = sweep_points({"a": 0.2, "b": 0.6, "c": 0.2}, "a=0:1:3")
    assert points[1] == pytest.approx({"a": 0.5, "b": 0.375, "c": 0.125})
    assert all(sum(p.values()) == pytest.approx(1) for p in points)
    assert sweep_points({"a": 0.2}, None) == [{"a": 0.2}]


def test_the_record_reproduces_the_image(model, tmp_path):
    """What the file says is enough to make the image again by hand."""
    from diffusers import DiffusionPipeline

    from sdeblend import Preference
    from stablediffusion import blend, load_members

    main(arguments(model, tmp_path))
    record = json.loads((tmp_path / "run.json").read_text())
    pipe = DiffusionPipeline.from_pretrained(record["settings"]["model"])
    pipe.set_progress_bar_config(disable=True)
    members = load_members(pipe, record["settings"]["member"])
    result = record["results"]["0"]
    with blend(pipe, members, Preference(record["points"][0], record["settings"]["strength"])):
        generator = torch.Generator().manual_seed(result["seeds"][1])
        image = pipe(
            record["settings"]["prompt"], negative_prompt="", num_inference_steps=3, eta=1.0, generator=generator
        ).images[0]
    difference = np.asarray(image).astype(int) - pixels(tmp_path / result["files"][1])
    assert abs(difference).max() <= 1
