"""Train the bundled model from nothing: autoencoder, text encoder, scorer, denoiser, and export.

    python -m stablediffusion.making.train --out DIR [--device cuda] [--steps N | --minutes M] [--resume]

Each stage keeps its state in DIR and goes on from it, so a run that was cut off continues with --resume, on the same
device or another; by steps and on a CPU, as if it had never been cut off. The result is DIR/export: the folder model,
scorer.safetensors and training.json.

Scenes, captions, times and noise are drawn on the CPU, so that every device trains on the same data; rounding, and with
it the weights, are the device's own. No GPU has run this yet: the tests run it on a pretended device, which computes on
the CPU and refuses tensors that were left there.

A run takes the steps of the bundled model, rounded, but does not repeat it: there the autoencoder's learning rate had
fallen to zero at step 1595 before it was raised again for the rest, and here it falls once; and all stages but the
scorer's were ended by seconds (at 2599, 1532 and 6594 steps), which their rates followed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel

from sdeblend.shell.files import write_atomically
from stablediffusion.making.loop import Budget
from stablediffusion.making.pipeline import assemble, export, generate
from stablediffusion.making.train_scorer import export_scorer, train_scorer
from stablediffusion.making.train_text import train_text
from stablediffusion.making.train_unet import train_unet
from stablediffusion.making.train_vae import train_vae
from stablediffusion.scenes.captions import caption, held_out_captions
from stablediffusion.scenes.scorer import Scorer, accuracies
from stablediffusion.small.files import GUIDANCE

STEPS = {"vae": 2600, "text": 1500, "scorer": 4000, "unet": 6600}
# of one busy core, as measured for the bundled model
SECONDS = {"vae": 1050.0, "text": 75.0, "scorer": 935.0, "unet": 2900.0}
FOLLOW_STEPS = 20


def available(device: str) -> torch.device:
    """Return a device that computes.

    Raises:
        ValueError: if torch has no such device here.
    """
    try:
        # a value is read back, or "meta" would pass
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"the device must be one that torch can use here, got {device!r}; try cpu") from error
    return torch.device(device)


def train(
    folder: Path,
    budgets: dict[str, Budget],
    batch: int | None = None,
    checked: int = 64,
    device: torch.device | str = "cpu",
) -> None:
    """Run all stages, or those that are not finished yet.

    Args:
        folder: of the run.
        budgets: of "vae", "text", "scorer" and "unet".
        batch: of every stage; by default each has its own.
        checked: held-out captions drawn now and then to follow the training; 0 for none.
        device: of the networks.
    """
    common: dict[str, Any] = {"device": device} if batch is None else {"device": device, "batch": batch}
    vae, vae_log = train_vae(folder, budgets["vae"], **common)
    text, text_log = train_text(folder, budgets["text"], **common)
    scorer, scorer_log = train_scorer(folder, budgets["scorer"], **common)
    export_scorer(scorer, folder / "export" / "scorer.safetensors")
    check = follow(vae, scorer, checked) if checked else None
    unet, text, unet_log = train_unet(folder, budgets["unet"], vae, text, check=check, **common)
    export(assemble(vae, text, unet).to("cpu"), folder / "export" / "model")
    logs = {"vae": vae_log, "text": text_log, "scorer": scorer_log, "unet": unet_log}
    lines = [json.dumps({"stage": stage, **entry}) for stage, log in logs.items() for entry in log]
    note = (
        f"accuracies: on {checked} held-out captions in {FOLLOW_STEPS} steps of DDIM at guidance {GUIDANCE:g}, "
        "read by the scorer of this log" if checked else "no accuracies were measured"
    )  # fmt: skip
    content = f'{{\n"note": {json.dumps(note)},\n"log": [\n' + ",\n".join(lines) + "\n]\n}\n"
    write_atomically(folder / "export" / "training.json", content)


def follow(
    vae: AutoencoderKL, scorer: Scorer, n: int, steps: int = FOLLOW_STEPS
) -> Callable[[UNet2DConditionModel, CLIPTextModel], dict[str, float]]:
    """Return a measurement of accuracies on held-out captions, always the same captions and noise.

    Args:
        vae, scorer: trained.
        n: number of captions.
        steps: of DDIM, few, since it interrupts the training.
    """
    _, mentioned = held_out_captions(n, seed=5)
    captions = [caption(scene) for scene in mentioned]

    def check(unet: UNet2DConditionModel, text: CLIPTextModel) -> dict[str, float]:
        generator = torch.Generator().manual_seed(5)
        images = generate(assemble(vae, text, unet), captions, generator, steps=steps, guidance=GUIDANCE)
        return {name: share["accuracy"] for name, share in accuracies(images, mentioned, scorer).items() if share["n"]}

    return check


def schedule(steps: int | None = None, minutes: float | None = None) -> dict[str, Budget]:
    """Return the budget of each stage.

    Args:
        steps: of every stage, in place of ``STEPS``.
        minutes: in all, shared out as the bundled model's time was, in place of steps.

    Raises:
        ValueError: unless the number is positive.
    """
    if minutes is None:
        return {stage: Budget(steps=number if steps is None else steps) for stage, number in STEPS.items()}
    scale = 60 * minutes / sum(SECONDS.values())
    return {stage: Budget(seconds=scale * seconds) for stage, seconds in SECONDS.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Train a model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--device", default="cpu", help="to train on: cpu (the default), cuda, ...")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help=f"of each stage (default {', '.join(map(str, STEPS.values()))})")
    length.add_argument("--minutes", type=float, help="in all, in place of steps; no two runs are then the same")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    arguments = parser.parse_args(argv)
    if not arguments.resume and arguments.out.exists() and any(arguments.out.iterdir()):
        parser.error(f"--out {arguments.out} must be an empty folder; give another, or --resume to go on with its run")
    try:
        device, budgets = available(arguments.device), schedule(arguments.steps, arguments.minutes)
    except ValueError as error:
        parser.error(str(error))
    train(arguments.out, budgets, device=device)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
