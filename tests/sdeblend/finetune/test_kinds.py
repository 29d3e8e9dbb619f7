"""The kinds of model that are installed, through the command: mixtures and pipelines, alone and in two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sdeblend.finetune.config import load_tuning
from sdeblend.finetune.run import MEMBER, METRICS
from sdeblend.finetune.trainers import TRAINERS
from sdeblend.shell import cli
from stablediffusion import load_members, read_lora
from stablediffusion.small import load_small

ROOT = Path(__file__).resolve().parents[3]
MIXTURE = """
[model]
kind = "mixture"
problem = "line2"
width = 16
pretrain_steps = 2
[rewards]
left = 1.0
[trainer]
kl_weight = 0.5
iterations = 2
group_size = 16
steps = 4
[output]
folder = "FOLDER"
"""
PIPELINE = """
[model]
kind = "pipeline"
rank = 2
[rewards]
vivid = 4.0
[trainer]
kl_weight = 0.5
iterations = 2
groups = 2
group_size = 2
steps = 3
copies = 2
epochs = 1
[output]
folder = "FOLDER"
"""


def written(tmp_path: Path, text: str, *changes: tuple[str, str], folder: str = "out") -> Path:
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = tmp_path / f"{folder}.toml"
    path.write_text(text.replace("FOLDER", (tmp_path / folder).as_posix()))
    return path


def test_a_mixture_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["finetune", str(written(tmp_path, MIXTURE))]) == 0
    member = tmp_path / "out" / MEMBER
    assert capsys.readouterr().out.strip() == str(member)
    with safe_open(member, framework="pt") as file:
        about = file.metadata()
    assert about["sdeblend.kl_weight"] == "0.5" and about["sdeblend.trainer"] == "regression"
    assert about["sdeblend.base"].startswith("mixture-") and json.loads(about["sdeblend.reward"]) == {"left": 1.0}
    assert len((tmp_path / "out" / METRICS).read_text().splitlines()) == 2
    assert any(bool(value.any()) for name, value in load_file(member).items() if name.endswith("up"))


def test_the_bundled_pipeline_by_the_command(tmp_path: Path) -> None:
    assert cli.main(["finetune", str(written(tmp_path, PIPELINE))]) == 0
    member = tmp_path / "out" / MEMBER
    assert read_lora(member).about["iterations"] == "2"
    found = load_members(load_small(), {"vivid": member})["vivid"]
    assert (found.kl_weight, found.reward, found.guidance) == (0.5, {"vivid": 4.0}, 1.0)
    metrics = [json.loads(line) for line in (tmp_path / "out" / METRICS).read_text().splitlines()]
    assert [entry["reward_calls"] for entry in metrics] == [4, 8]


@pytest.mark.parametrize(("line", "parts"), [
    ("guidance = 3.0", ("takes no guidance, got g = 3", "another trainer")),
    ("graded_batch = 0", ("[model] graded_batch must be at least 1",)),
])  # fmt: skip
def test_what_a_pipeline_refuses_by_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, parts: tuple[str, ...]
) -> None:
    assert cli.main(["finetune", str(written(tmp_path, PIPELINE, ("rank = 2", line)))]) == 2
    # Before the sentence diffusers draws a bar.
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("sdeblend finetune: ") and all(part in error for part in parts), error
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_accelerate_launches_two_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, MIXTURE, folder="two")
    # accelerate's own --cpu starts one process, however many are asked for.
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines",
        "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m",
        "sdeblend.finetune", str(path),
    ]  # fmt: skip
    alone = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=alone)
    assert done.returncode == 0, done.stderr
    # Each process says where the member is; the main one alone has written it.
    assert done.stdout.count(str(tmp_path / "two" / MEMBER)) == 2
    assert cli.main(["finetune", str(written(tmp_path, MIXTURE, folder="one"))]) == 0
    one, two = (load_file(tmp_path / folder / MEMBER) for folder in ("one", "two"))
    assert one.keys() == two.keys() and len((tmp_path / "two" / METRICS).read_text().splitlines()) == 2
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", TRAINERS)
def test_pipelines_have_defaults_of_their_own(tmp_path: Path, name: str) -> None:
    def settings(*model: str, more: str = "") -> dict[str, object]:
        text = f'[model]\nkind = "pipeline"\n{"".join(model)}[rewards]\nvivid = 1\n[trainer]\nname = "{name}"\n{more}'
        return dict(load_tuning(written(tmp_path, f'{text}[output]\nfolder = "FOLDER"\n')).settings)

    small, large = settings(), settings('path = "anywhere"\nprompts = ["a"]\n')
    assert (small["groups"], small["group_size"], small["learning_rate"]) == (8, 16, 1e-3)
    assert (large["groups"], large["group_size"], large["learning_rate"]) == (8, 16, 1e-4)
    assert settings(more="learning_rate = 1e-2\ngroups = 2\n") | {"learning_rate": 1e-3, "groups": 8} == small
    if name == "dpok":
        assert (large["buffer"], large["batch"], large["value_batch"]) == (6400, 512, 512)
        assert settings(more='mode = "published"\n')["buffer"] == 1000
    if name == "backprop":
        assert large["recompute"] and not small["recompute"]


def test_other_kinds_have_the_trainers_own_defaults(tmp_path: Path) -> None:
    settings = load_tuning(written(tmp_path, MIXTURE)).settings
    assert (settings.groups, settings.learning_rate) == (1, 1e-3)
