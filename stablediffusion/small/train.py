"""Train the bundled model from nothing: autoencoder, text encoder, scorer, denoiser, and export.

    python -m stablediffusion.small.train --out DIR [--minutes 98 | --steps N] [--resume]

Each stage keeps its state in DIR and goes on from it, so a run that was cut off continues with --resume; with --steps,
as if it had never been cut off. The result is DIR/export: the folder model, scorer.safetensors and training.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel

from sdeblend.io import write_atomically
from stablediffusion.bundled import GUIDANCE
from stablediffusion.small.evaluate import accuracies, held_out_captions
from stablediffusion.small.loop import Budget
from stablediffusion.small.pipeline import assemble, export, generate
from stablediffusion.small.scenes import caption
from stablediffusion.small.scorer import Scorer
from stablediffusion.small.train_scorer import export_scorer, train_scorer
from stablediffusion.small.train_text import train_text
from stablediffusion.small.train_unet import train_unet
from stablediffusion.small.train_vae import train_vae

# seconds of one core for each stage of the bundled model
SECONDS = {"vae": 1050.0, "text": 75.0, "scorer": 420.0, "unet": 2900.0}


def train(folder: Path, budgets: dict[str, Budget], batch: int | None = None, checked: int = 64) -> None:
    """Run all stages, or those that are not finished yet.

    Args:
        folder: of the run.
        budgets: of "vae", "text", "scorer" and "unet".
        batch: of every stage; by default each has its own.
        checked: held-out captions drawn now and then to follow the training; 0 for none.
    """
    size = {} if batch is None else {"batch": batch}
    vae, vae_log = train_vae(folder, budgets["vae"], **size)
    text, text_log = train_text(folder, budgets["text"], **size)
    scorer, scorer_log = train_scorer(folder, budgets["scorer"], **size)
    export_scorer(scorer, folder / "export" / "scorer.safetensors")
    check = follow(vae, scorer, checked) if checked else None
    unet, text, unet_log = train_unet(folder, budgets["unet"], vae, text, check=check, **size)
    export(assemble(vae, text, unet), folder / "export" / "model")
    logs = {"vae": vae_log, "text": text_log, "scorer": scorer_log, "unet": unet_log}
    lines = [json.dumps({"stage": stage, **entry}) for stage, log in logs.items() for entry in log]
    write_atomically(folder / "export" / "training.json", "[\n" + ",\n".join(lines) + "\n]\n")


def follow(
    vae: AutoencoderKL, scorer: Scorer, n: int, steps: int = 20
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


def main(argv: Sequence[str] | None = None) -> int:
    """Train a model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=sum(SECONDS.values()) / 60,
                        help="in all (default %(default).0f)")  # fmt: skip
    length.add_argument("--steps", type=int, help="of each stage, in place of minutes: a run to repeat exactly")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    arguments = parser.parse_args(argv)
    if not arguments.resume and arguments.out.exists() and any(arguments.out.iterdir()):
        parser.error(f"--out {arguments.out} must be an empty folder; give another, or --resume to go on with its run")
    scale = 60 * arguments.minutes / sum(SECONDS.values())
    train(arguments.out, {
        stage: Budget(steps=arguments.steps) if arguments.steps else Budget(seconds=scale * seconds)
        for stage, seconds in SECONDS.items()
    })
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
