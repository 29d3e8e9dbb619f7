"""Measure how well the model draws captions it was never trained on.

    python -m stablediffusion.making.measure_model [--model DIR] [--images 1024] [--out FOLDER]

Every caption names a held-out combination of object colour, shape and background colour. A scorer trained on
drawings alone reads each picture; a factor's accuracy is the share of the captions mentioning it whose picture the
scorer gives that option the highest probability, with standard error sqrt(p (1 - p) / n). The same is measured on
drawings, on their reconstructions by the autoencoder (the ceilings), and on the generated pictures under each other's
captions (the control, which must fail).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from sdeblend.shell.console import markdown
from sdeblend.shell.files import write_atomically
from stablediffusion.making.pipeline import generate
from stablediffusion.pipelines.loading import no_false_alarms
from stablediffusion.scenes.captions import caption, held_out_captions
from stablediffusion.scenes.drawing import draw
from stablediffusion.scenes.scorer import Accuracies, accuracies
from stablediffusion.small.files import GUIDANCE, MODEL, SMALL

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

def evaluate(pipe: StableDiffusionPipeline, n: int = 1024, seed: int = 1, steps: int = 50) -> tuple[dict, Tensor]:
    """Measure everything.

    Args:
        pipe: the model.
        n: number of held-out captions.
        seed: of captions, drawings and noise.
        steps: of DDIM.

    Returns:
        the results (for JSON), with scenes of one object apart from those of two, and the generated images.
    """
    scenes, mentioned = held_out_captions(n, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    start = time.perf_counter()
    captions = [caption(scene) for scene in mentioned]
    images = generate(pipe, captions, generator, steps=steps, guidance=GUIDANCE, show=True)
    seconds = time.perf_counter() - start
    drawings = draw(scenes, generator)
    with torch.no_grad():
        decoded = torch.cat([
            pipe.vae.decode(pipe.vae.encode(part).latent_dist.mode()).sample.clamp(-1, 1) for part in drawings.split(64)
        ])
    result: dict = {"captions": n, "steps": steps, "guidance": GUIDANCE, "seed": seed, "seconds": round(seconds, 1)}
    noise = (decoded - drawings).square().mean((1, 2, 3))
    result["reconstruction_psnr"] = round(float((10 * torch.log10(4 / noise)).mean()), 2)
    for name, count in (("one object", 1), ("two objects", 2)):
        rows = [i for i, scene in enumerate(scenes) if len(scene.things) == count]
        chosen = [mentioned[i] for i in rows]
        result[name] = {
            "generated": accuracies(images[rows], chosen),
            "drawings": accuracies(drawings[rows], chosen),
            "reconstructions": accuracies(decoded[rows], chosen),
            "shuffled": accuracies(images[rows].roll(1, 0), chosen),
        }
    return result, images


def sheet(images: Tensor, columns: int = 16, zoom: int = 2) -> Image.Image:
    """Return images as one picture.

    Args:
        images: in -1..1, [n, 3, h, w]; what does not fill a row is left out.
        columns: images a row.
        zoom: pixels a pixel.
    """
    from sdeblend.shell.figures import montage

    columns = min(columns, len(images))
    return montage((images[: len(images) // columns * columns] + 1) / 2, columns, zoom=zoom)


def table(part: dict[str, Accuracies]) -> str:
    """Return the accuracies as a Markdown table, without the factors that no caption mentions."""
    rows = []
    for factor in next(iter(part.values())):
        cells = [part[k][factor] for k in part]
        if cells[0]["n"]:
            shown = [f"{100 * c['accuracy']:.1f} ± {100 * c['error']:.1f}" for c in cells]
            rows.append([f"{factor} (n = {cells[0]['n']})", *shown])
    return markdown(["factor", *part], rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure a model; write evaluation.json and sheet.png."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, default=SMALL, help="folder of evaluation.json and sheet.png")
    arguments = parser.parse_args(argv)
    with no_false_alarms():  # of image processors without torchvision
        from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(arguments.model, dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    result, images = evaluate(pipe, arguments.images, steps=arguments.steps)
    write_atomically(arguments.out / "evaluation.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    sheet(images[:128]).save(arguments.out / "sheet.png")
    for name in ("one object", "two objects"):
        print(f"{name}\n{table(result[name])}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
