"""The loop around a trainer: progress, logs, checkpoints, resumption, and the member at the end.

A folder holds one run:

    checkpoint.safetensors   the run so far, whole; ``resume=True`` goes on from there
    member.safetensors       the trainable part at the same iteration, with what it was tuned for as metadata
    metrics.jsonl            one line an iteration, each once however often the run was interrupted
    logs/                    the same for TensorBoard

Metadata of a member, all strings: ``sdeblend.reward`` (weights by name, JSON), ``sdeblend.kl_weight`` (absent where
the trainer's is not the alpha of the optimum), ``sdeblend.base`` (``Tunable.identity``), ``sdeblend.trainer``,
``sdeblend.settings`` (JSON), ``sdeblend.iterations``, ``sdeblend.version``.
"""

from __future__ import annotations

import hashlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sdeblend.finetune import checkpoint
from sdeblend.finetune.config import Tuning, configuration
from sdeblend.finetune.trainer import Metrics, Trainer
from sdeblend.finetune.workers import LossScale, in_precision
from sdeblend.reward import WeightedReward
from sdeblend.shell.console import progress
from sdeblend.shell.files import write_atomically
from sdeblend.shell.processes import Launched, Processes
from sdeblend.shell.registry import versions

if TYPE_CHECKING:
    from accelerate import Accelerator

CHECKPOINT, MEMBER, METRICS, LOGS = "checkpoint.safetensors", "member.safetensors", "metrics.jsonl", "logs"
Log = Callable[[Metrics, int], None]


def run(tuning: Tuning, *, resume: bool = False) -> Path:
    """Do what a settings file asks for, in as many processes as ``accelerate launch`` started.

    Args:
        tuning: from ``sdeblend.finetune.config.load_tuning``.
        resume: go on from the folder's checkpoint; without one, from the start.

    Returns:
        the member's file.

    Raises:
        ValueError: for what cannot be used, or a folder that has a run already.
        OSError: for a file that cannot be read or written; the last checkpoint is kept.
        FloatingPointError: for what is not finite; the last checkpoint and its member are kept.
    """
    from accelerate import Accelerator

    folder, precision = tuning.output.folder, tuning.run.precision
    accelerator = Accelerator(log_with="tensorboard", project_dir=folder)
    processes = Launched(accelerator.state)
    # Before a large model is loaded.
    check_folder(folder, processes, resume=resume)
    model, rewards = tuning.build(accelerator.device)
    trainer = tuning.trainer(
        in_precision(model, precision), WeightedReward(rewards, tuning.rewards), tuning.settings, processes,
        LossScale() if precision == "fp16" else None,
    )  # fmt: skip
    return train(
        trainer, folder, iterations=tuning.run.iterations, checkpoint_every=tuning.output.checkpoint_every,
        configured=tuning.fixed() | {"base": model.identity()}, resume=resume, accelerator=accelerator,
    )  # fmt: skip


def train(
    trainer: Trainer,
    folder: Path,
    *,
    iterations: int,
    checkpoint_every: int = 10,
    configured: Mapping[str, object] | None = None,
    resume: bool = False,
    accelerator: Accelerator | None = None,
) -> Path:
    """Run a trainer to an iteration, so that a kill at any moment and ``resume`` end in the same member.

    Args:
        trainer: not yet used.
        folder: of the run.
        iterations: rounds in all, those before an interruption included.
        checkpoint_every: rounds between checkpoints; the last round has one.
        configured: what a resumed run must agree in, as JSON has it; by default trainer, settings, rewards, base.
        resume: go on from the folder's checkpoint; without one, from the start.
        accelerator: writes the logs for TensorBoard; None writes none.

    Returns:
        the member's file.

    Raises:
        ValueError: for a folder that has a run already, one of another configuration, or processes that do not see the
            same.
        OSError: for a file that cannot be written; the last checkpoint is kept.
        FloatingPointError: for what is not finite; the last checkpoint and its member are kept.
    """
    check_folder(folder, trainer.processes, resume=resume)
    if configured is None:
        weights, base = trainer.reward.weights, trainer.model.identity()
        configured = configuration(trainer.settings, weights, trainer.name) | {"base": base}
    if (folder / CHECKPOINT).exists():
        checkpoint.read(folder / CHECKPOINT, trainer, configured)
        if trainer.iteration > iterations:
            raise ValueError(f"{folder} has a run of {trainer.iteration} iterations, more than the {iterations} wanted")
    if trainer.processes.main:
        folder.mkdir(parents=True, exist_ok=True)
        with checkpoint.naming(folder / METRICS, f"the metrics up to iteration {trainer.iteration}"):
            forget(folder / METRICS, trainer.iteration)
    kept = trainer.iteration
    if kept:
        # It may have been killed between the two files.
        save_member(trainer, folder)
    try:
        with tensorboard(accelerator, trainer.iteration) as log:
            for metrics in _rounds(trainer, iterations):
                with undisturbed():
                    if trainer.processes.main:
                        with checkpoint.naming(folder / METRICS, f"the metrics of iteration {trainer.iteration}"):
                            note(folder / METRICS, {"iteration": trainer.iteration, **metrics})
                    log(metrics, trainer.iteration)
                    if trainer.iteration % checkpoint_every == 0 or trainer.iteration == iterations:
                        checkpoint.write(folder / CHECKPOINT, trainer, configured)
                        save_member(trainer, folder)
                        kept = trainer.iteration
    except FloatingPointError as error:
        good = f"the member of iteration {kept} is kept in {folder / MEMBER}" if kept else "no member was kept yet"
        raise FloatingPointError(f"{error}; {good}") from error
    return folder / MEMBER


def check_folder(folder: Path, processes: Processes, *, resume: bool) -> None:
    """Refuse a folder that is none, whose run would be overwritten, or of which processes see different checkpoints.

    Raises:
        ValueError: if there is a checkpoint and ``resume`` is False, or not the same one for every process.
        NotADirectoryError: if there is a file of this name.
    """
    if processes.count > 1:
        found = [int(number) for number in processes.gather(torch.tensor([number_of(folder / CHECKPOINT)]))]
        if len(set(found)) > 1:
            got = f"it in {sum(map(bool, found))}" if 0 in found else f"{len(set(found))} different ones"
            raise ValueError(
                f"all {processes.count} processes must find the same {folder / CHECKPOINT}, or none, got {got}; share "
                "the folder between machines, or copy the file to each"
            )
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(20, "is a file, and must be a folder", str(folder))
    if not resume and (folder / CHECKPOINT).exists():
        raise ValueError(f"{folder} has a run already; resume it (--resume), or name another folder")


def number_of(path: Path) -> int:
    """Return a number that tells a file's content from any other; 0 if there is none."""
    if not path.is_file():
        return 0
    with path.open("rb") as stream:
        # Seven bytes fit a tensor of integers.
        digest = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=7)).digest()
    return int.from_bytes(digest, "little")


def note(path: Path, entry: Mapping[str, object]) -> None:
    """Add a line to a file of metrics."""
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(entry, allow_nan=False) + "\n")


def forget(path: Path, iteration: int) -> None:
    """Drop from a file of metrics what a resumed run will do again, and a line that was cut off."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry["iteration"] <= iteration:
            kept.append(line + "\n")
    write_atomically(path, "".join(kept))


def save_member(trainer: Trainer, folder: Path) -> None:
    """Write the member as it is now, averaged if there is an average; every process must call it."""
    if trainer.processes.main:
        path = folder / MEMBER
        with trainer.averaged(), checkpoint.naming(path, f"the member of iteration {trainer.iteration}"):
            trainer.model.save(path, metadata(trainer))
    trainer.processes.wait()


def metadata(trainer: Trainer) -> dict[str, str]:
    """Return what a member's file says about it; see the module's docstring."""
    about = {
        "reward": json.dumps(trainer.reward.weights),
        "base": trainer.model.identity(),
        "trainer": trainer.name,
        "settings": json.dumps(trainer.settings.to_json()),
        "iterations": str(trainer.iteration),
        "version": versions(["sdeblend"])["sdeblend"],
    }
    if trainer.calibrated:
        about["kl_weight"] = repr(trainer.settings.kl_weight)
    return {f"sdeblend.{name}": value for name, value in about.items()}


def _rounds(trainer: Trainer, iterations: int) -> Iterator[Metrics]:
    """Do the rounds that are left with a bar on stderr; give each one's metrics, all finite."""
    with progress("tuning", iterations, done=trainer.iteration, quiet=not trainer.processes.main) as bar:
        while trainer.iteration < iterations:
            begin = time.perf_counter()
            metrics = trainer.iterate()
            bad = next((name for name, value in metrics.items() if not math.isfinite(value)), None)
            if bad is not None:
                raise FloatingPointError(
                    f"training must stay finite, got {bad} = {metrics[bad]} in iteration {trainer.iteration}; lower "
                    "learning_rate or raise kl_weight"
                )
            shown = (f"{name} {metrics[name]:.4g}" for name in ("reward", "kl", "clipped") if name in metrics)
            bar.update(note=", ".join(shown))
            # Seconds are not among what a trainer may depend on, so they are added here.
            yield metrics | {"reward_calls": trainer.reward_calls, "seconds": time.perf_counter() - begin}


@contextmanager
def tensorboard(accelerator: Accelerator | None, done: int) -> Iterator[Log]:
    """Give what logs to TensorBoard through accelerate; what an interrupted run logged beyond ``done`` is purged."""
    if accelerator is None:
        yield lambda metrics, step: None
        return
    # Files are named by the second; a run resumed within it must not replace what it had logged.
    options = {"purge_step": done + 1, "filename_suffix": f".{done}"}
    accelerator.init_trackers(LOGS, init_kwargs={"tensorboard": options})
    try:
        yield lambda metrics, step: accelerator.log(metrics, step=step)
    finally:
        with undisturbed():
            for tracker in accelerator.trackers:
                tracker.finish()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Hold an interrupt from the keyboard back to the end of a block.

    In the middle of what TensorBoard's queue does it would leave a lock behind that its end then waits for.
    """
    handler = signal.getsignal(signal.SIGINT)
    if handler is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if held:
            signal.raise_signal(signal.SIGINT)
