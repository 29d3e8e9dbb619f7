"""``sdeblend generate``: files, resume, refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UniPCMultistepScheduler
from PIL import Image

from sdeblend import Preference
from sdeblend.shell import cli
from stablediffusion import blend, load_members
from stablediffusion.generate.command import main
from stablediffusion.generate.options import sweep_points
from stablediffusion.generate.run import Run, _scheduler
from stablediffusion.testing import tiny_lora, tiny_pipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    pipe = tiny_pipeline("sd15", seed=1)
    for i, name in enumerate("ab"):
        tiny_lora(pipe, folder / f"{name}.safetensors", seed=i + 1)
    (folder / "damaged.safetensors").write_bytes((folder / "a.safetensors").read_bytes()[:100])
    tiny_lora(tiny_pipeline("sdxl"), folder / "other.safetensors", seed=1)
    pipe.save_pretrained(folder / "pipe")
    return folder


def arguments(folder, out, **changes):
    options = {
        "model": str(folder / "pipe"),
        "weights": "a=0.3,b=0.7",
        "prompt": "a red circle",
        "images": "2",
        "steps": "3",
        "out": str(out),
    } | changes
    members = [f"--member={name}={folder / name}.safetensors" for name in "ab"]
    return members + [f"--{name}={value}" for name, value in options.items() if value is not None]


def pixels(path):
    return np.asarray(Image.open(path))


def contains(sheet, image):
    windows = np.lib.stride_tricks.sliding_window_view(sheet, image.shape)[:, :, 0]
    return bool((windows == image).all((-1, -2, -3)).any())


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
        assert result["certificate"]["standard_error"] > 0
        pairs = result["certificate"]["disagreement"]
        assert list(pairs) == ["base | a", "base | b", "a | b"]
        assert [sum(step) for step in zip(*pairs.values(), strict=True)] == pytest.approx(
            result["certificate"]["profile"], rel=1e-6
        )
        assert set(result["effective_samples"]) == {"plain", "resampled"}
        assert result["notes"] == [] and result["versions"]["diffusers"]
    sheet = Image.open(out / "sheet.png").convert("L")
    # rows have their weights on the left, columns their seeds on top, and the pictures are in the cells
    boxes = [sheet.crop((0, 0, sheet.width, 30)), sheet.crop((0, 60, 60, sheet.height))]
    assert all((np.asarray(box) < 128).sum() > 50 for box in boxes)
    assert contains(pixels(out / "sheet.png"), pixels(out / "point-002-seed-1.png"))
    assert not contains(pixels(out / "sheet.png"), pixels(out / "point-002-seed-1.png")[::-1])
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


def files(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_an_interrupt_keeps_what_is_finished(model, tmp_path, monkeypatch):
    """Stopped in its second point, the run goes on there, to the same pictures; an empty file counts as missing."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    main(arguments(model, whole, sweep="a=0:1:3"))
    finish = Run._finish_point

    def stopped(self, pipe, members, k, bar):
        if k == 1:
            raise KeyboardInterrupt
        finish(self, pipe, members, k, bar)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_finish_point", stopped)
        with pytest.raises(KeyboardInterrupt):
            main(arguments(model, out, sweep="a=0:1:3"))
    assert list(json.loads((out / "run.json").read_text())["results"]) == ["0"]
    assert not (out / "sheet.png").exists()
    first = files(out)
    main(arguments(model, out, sweep="a=0:1:3"))
    after = files(out)
    assert all(after[name] == first[name] for name in first if name.endswith(".png"))
    assert after.keys() == files(whole).keys()
    assert all(after[name] == content for name, content in files(whole).items() if name.endswith(".png"))
    (out / "point-002-seed-0.png").write_bytes(b"")
    main(arguments(model, out, sweep="a=0:1:3"))
    assert files(out) == after


def test_a_failed_rerun_leaves_the_result_alone(model, tmp_path, monkeypatch):
    """The finished record is never replaced by an emptier one, also when a picture is missing and cannot be made."""
    main(arguments(model, tmp_path, sweep="a=0:1:2"))
    (tmp_path / "point-001-seed-0.png").unlink()
    before = files(tmp_path)

    def broken(self):
        raise ValueError("no model")

    monkeypatch.setattr(Run, "_pipeline", broken)
    with pytest.raises(ValueError, match="no model"):
        main(arguments(model, tmp_path, sweep="a=0:1:2"))
    assert files(tmp_path) == before


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"results": {"0": {}}}', '{"results": 3}'])
def test_a_record_that_is_none_is_left_alone(content, model, tmp_path):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"other settings|must be a record"):
        main(arguments(model, tmp_path))
    assert files(tmp_path) == {"run.json": content.encode()}


def test_one_image_is_recorded_as_json(model, tmp_path):
    """Its standard error is infinite, which JSON cannot hold."""
    main(arguments(model, tmp_path, images="1"))

    def refuse(constant):
        raise AssertionError(constant)

    text = (tmp_path / "run.json").read_text()
    certificate = json.loads(text, parse_constant=refuse)["results"]["0"]["certificate"]
    assert certificate["standard_error"] is None
    assert certificate["normalised"] is False and certificate["nats"] > 0


@pytest.mark.parametrize("options", [{"mode": "ls"}, {"mode": "soup"}, {"mode": "soup-factors"}, {"eta": "0"}])
def test_modes_without_a_certificate_say_why(options, model, tmp_path):
    main(arguments(model, tmp_path, **options))
    result = json.loads((tmp_path / "run.json").read_text())["results"]["0"]
    assert result["certificate"] is None
    assert result["reason"]


@pytest.mark.parametrize(
    ("family", "sampler", "message"),
    [
        ("sd15", "flow-ancestral", "give ddim or ddpm or euler-a or keep"),
        ("sd3", "ddim", "give flow-ancestral or keep"),
    ],
)
def test_a_sampler_suits_its_model(family, sampler, message):
    with pytest.raises(ValueError, match=message):
        _scheduler(tiny_pipeline(family), sampler, 1.0)


def test_multistep_schedulers_keep_their_flow_and_its_shift():
    pipe = tiny_pipeline("sd3")
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    pipe.scheduler = UniPCMultistepScheduler(**flow)
    assert _scheduler(pipe, "auto", 1.0) is pipe.scheduler
    ancestral = _scheduler(pipe, "flow-ancestral", 0.5)
    assert (ancestral.config.shift, ancestral.config.eta) == (3.0, 0.5)


def test_a_flow_model_is_certified_with_flow_ancestral(tmp_path):
    pipe = tiny_pipeline("sd3", seed=1)
    for i, name in enumerate("ab"):
        tiny_lora(pipe, tmp_path / f"{name}.safetensors", seed=i + 1)
    pipe.save_pretrained(tmp_path / "pipe")
    results = {}
    for sampler, eta in (("auto", "1"), ("flow-ancestral", "0.5"), ("flow-ancestral", "0")):
        out = tmp_path / f"{sampler}-{eta}"
        main(arguments(tmp_path, out, sampler=sampler, eta=eta))
        results[sampler, eta] = json.loads((out / "run.json").read_text())["results"]["0"]
    assert "FlowAncestral" in results["auto", "1"]["reason"] and "eta=1" in results["flow-ancestral", "0"]["reason"]
    assert results["flow-ancestral", "0.5"]["certificate"]["nats"] > 0


def test_resampling_is_recorded(model, tmp_path):
    main(arguments(model, tmp_path, correct="resample", images="4"))
    result = json.loads((tmp_path / "run.json").read_text())["results"]["0"]
    assert len(result["log_weights"]) == 4
    assert result["resampled"]
    assert result["effective_samples"]["resampled"] > result["effective_samples"]["plain"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "a=0.3,c=0.7"}, "must name members"),
        ({"weights": "a"}, "NAME=VALUE"),
        ({"weights": "a=x"}, "finite number"),
        ({"sweep": "c=0:1:3"}, "NAME=FROM:TO:COUNT"),
        ({"sweep": "a=0:1"}, "NAME=FROM:TO:COUNT"),
        ({"images": "0"}, "at least 1"),
        ({"height": "0"}, "at least 8"),
        ({"steps": "x"}, "invalid int value"),
        ({"mode": "best"}, "invalid choice"),
        ({"strength": "nan"}, "finite number"),
        ({"eta": "2"}, "from 0 to 1"),
        ({"seed": "-1"}, "--seed must be"),
        ({"mode": "ls", "strength": "3"}, "probabilities"),
        ({"mode": "ls", "correct": "resample"}, "mode='mpa'"),
        ({"eta": "0", "correct": "resample"}, "eta=1"),
        ({"device": "nowhere"}, "--device must be"),
        ({"model": "/nowhere"}, "--model must be"),
        ({"member": "b=/nowhere.safetensors"}, "new name each time"),
        ({"member": "c=/nowhere.safetensors"}, "does not exist"),
        ({"member": "c={folder}/damaged.safetensors"}, "whole safetensors file"),
        ({"member": "c={folder}/other.safetensors"}, "must load whole"),
    ],
    ids=str,
)
def test_bad_input_is_one_sentence_and_exit_code_2(changes, message, model, tmp_path, capsys):
    out = tmp_path / "out"
    options = {name: value.format(folder=model) for name, value in changes.items()}
    try:
        code = cli.main(["generate", *arguments(model, out, **options)])
    except SystemExit as stop:  # argparse's own
        code = stop.code
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sdeblend generate: ")]
    assert code == 2
    assert len(told) == 1 and message in told[0]
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("changes", "lines"),
    [({"weights": "a=.9,b=.9"}, 1), ({"weights": "a=.9,b=.9", "strength": "1.1"}, 0), ({"weights": "a=.9,b=.1"}, 0)],
    ids=str,
)
def test_weights_beyond_one_are_told_in_one_line(changes, lines, model, tmp_path, capsys):
    """What the base gets, and how to get weights that sum to one; a strength above 1 is meant."""
    options = {"images": "1", "steps": "1", "sweep": "a=0:1:2"} | changes
    assert cli.main(["generate", *arguments(model, tmp_path / "out", **options)]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "coefficient" in line]
    assert len(told) == lines
    assert all(line.startswith("sdeblend generate: warning: ") and "-0.8" in line for line in told)
    assert all("sum to one" in line for line in told)


def test_a_sweep_keeps_the_sum_and_the_proportions():
    points = sweep_points({"a": 0.2, "b": 0.6, "c": 0.2}, "a=0:1:3")
    assert points[1] == pytest.approx({"a": 0.5, "b": 0.375, "c": 0.125})
    assert all(sum(p.values()) == pytest.approx(1) for p in points)
    assert sweep_points({"a": 0.2}, None) == [{"a": 0.2}]


def test_the_record_reproduces_the_image(model, tmp_path):
    """What the file says is enough to make the image again by hand."""
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


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux", "flux2", "flux2-klein", "qwen-image", "z-image"])
def test_guidance_is_the_familys_own(family, tmp_path):
    """As the pipeline draws where nothing is said of it; true_cfg_scale does nothing without a negative prompt."""
    pipe = tiny_pipeline(family, seed=1)
    path = tiny_lora(pipe, tmp_path / "a.safetensors", seed=1)
    pipe.save_pretrained(tmp_path / "pipe")
    options = {"model": tmp_path / "pipe", "member": f"a={path}", "weights": "a=0.7", "prompt": "a red circle"}
    options |= {"images": 1, "steps": 2, "height": 16, "width": 16, "eta": 0, "out": tmp_path / "out"}
    assert main([f"--{name}={value}" for name, value in options.items()]) == 0
    call = {"prompt": "a red circle", "num_inference_steps": 2, "height": 16, "width": 16}
    if family == "qwen-image":
        call["negative_prompt"] = ""
    if family == "sdxl":
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    with blend(pipe, load_members(pipe, {"a": path}), Preference({"a": 0.7}), correct=None):
        expected = pipe(generator=torch.Generator().manual_seed(0), **call).images[0]
    made = pixels(tmp_path / "out" / "point-000-seed-0.png").astype(int)
    assert abs(made - np.asarray(expected)).max() <= 1
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    name = "true_cfg_scale" if family in ("flux", "qwen-image") else "guidance_scale"
    assert list(record["results"]["0"]["guidance"]) == [name]
    with blend(pipe, load_members(pipe, {"b": path}), Preference({"b": 0.7}), correct=None):
        call |= {name: 9.0} | ({} if family.startswith("flux2") else {"negative_prompt": ""})
        other = pipe(generator=torch.Generator().manual_seed(0), **call).images[0]
    assert abs(made - np.asarray(other)).max() > 5


@pytest.mark.parametrize(
    ("family", "task", "options", "message"),
    [
        ("flux2-klein", "text2img", {"negative": "blue"}, "--negative needs a pipeline that takes it, got Flux2Klein"),
        ("flux", "text2img", {"negative": "blue"}, "with true_cfg_scale=1; drop it"),
        ("sd15", "img2img", {}, "--model needs a text-to-image pipeline, got StableDiffusionImg2Img"),
        ("wan2.1", "text2img", {}, "--model needs a text-to-image pipeline, got Wan"),
    ],
)
def test_models_that_do_not_fit_are_refused(family, task, options, message, tmp_path, monkeypatch):
    pipe = tiny_pipeline(family, task, seed=1)
    path = tiny_lora(pipe, tmp_path / "a.safetensors", seed=1)
    monkeypatch.setattr("stablediffusion.generate.run.load_pipeline", lambda *args, **more: pipe)
    options |= {"member": f"a={path}", "model": "it", "weights": "a=1", "prompt": "a ring", "out": tmp_path / "out"}
    with pytest.raises(ValueError, match=message):
        main([f"--{name}={value}" for name, value in options.items()])
    assert not (tmp_path / "out").exists()
