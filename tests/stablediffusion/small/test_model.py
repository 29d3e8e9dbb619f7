"""The bundled model: its files, and that it draws what a caption says on combinations it never saw."""

from __future__ import annotations

import fnmatch
import json
import math
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from stablediffusion.making.measure_model import main, sheet, table
from stablediffusion.making.pipeline import generate
from stablediffusion.scenes.captions import caption, held_out_captions
from stablediffusion.scenes.scorer import WEIGHTS, accuracies
from stablediffusion.small import load_small
from stablediffusion.small.files import MODEL, SMALL
from tests.support.strategies import generator

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def pipe():
    return load_small()


def test_the_files_are_small_and_in_half_precision():
    files = [path for path in MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 10_000_000
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) == 3 and not [path for path in files if path.suffix in (".bin", ".pt", ".pkl")]
    for path in weights:
        with safe_open(path, "pt") as file:
            floats = {file.get_slice(key).get_dtype() for key in file.keys()} - {"I64"}  # noqa: SIM118
        assert floats == {"F16"}, path


def test_every_file_is_packaged():
    globs = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["*"]
    files = [path for path in MODEL.rglob("*") if path.is_file()]
    files += [WEIGHTS, *(SMALL / name for name in ("training.json", "evaluation.json", "MODEL_CARD.md"))]
    assert all(path.exists() and any(fnmatch.fnmatch(path.name, glob) for glob in globs) for path in files)


def test_the_pipeline_is_stable_diffusion_with_v_prediction(pipe):
    config = pipe.scheduler.config
    assert type(pipe).__name__ == "StableDiffusionPipeline" and config.prediction_type == "v_prediction"
    assert (config.beta_schedule, config.beta_start, config.beta_end) == ("scaled_linear", 0.00085, 0.012)
    assert not config.clip_sample and config.steps_offset == 1
    assert pipe.unet.dtype == torch.float32 and pipe.safety_checker is None
    assert pipe.unet.config.sample_size * 4 == 32


def test_it_draws_captions_of_combinations_it_never_saw(pipe):
    n = 48
    _, mentioned = held_out_captions(n, seed=11)
    images = generate(pipe, [caption(scene) for scene in mentioned], generator(12), steps=20)
    right, shuffled = accuracies(images, mentioned), accuracies(images.roll(1, 0), mentioned)
    for factor in ("background", "colour", "shape", "position"):
        drawn, control = right[factor], shuffled[factor]
        # two standard errors of the difference at most uncertain; the control must stay near chance
        error = math.sqrt(0.25 / drawn["n"] + 0.25 / control["n"])
        assert drawn["accuracy"] > control["accuracy"] + 2 * error, (factor, drawn, control)
    assert right["background"]["accuracy"] >= 0.85 and shuffled["background"]["accuracy"] < 0.5


def test_the_same_seed_draws_the_same_image(pipe):
    prompt = ["a large red circle on a blue striped background"]
    first, again, other = (generate(pipe, prompt, generator(seed), steps=4) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == (1, 3, 32, 32) and first.min() >= -1 and first.max() <= 1


def test_the_model_card_states_the_measured_numbers():
    card, measured = (SMALL / "MODEL_CARD.md").read_text(), json.loads((SMALL / "evaluation.json").read_text())
    for part in ("one object", "two objects"):
        assert table(measured[part]) in card, "paste what the evaluation prints"


def test_the_records_are_json_for_strict_readers(tmp_path):
    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    main(["--images", "8", "--steps", "1", "--out", str(tmp_path)])
    written = tmp_path / "evaluation.json"
    for path in (written, SMALL / "evaluation.json", SMALL / "training.json"):
        json.loads(path.read_text(), parse_constant=refuse)
    part = json.loads(written.read_text())["one object"]
    assert part["generated"]["second shape"] == {"accuracy": None, "error": None, "n": 0}
    assert "second" not in table(part) and "| shape (n = " in table(part)


def test_a_sheet_shows_the_images_row_by_row():
    images = torch.linspace(-1, 1, 6)[:, None, None, None].expand(6, 3, 2, 2)
    picture = sheet(images, columns=3, zoom=1)
    assert picture.size == (6, 4)
    assert [picture.getpixel((x, y))[0] for y in (0, 2) for x in (0, 2, 4)] == [0, 51, 102, 153, 204, 255]
