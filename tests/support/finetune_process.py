"""A training run as a process, to be killed or to be one of two: ``python -m tests.support.finetune_process``."""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from sdeblend.finetune.run import train
from sdeblend.finetune.trainers import TRAINERS
from sdeblend.reward import WeightedReward
from sdeblend.shell.processes import Launched, Processes
from tests.support.finetune_models import Line, quadratic

PROMPTS = {"a red circle": 0.0, "a blue square": 2.0}
OWN: dict[str, dict[str, Any]] = {
    "ddpo": {"ema_decay": 0.9},
    "dpok": {"buffer": 500, "batch": 64, "updates": 3, "value_batch": 64},
}


def make(name: str, processes: Processes | None = None, model: str = "line", **changes: Any) -> Any:
    """Return a small trainer on a line with prompts, a mixture, or a tiny random pipeline."""
    kind = TRAINERS[name]
    tunable, reward = {"line": line, "mixture": mixture, "pipeline": pipeline}[model]()
    few = {"groups": 2, "group_size": 2, "steps": 3} if model == "pipeline" else {}
    common = {"kl_weight": 0.5, "groups": 4, "group_size": 8, "steps": 6} | few
    settings = kind.settings_class(**(common | OWN.get(name, {}) | changes))
    return kind(tunable, reward, settings, processes)


def line() -> tuple[Any, WeightedReward]:
    """Return a line with prompts and its reward."""
    return Line(0.3, 1.0, 2, tuple(PROMPTS)), quadratic(1.0, 0.5, **PROMPTS)


def mixture() -> tuple[Any, WeightedReward]:
    """Return a network on two modes, not trained, with a low-rank difference, and a reward."""
    from sdeblend import VPLinear
    from toy.networks.network import for_mixture
    from toy.networks.tunable import MixtureTunable, reward_of
    from toy.problems import line2

    problem, schedule = line2(), VPLinear()
    network = for_mixture(problem.base, schedule, seed=0, width=16)
    return MixtureTunable(problem.base, schedule, network), WeightedReward({"left": reward_of(problem.rewards["left"])})


def pipeline() -> tuple[Any, WeightedReward]:
    """Return a tiny random Stable Diffusion 1.5 with a LoRA, and a reward of its images."""
    from stablediffusion.finetune.tunable import PipelineTunable
    from stablediffusion.rewards import image_reward
    from stablediffusion.testing import tiny_pipeline

    model = PipelineTunable(tiny_pipeline("sd15", seed=1), tuple(PROMPTS), height=16, width=16)
    return model, WeightedReward({"vivid": image_reward("vivid")})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--trainer", default="ddpo")
    parser.add_argument("--model", default="line")
    parser.add_argument("--apart", action="store_true", help="a folder for each process, as if none were shared")
    parser.add_argument("--iterations", type=int, default=6)
    parser.add_argument("--kill", default="", help="ITERATION:PLACE, where this process kills itself")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--log", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=arguments.folder)
    trainer = make(arguments.trainer, Launched(accelerator.state), arguments.model)
    folder = arguments.folder / str(trainer.processes.index) if arguments.apart else arguments.folder
    if arguments.kill:
        kill_at(trainer, *arguments.kill.split(":"))
    train(
        trainer, folder, iterations=arguments.iterations, checkpoint_every=2, resume=arguments.resume,
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
