"""The run: a kill at any moment and a resumption end in the same member; nothing good is ever lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sdeblend.finetune import checkpoint
from sdeblend.finetune.run import CHECKPOINT, MEMBER, METRICS, train
from sdeblend.finetune.trainers import TRAINERS
from sdeblend.finetune.trainers.ddpo import DDPO, DDPOSettings
from sdeblend.finetune.trainers.dpok import DPOK, DPOKSettings
from sdeblend.reward import WeightedReward
from sdeblend.shell.cli import sentence
from tests.support.finetune_models import Line, quadratic
from tests.support.finetune_process import make
from tests.support.strategies import refuses

ROOT = Path(__file__).resolve().parents[3]
WRITTEN = Path(__file__).parent / "checkpoints"


def lines(folder: Path) -> list[dict[str, Any]]:
    """Return the metrics without what a clock says."""
    entries = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in entries]


def same(one: Path, other: Path) -> bool:
    """Return whether two runs left the same bytes and the same metrics."""
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in (MEMBER, CHECKPOINT)) and lines(
        one
    ) == lines(other)


@pytest.mark.rng_untouched
@pytest.mark.parametrize("name", TRAINERS)
def test_resumed_is_the_same_bit_for_bit(tmp_path: Path, name: str) -> None:
    member = train(make(name), tmp_path / "whole", iterations=7, checkpoint_every=3)
    assert member == tmp_path / "whole" / MEMBER
    for stop in (1, 3, 6):
        folder = tmp_path / str(stop)
        train(make(name), folder, iterations=stop, checkpoint_every=3)
        train(make(name), folder, iterations=7, checkpoint_every=3, resume=True)
        assert same(folder, tmp_path / "whole")
    assert [entry["iteration"] for entry in lines(folder)] == list(range(1, 8))
    # The control: another seed is another member.
    train(make(name, seed=1), tmp_path / "other", iterations=7)
    assert not same(tmp_path / "other", tmp_path / "whole")


@pytest.mark.parametrize("name", [path.stem for path in sorted(WRITTEN.glob("*.safetensors"))])
def test_a_checkpoint_of_version_0_1_goes_on(tmp_path: Path, name: str) -> None:
    """After two iterations; what it goes on to is what a whole run of today does, to rounding."""
    shutil.copy(WRITTEN / f"{name}.safetensors", tmp_path / CHECKPOINT)
    trainer = make(name)
    train(trainer, tmp_path, iterations=4, resume=True)
    whole = make(name)
    train(whole, tmp_path / "whole", iterations=4)
    assert [entry["iteration"] for entry in lines(tmp_path)] == [3, 4]
    for mine, wanted in zip(trainer.parameters, whole.parameters, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-7)
    assert (trainer.reward_calls, trainer.generator.get_state().tolist()) == (
        whole.reward_calls, whole.generator.get_state().tolist()
    )  # fmt: skip
    refuses(lambda: train(make(name, kl_weight=0.25), tmp_path, iterations=5, resume=True), "trainer.kl_weight")


def process(*arguments: str) -> int:
    command = [sys.executable, "-m", "tests.support.finetune_process", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode in (0, -9), done.stderr
    return done.returncode


@pytest.mark.slow
@pytest.mark.parametrize(("name", "places"), [("dpok", ("3:step", "4:checkpoint", "4:member"))])
def test_killed_anywhere_and_resumed_is_the_same_bit_for_bit(
    tmp_path: Path, name: str, places: tuple[str, ...]
) -> None:
    train(make(name), tmp_path / "whole", iterations=6, checkpoint_every=2)
    killed = tmp_path / "killed"
    for place in places:
        assert process(str(killed), "--trainer", name, "--kill", place, "--resume", "--log") == -9
    assert process(str(killed), "--trainer", name, "--resume", "--log") == 0
    assert same(killed, tmp_path / "whole")
    assert len(list((killed / "logs").iterdir())) == len(places) + 1


@pytest.mark.parametrize("model", ["mixture", pytest.param("pipeline", marks=pytest.mark.slow)])
def test_killed_in_another_process_and_resumed_here_is_the_same_bit_for_bit(tmp_path: Path, model: str) -> None:
    killed = tmp_path / "killed"
    assert process(str(killed), "--trainer", "regression", "--model", model, "--kill", "3:step") == -9
    assert about(killed / MEMBER)["sdeblend.iterations"] == "2"
    for folder in (killed, tmp_path / "whole"):
        train(make("regression", model=model), folder, iterations=5, checkpoint_every=2, resume=True)
    assert same(killed, tmp_path / "whole")


def test_resuming_nothing_starts_from_the_beginning(tmp_path: Path) -> None:
    train(make("ddpo"), tmp_path / "a", iterations=2, resume=True)
    train(make("ddpo"), tmp_path / "b", iterations=2)
    assert same(tmp_path / "a", tmp_path / "b")


def test_metrics_survive_a_line_that_was_cut(tmp_path: Path) -> None:
    train(make("ddpo"), tmp_path, iterations=4, checkpoint_every=2)
    whole = lines(tmp_path)
    with (tmp_path / METRICS).open("a") as stream:
        stream.write('{"iteration": 5, "reward": 1.0}\n{"iteration": 6, "rew')
    train(make("ddpo"), tmp_path, iterations=5, resume=True)
    assert lines(tmp_path)[:4] == whole and len(lines(tmp_path)) == 5


@pytest.mark.parametrize("when", [1, 2])
def test_a_full_disk_leaves_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: int
) -> None:
    whole = train(make("ddpo"), tmp_path / "whole", iterations=6, checkpoint_every=2)
    trainer = make("ddpo")
    folder, sync, seen = tmp_path / "full", os.fsync, []

    def full(number: int) -> None:
        # Iteration 4 writes the checkpoint, then the member.
        if trainer.iteration == 4:
            seen.append(number)
            if len(seen) == when:
                os.ftruncate(number, 10)
                raise OSError(errno.ENOSPC, "No space left on device")
        sync(number)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        parts = ("No space left", "iteration 4", *((CHECKPOINT, "kept") if when == 1 else (MEMBER,)))
        refuses(lambda: train(trainer, folder, iterations=6, checkpoint_every=2), *parts, kind=OSError)
    assert not list(folder.glob(".*.part"))
    before = make("ddpo")
    checkpoint.read(folder / CHECKPOINT, before, json.loads(about(folder / CHECKPOINT)["configuration"]))
    assert before.iteration == (2 if when == 1 else 4)
    assert about(folder / MEMBER)["sdeblend.iterations"] == "2"
    train(make("ddpo"), folder, iterations=6, checkpoint_every=2, resume=True)
    assert (folder / MEMBER).read_bytes() == whole.read_bytes()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_a_full_disk_names_the_metrics(tmp_path: Path) -> None:
    trainer = make("ddpo")
    iterate = trainer.iterate

    def fill() -> dict[str, float]:
        if trainer.iteration == 2:
            (tmp_path / METRICS).unlink()
            (tmp_path / METRICS).symlink_to("/dev/full")
        metrics: dict[str, float] = iterate()
        return metrics

    trainer.iterate = fill
    with pytest.raises(OSError) as caught:
        train(trainer, tmp_path, iterations=4, checkpoint_every=1)
    told = sentence(caught.value)
    assert str(tmp_path / METRICS) in told and "No space left" in told and "iteration 3" in told
    assert about(tmp_path / MEMBER)["sdeblend.iterations"] == "2"


def about(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def test_a_member_says_what_it_was_tuned_for(tmp_path: Path) -> None:
    said = about(train(make("ddpo"), tmp_path / "a", iterations=1))
    assert set(said) == {
        f"sdeblend.{k}" for k in ("reward", "kl_weight", "base", "settings", "trainer", "iterations", "version")
    }
    assert json.loads(said["sdeblend.reward"]) == {"r": 1.0}
    assert float(said["sdeblend.kl_weight"]) == 0.5 and said["sdeblend.trainer"] == "ddpo"
    assert json.loads(said["sdeblend.settings"])["group_size"] == 8
    published = make("dpok", mode="published", clip=1e-4, reward_weight=1000.0)
    assert "sdeblend.kl_weight" not in about(train(published, tmp_path / "b", iterations=1))


def test_the_average_is_saved_and_training_goes_on_from_the_parameters(tmp_path: Path) -> None:
    trainer = make("ddpo")
    saved = load_file(train(trainer, tmp_path, iterations=3))
    own = {name: p.detach().clone() for name, p in trainer.model.trainable().items()}
    assert all(torch.equal(saved[name], mean) for name, mean in zip(sorted(own), trainer.average, strict=True))
    assert not any(torch.equal(saved[name], own[name]) for name in own)
    with trainer.averaged():
        pass
    assert all(torch.equal(own[name], p) for name, p in trainer.model.trainable().items())


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"kl_weight": 0.25}, ("trainer.kl_weight", "0.5", "0.25")),
        ({"group_size": 16}, ("trainer.group_size", "8", "16")),
        ({"clip_norm": float("inf")}, ("trainer.clip_norm", "'inf'")),
    ],
)
def test_refuses_a_checkpoint_of_other_settings(tmp_path: Path, change: dict[str, Any], parts: tuple[str, ...]) -> None:
    train(make("ddpo"), tmp_path, iterations=1)
    refuses(
        lambda: train(make("ddpo", **change), tmp_path, iterations=2, resume=True), "another configuration", *parts
    )


def test_refuses_a_checkpoint_of_another_base_reward_or_trainer(tmp_path: Path) -> None:
    settings = DDPOSettings(group_size=4, steps=3)
    train(DDPO(Line(), quadratic(), settings), tmp_path, iterations=1)
    other: dict[str, Any] = {
        "base": DDPO(Line(2.0), quadratic(), settings),
        "rewards.r": DDPO(Line(), WeightedReward(quadratic().rewards, {"r": 2.0}), settings),
        "trainer.batch": DPOK(Line(), quadratic(), DPOKSettings(group_size=4, steps=3)),
    }
    for key, trainer in other.items():
        again = partial(train, trainer, tmp_path, iterations=2, resume=True)
        refuses(again, "another configuration", key)
    # Whatever the configuration says, tensors must fit.
    named = {"a": 1}
    checkpoint.write(tmp_path / "c", DDPO(Line(), quadratic(), settings), named)
    wide = DDPO(Line(dim=3), quadratic(), settings)
    refuses(lambda: checkpoint.read(tmp_path / "c", wide, named), "another model", "shift")


def test_refuses_what_is_no_checkpoint_and_folders_in_use(tmp_path: Path) -> None:
    trainer = make("ddpo")
    member = train(trainer, tmp_path / "a", iterations=2)
    refuses(lambda: train(make("ddpo"), tmp_path / "a", iterations=2), "has a run already", "--resume")
    refuses(lambda: train(make("ddpo"), tmp_path / "a", iterations=1, resume=True), "2 iterations", "1 wanted")
    damaged = tmp_path / "b" / CHECKPOINT
    damaged.parent.mkdir()
    damaged.write_bytes((tmp_path / "a" / CHECKPOINT).read_bytes()[:-40])
    refuses(lambda: train(make("ddpo"), tmp_path / "b", iterations=2, resume=True), str(damaged), "damaged")
    shutil.copy(member, damaged)
    refuses(lambda: train(make("ddpo"), tmp_path / "b", iterations=2, resume=True), str(damaged), "not a checkpoint")
    refuses(lambda: train(make("ddpo"), member, iterations=1), "must be a folder", kind=OSError)


@pytest.mark.parametrize("name", TRAINERS)
def test_a_rate_that_makes_training_diverge_is_blamed_and_not_the_reward(tmp_path: Path, name: str) -> None:
    # At the larger rate the likelihood ratio of the policy gradients overflows before any sample does.
    rate = 1.0 if name in ("ddpo", "dpok") else 30.0
    trainer = make(name, model="mixture", learning_rate=rate)
    kept = ("must stay finite", "iteration", "lower learning_rate", "the member of iteration", "is kept")
    refuses(lambda: train(trainer, tmp_path, iterations=20, checkpoint_every=1), *kept, kind=FloatingPointError)
    assert all(bool(v.isfinite().all()) for v in load_file(tmp_path / MEMBER).values())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_samples_that_ran_off_are_never_scored(value: float) -> None:
    trainer = make("ddpo")
    samples = torch.zeros(4, 2)
    trainer.score(samples, trainer.model.conditions(1, 4, trainer.generator))
    samples[2] = value
    refuses(lambda: trainer.score(samples, None), "samples", "1 of 4", "iteration 1", kind=FloatingPointError)
    trainer.model.decode = lambda x: x * value
    refuses(lambda: trainer.score(samples[:1] + 1, None), "decoded samples", kind=FloatingPointError)
    assert trainer.reward_calls == 4


@pytest.mark.parametrize("place", ["loss", "parameter", "metric"])
def test_divergence_stops_and_keeps_the_last_good_member(tmp_path: Path, place: str) -> None:
    trainer = make("ddpo")
    iterate = trainer.iterate

    def diverge() -> dict[str, float]:
        if trainer.iteration == 3 and place == "loss":
            trainer.settings = trainer.settings.changed(kl_weight=1e300)
        metrics: dict[str, float] = iterate()
        if trainer.iteration == 4 and place == "parameter":
            with torch.no_grad():
                trainer.parameters[0].fill_(torch.inf)
        return metrics | ({"kl": float("nan")} if trainer.iteration == 4 and place == "metric" else {})

    trainer.iterate = diverge
    kept = ("must stay finite", "iteration 4", "the member of iteration 2 is kept")
    refuses(lambda: train(trainer, tmp_path, iterations=6, checkpoint_every=2), *kept, kind=FloatingPointError)
    assert about(tmp_path / MEMBER)["sdeblend.iterations"] == "2"
    assert json.loads(about(tmp_path / CHECKPOINT)["numbers"])["iteration"] == 2
    assert all(bool(v.isfinite().all()) for v in load_file(tmp_path / MEMBER).values())


def test_divergence_before_the_first_checkpoint_says_so(tmp_path: Path) -> None:
    trainer = make("ddpo", kl_weight=1e300)
    with torch.no_grad():
        trainer.parameters[0].fill_(1.0)
    refuses(lambda: train(trainer, tmp_path, iterations=2), "no member was kept yet", kind=FloatingPointError)
    assert not (tmp_path / MEMBER).exists()


def test_tensorboard_has_each_iteration(tmp_path: Path) -> None:
    from accelerate import Accelerator
    from tensorboardX.proto.event_pb2 import Event

    for iterations in (2, 4):
        accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
        train(make("ddpo"), tmp_path, iterations=iterations, resume=True, accelerator=accelerator)
    steps = []
    for path in sorted((tmp_path / "logs").glob("events*")):
        data = path.read_bytes()
        while data:
            # A record: length, its checksum, the event, its checksum.
            size = int.from_bytes(data[:8], "little")
            event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
            steps += [event.step for value in event.summary.value if value.tag == "reward"]
    assert sorted(steps) == [1, 2, 3, 4]
