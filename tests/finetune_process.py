"""A training run as a process of its own, to be killed or to be one of two: ``python -m tests.finetune_process``."""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from sdeblend.finetune.ddpo import DDPO, DDPOSettings
from sdeblend.finetune.distributed import Distributed
from sdeblend.finetune.dpok import DPOK, DPOKSettings
from sdeblend.finetune.run import train
from sdeblend.finetune.trainer import Workers
from tests.finetune_models import Line, quadratic

PROMPTS = {"a red circle": 0.0, "a blue square": 2.0}


def make(name: str, workers: Workers | None = None, **changes: Any) -> Any:
    """Return a small trainer on a line with prompts."""
    reward, model = quadratic(1.0, 0.5, **PROMPTS), Line(0.3, 1.0, 2, tuple(PROMPTS))
    if name == "ddpo":
        settings = {"kl_weight": 0.5, "groups": 4, "group_size": 8, "steps": 6, "ema_decay": 0.9} | changes
        return DDPO(model, reward, DDPOSettings(**settings), workers)
    settings = {"kl_weight": 0.5, "groups": 4, "group_size": 8, "steps": 6, "buffer": 500, "batch": 64, "updates": 3,
                "value_batch": 64} | changes  # fmt: skip
    return DPOK(model, reward, DPOKSettings(**settings), workers)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--trainer", default="ddpo")
    parser.add_argument("--iterations", type=int, default=6)
    parser.add_argument("--kill", default="", help="ITERATION:PLACE, where this process kills itself")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--log", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=arguments.folder)
    trainer = make(arguments.trainer, Distributed(accelerator))
    if arguments.kill:
        kill_at(trainer, *arguments.kill.split(":"))
    train(
        trainer, arguments.folder, iterations=arguments.iterations, checkpoint_every=2, resume=arguments.resume,
        accelerator=accelerator if arguments.log else None,
    )  # fmt: skip


def kill_at(trainer: Any, iteration: str, place: str) -> None:
    """Arrange for SIGKILL in an iteration: between its steps, or with half of a file of its end written."""
    descend, sync, synced = trainer.descend, os.fsync, []

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def after_step(*args: Any, **kwargs: Any) -> float:
        value: float = descend(*args, **kwargs)
        if place == "step" and trainer.iteration == int(iteration):
            die()
        return value

    def half_written(number: int) -> None:
        # An iteration ends with the checkpoint, then the member.
        if trainer.iteration == int(iteration):
            synced.append(number)
            if len(synced) == {"checkpoint": 1, "member": 2}.get(place, 0):
                os.ftruncate(number, os.fstat(number).st_size // 2)
                die()
        sync(number)

    trainer.descend, os.fsync = after_step, half_written


if __name__ == "__main__":
    main()
