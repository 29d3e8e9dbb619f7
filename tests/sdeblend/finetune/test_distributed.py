"""Two processes equal one, and half precision is in the networks only."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sdeblend.finetune.run import CHECKPOINT, MEMBER, METRICS, check_folder, number_of, train
from sdeblend.finetune.workers import LossScale, in_precision
from sdeblend.shell.processes import Launched, Processes
from tests.support.finetune_models import Line
from tests.support.finetune_process import make
from tests.support.strategies import refuses

ROOT = Path(__file__).resolve().parents[3]


def together(folder: Path, *arguments: str, code: int = 0) -> list[str]:
    """Run two processes of one training run to its end, which both reach with this code; return what they said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.support.finetune_process", str(folder), *arguments]
    pair = [
        subprocess.Popen(
            command, cwd=ROOT, env={**common, "RANK": str(i), "LOCAL_RANK": str(i)}, stderr=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in pair]
    assert [process.returncode for process in pair] == [code, code], "\n".join(errors)
    return errors


def apart(one: Path, other: Path, *, value: bool = False) -> float:
    """Return the largest difference between two files of tensors, relative to each tensor's largest number.

    Those of the value function are apart: its last bias has a gradient of rounding errors at first.
    """
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys()
    pairs = [(a[name].double(), b[name].double()) for name in a if a[name].numel() and (".value." in name) == value]
    return max(float((x - y).abs().max() / y.abs().max().clamp_min(1e-30)) for x, y in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddpo", "dpok"])
def test_two_processes_equal_one(tmp_path: Path, name: str) -> None:
    train(make(name), tmp_path / "one", iterations=4, checkpoint_every=2)
    together(tmp_path / "two", "--trainer", name, "--iterations", "4")
    for file in (MEMBER, CHECKPOINT):
        assert apart(tmp_path / "two" / file, tmp_path / "one" / file) < 1e-5
    if name == "dpok":
        assert apart(tmp_path / "two" / CHECKPOINT, tmp_path / "one" / CHECKPOINT, value=True) < 5e-3
    rows = [
        [json.loads(line) for line in (tmp_path / folder / METRICS).read_text().splitlines()]
        for folder in ("one", "two")
    ]
    assert len(rows[0]) == len(rows[1]) == 4
    for a, b in zip(*rows, strict=True):
        assert a["iteration"] == b["iteration"] and a["reward_calls"] == b["reward_calls"]
        for key in ("reward", "kl", "loss", "clipped"):
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-6)
    # One process goes on where two left off.
    train(make(name), tmp_path / "one", iterations=5, resume=True)
    train(make(name), tmp_path / "two", iterations=5, resume=True)
    assert apart(tmp_path / "two" / MEMBER, tmp_path / "one" / MEMBER) < 1e-5


def test_processes_that_see_different_checkpoints_refuse(tmp_path: Path) -> None:
    train(make("ddpo"), tmp_path / "0", iterations=2)
    for error in together(tmp_path, "--apart", "--resume", code=1):
        assert f"all 2 processes must find the same {tmp_path}" in error and "got it in 1" in error, error


def test_what_processes_see_is_compared(tmp_path: Path) -> None:
    class Two(Processes):
        other = 0

        def gather(self, tensor: torch.Tensor) -> torch.Tensor:
            return torch.cat([tensor, torch.tensor([self.other])])

    processes, path = Two(count=2), tmp_path / CHECKPOINT
    check_folder(tmp_path, processes, resume=True)
    path.write_bytes(b"one")
    again = partial(check_folder, tmp_path, processes, resume=True)
    refuses(again, "all 2 processes", "got it in 1", "share the folder")
    processes.other = number_of(path)
    check_folder(tmp_path, processes, resume=True)
    refuses(lambda: check_folder(tmp_path, processes, resume=False), "has a run already")
    path.write_bytes(b"two")
    refuses(again, "2 different ones")


def test_a_batch_must_divide() -> None:
    refuses(lambda: Processes(count=3).rows(32), "3 processes", "32")


def test_alone_nothing_is_sent() -> None:
    class State:
        process_index, num_processes, device = 0, 1, "cpu"

    alone: Any = Launched(State())
    tensor = torch.arange(3.0)
    alone.add([tensor])
    assert alone.gather(tensor) is tensor and alone.main and tensor.tolist() == [0, 1, 2]


class Wide(Line):
    """A line whose tuned network multiplies matrices, as half precision is about."""

    def tuned(self, x: torch.Tensor, t: torch.Tensor, condition: Any) -> torch.Tensor:
        out = torch.nn.functional.linear(x, torch.eye(len(self.shift)) * (1 + self.slope))
        self.seen = out.dtype
        return out


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_networks_alone_are_in_half_precision(precision: str, dtype: torch.dtype) -> None:
    line = Wide(dim=4)
    model = in_precision(line, precision)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    out = model.tuned(x, torch.full((8,), 0.5, dtype=torch.float64), None)
    assert line.seen == dtype and out.dtype == torch.float32
    out.sum().backward()
    assert line.slope.grad.dtype == torch.float32
    assert model.event == (4,) and model.identity() == line.identity()
    assert in_precision(line, "no") is line
    refuses(lambda: in_precision(line, "fp8"), "'fp8'", "bf16")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_training_in_half_precision_is_resumed_bit_for_bit(tmp_path: Path, precision: str) -> None:
    def trainer() -> Any:
        made = make("ddpo")
        made.scale = LossScale() if precision == "fp16" else None
        made.model = in_precision(made.model, precision)
        return made

    train(trainer(), tmp_path / "a", iterations=4)
    train(trainer(), tmp_path / "b", iterations=2)
    train(trainer(), tmp_path / "b", iterations=4, resume=True)
    assert (tmp_path / "a" / CHECKPOINT).read_bytes() == (tmp_path / "b" / CHECKPOINT).read_bytes()


def test_the_loss_scale_leaves_out_overflows_and_changes_nothing_else() -> None:
    scaled, plain = make("ddpo"), make("ddpo")
    scaled.scale = LossScale()
    for _ in range(2):
        scaled.iterate(), plain.iterate()
    assert all(torch.equal(a, b) for a, b in zip(scaled.parameters, plain.parameters, strict=True))
    before = [p.detach().clone() for p in scaled.parameters]
    factor = scaled.scale.factor

    def overflow(index: torch.Tensor) -> torch.Tensor:
        return 1e34 * scaled.parameters[0].sum() * torch.ones(len(index))

    scaled.descend(4, overflow)
    assert scaled.scale.factor == factor / 2
    assert all(torch.equal(a, b) for a, b in zip(scaled.parameters, before, strict=True))
    scaled.scale.factor = 1.0

    def hopeless(index: torch.Tensor) -> torch.Tensor:
        return (scaled.parameters[0] * 0).sum().sqrt() * torch.ones(len(index))

    refuses(lambda: scaled.descend(4, hopeless), "must stay finite", kind=FloatingPointError)


def test_the_loss_scale_grows_with_patience() -> None:
    scale = LossScale()
    start = scale.factor
    assert not any(scale.accept(True) for _ in range(scale.patience))
    assert scale.factor == 2 * start and scale.steps == 0
