"""The command ``sdeblend finetune``: what its file may say, and one sentence for what it may not."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from sdeblend.finetune.config import load_tuning
from sdeblend.finetune.run import undisturbed
from sdeblend.finetune.trainer import Trainer, TrainerSettings
from sdeblend.finetune.trainers import TRAINERS
from sdeblend.shell import cli, registry
from sdeblend.shell.settings import describe
from tests.support.finetune_models import Line, quadratic
from tests.support.strategies import refuses

ROOT = Path(__file__).resolve().parents[3]
FILE = """
[model]
kind = "line"
mean = 0.3
[rewards]
up = 1.0
near = 0.5
[trainer]
name = "ddpo"
kl_weight = 0.5
iterations = 3
group_size = 8
steps = 5
[output]
folder = "FOLDER"
checkpoint_every = 2
"""


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Return a function that writes the file with replacements; the kind "line" is installed."""
    line = EntryPoint("line", "tests.support.finetune_models:LineSettings", registry.TUNABLES)
    installed = registry.entry_points
    monkeypatch.setattr(
        registry, "entry_points", lambda group: (line,) if group == registry.TUNABLES else installed(group=group)
    )

    def write(*changes: tuple[str, str], folder: str = "out") -> Path:
        text = FILE.replace("FOLDER", str(tmp_path / folder))
        for old, new in changes:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        path = tmp_path / "config.toml"
        path.write_text(text)
        return path

    return write


def test_a_run_from_its_file(
    settings: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["finetune", str(settings())]) == 0
    member = tmp_path / "out" / "member.safetensors"
    assert capsys.readouterr().out.strip() == str(member)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "member.safetensors", "checkpoint.safetensors", "metrics.jsonl", "logs",
    }  # fmt: skip
    with safe_open(member, framework="pt") as file:
        about = file.metadata()
    assert json.loads(about["sdeblend.reward"]) == {"up": 1.0, "near": 0.5} and about["sdeblend.kl_weight"] == "0.5"
    # Again is refused, resumed and longer is not; --resume may also come first.
    assert cli.main(["finetune", str(settings())]) == 2
    assert "has a run already" in capsys.readouterr().err
    longer = settings(("iterations = 3", "iterations = 5"), ("checkpoint_every = 2", "checkpoint_every = 4"))
    assert cli.main(["finetune", str(longer), "--resume"]) == 0
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 5
    whole = settings(("iterations = 3", "iterations = 5"), folder="whole")
    assert cli.main(["finetune", str(whole), "--resume"]) == 0
    assert "starting from the beginning" in capsys.readouterr().err
    assert (tmp_path / "whole" / "member.safetensors").read_bytes() == member.read_bytes()


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (('kind = "line"', 'kind = "lin"'), ("config.toml", "[model] kind", "line", "'lin'")),
        (('kind = "line"', ""), ("[model]", "kind is missing")),
        (("mean = 0.3", "men = 0.3"), ("[model]", "unknown key 'men'", "mean")),
        (("up = 1.0", "down = 1.0"), ("[rewards]", "'down'", "up")),
        (("up = 1.0", 'up = "much"'), ("[rewards]", "up must be a finite number")),
        (("up = 1.0\nnear = 0.5", ""), ("[rewards]", "at least one")),
        (("up = 1.0\nnear = 0.5", "up = 0"), ("[rewards]", "other than 0")),
        (("up = 1.0", "odd = 1.0"), ("reward 'odd'", "shape (8,)", "(8, 1)")),
        (("up = 1.0", "nan = 1.0"), ("reward 'nan'", "finite", "nan")),
        (('name = "ddpo"', 'name = "ppo"'), ("[trainer]", "name", "'ddpo'", "'ppo'")),
        (("kl_weight = 0.5", "kl_weight = 0"), ("[trainer] kl_weight", "above 0")),
        (("kl_weight = 0.5", "kl_weight = -0.5"), ("[trainer] kl_weight", "above 0", "-0.5")),
        (("kl_weight = 0.5", "kl_weight = nan"), ("kl_weight", "a finite number")),
        (("kl_weight = 0.5", "kl_wight = 0.5"), ("unknown key 'kl_wight'", "kl_weight")),
        (("kl_weight = 0.5", 'mode = "exact"'), ("unknown key 'mode'",)),
        (("iterations = 3", "iterations = 0"), ("iterations must be an integer of at least 1",)),
        (("iterations = 3", 'precision = "fp8"'), ("precision", "'bf16'", "'fp8'")),
        (("group_size = 8", "group_size = 1"), ("group_size must be an integer of at least 2",)),
        (("checkpoint_every = 2", "checkpoint_every = 0"), ("[output] checkpoint_every", "at least 1")),
        (("[output]", "[outputs]"), ("unknown key 'outputs'",)),
        (("steps = 5", "steps = [5]"), ("steps must be an integer",)),
        (("mean = 0.3", "mean ="), ("not valid TOML",)),
    ],
)
def test_refuses_in_one_sentence(
    settings: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: tuple[str, str],
    parts: tuple[str, ...],
) -> None:
    assert cli.main(["finetune", str(settings(change))]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sdeblend finetune: ") and error.count("\n") == 1, error
    for part in parts:
        assert part in error, error
    assert not (tmp_path / "out" / "member.safetensors").exists()


def test_refuses_another_configuration_and_folders(
    settings: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["finetune", str(settings())]) == 0
    for change, key in (
        (("mean = 0.3", "mean = 0.4"), "base"),
        (("near = 0.5", "near = 0.25"), "rewards.near"),
        (("kl_weight = 0.5", "kl_weight = 0.25"), "trainer.kl_weight"),
        (("steps = 5", 'steps = 5\nprecision = "bf16"'), "trainer.precision"),
    ):
        capsys.readouterr()
        assert cli.main(["finetune", str(settings(change)), "--resume"]) == 2
        error = capsys.readouterr().err
        assert "another configuration" in error and key in error and error.count("\n") == 1
    (tmp_path / "file").write_text("")
    assert cli.main(["finetune", str(settings(folder="file"))]) == 2
    assert "must be a folder" in capsys.readouterr().err
    assert cli.main(["finetune", str(tmp_path / "none.toml")]) == 2
    assert "none.toml" in capsys.readouterr().err


def test_a_file_has_defaults_presets_and_infinity(settings: Callable[..., Path]) -> None:
    tuning = load_tuning(settings(("kl_weight = 0.5", "clip_norm = inf")))
    assert tuning.settings.clip_norm == math.inf and tuning.settings.kl_weight == 1.0
    assert json.dumps(tuning.fixed(), allow_nan=False)
    assert tuning.fixed()["trainer.clip_norm"] == "inf" and tuning.fixed()["model.mean"] == 0.3
    changes = ('name = "ddpo"', 'name = "dpok"\nmode = "published"'), ("group_size = 8", "groups = 12")
    published = load_tuning(settings(*changes)).settings
    assert (published.groups, published.group_size, published.steps, published.reward_weight) == (12, 1, 5, 1000.0)
    assert (published.kl_weight, published.clip) == (0.5, 1e-4)


@pytest.mark.parametrize("name", TRAINERS)
def test_trainers_say_what_they_need(name: str) -> None:
    trainer = TRAINERS[name]
    assert issubclass(trainer, Trainer) and issubclass(trainer.settings_class, TrainerSettings) and trainer.name == name
    assert all(key.description and key.default != "required" for key in describe(trainer.settings_class))
    assert trainer.settings_class(kl_weight=2).kl_weight == 2.0
    other = TRAINERS["ddpo" if name != "ddpo" else "dpok"].settings_class()
    refuses(lambda: trainer(Line(), quadratic(), other), name, trainer.settings_class.__name__, kind=TypeError)


@pytest.mark.slow
def test_an_interrupt_is_told_and_resumed(tmp_path: Path) -> None:
    script = (
        "import signal, sys, torch; from importlib.metadata import EntryPoint; from sdeblend.shell import cli; "
        # A shell starts what it runs in the background with interrupts ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from sdeblend.shell import registry; torch.set_num_threads(1); installed = registry.entry_points; "
        "line = EntryPoint('line', 'tests.support.finetune_models:LineSettings', registry.TUNABLES); "
        "registry.entry_points = lambda group: (line,) if group == registry.TUNABLES else installed(group=group); "
        "sys.exit(cli.main(['finetune', *sys.argv[1:]]))"
    )
    path = tmp_path / "config.toml"

    def start(iterations: int, folder: str, *more: str) -> Any:
        text = FILE.replace("FOLDER", str(tmp_path / folder)).replace("iterations = 3", f"iterations = {iterations}")
        path.write_text(text)
        return subprocess.Popen(
            [sys.executable, "-c", script, str(path), *more], cwd=ROOT, stderr=subprocess.PIPE, text=True,
            stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def end(process: Any) -> tuple[int, str]:
        try:
            error = process.communicate(timeout=200)[1]
        finally:
            process.kill()
        return process.returncode, error

    process, metrics = start(100_000, "a"), tmp_path / "a" / "metrics.jsonl"
    while process.poll() is None and (not metrics.exists() or metrics.read_text().count("\n") < 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    code, error = end(process)
    assert code == 130 and "interrupted" in error
    done = json.loads(metrics.read_text().splitlines()[-1])["iteration"] + 2
    for folder, more in (("a", ["--resume"]), ("b", [])):
        assert end(start(done, folder, *more))[0] == 0
    assert (tmp_path / "a/member.safetensors").read_bytes() == (tmp_path / "b/member.safetensors").read_bytes()
    assert metrics.read_text().count("\n") == done


def test_an_interrupt_waits_for_files_and_logs() -> None:
    reached = []

    def disturbed() -> None:
        with undisturbed():
            signal.raise_signal(signal.SIGINT)
            reached.append(1)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            disturbed()
        assert reached == [1] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_accelerate_launches_the_module(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(FILE.replace('kind = "line"', 'kind = "nowhere"').replace("FOLDER", str(tmp_path / "out")))
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "sdeblend.finetune", str(path),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode and "sdeblend finetune:" in done.stderr and "'nowhere'" in done.stderr


def test_builders_get_what_the_protocol_says(settings: Callable[..., Path]) -> None:
    tuning = load_tuning(settings())
    model, rewards = tuning.build(torch.device("cpu"))
    assert model.event == (1,) and list(rewards) == ["up", "near"]
