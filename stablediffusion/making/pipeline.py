"""Put the trained parts together as a ``StableDiffusionPipeline``, and write it to a folder."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sdeblend.shell.console import progress
from stablediffusion.making.networks import scheduler
from stablediffusion.making.tokenizer import tokenizer
from stablediffusion.pipelines.loading import no_false_alarms
from stablediffusion.small.files import GUIDANCE

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel


def assemble(vae: AutoencoderKL, text: CLIPTextModel, unet: UNet2DConditionModel) -> StableDiffusionPipeline:
    """Return the pipeline of these networks (no copies), progress bar off."""
    with no_false_alarms():  # of image processors without torchvision
        from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer(),
        unet=unet,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def export(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """Write a pipeline in half precision; a folder that is there is replaced once the new one is whole.

    Args:
        pipe: in float32; left as it is.
        folder: to write.
    """
    from diffusers import StableDiffusionPipeline

    parts = {name: part for name, part in pipe.components.items() if part is not None}
    for name, part in parts.items():
        if isinstance(part, torch.nn.Module):
            parts[name] = copy.deepcopy(part).half()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export-") as scratch:
        whole = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None,
                                        requires_safety_checker=False)  # fmt: skip
        whole.save_pretrained(Path(scratch) / "model", safe_serialization=True)
        # unlike diffusers, transformers loads in the precision its file names, and the pipeline would be of two
        file = Path(scratch) / "model" / "text_encoder" / "config.json"
        config = json.loads(file.read_text())
        file.write_text(json.dumps(config | {"dtype": "float32"}, indent=2, sort_keys=True) + "\n")
        if folder.exists():
            folder.rename(Path(scratch) / "old")
        shutil.move(Path(scratch) / "model", folder)


@torch.no_grad()
def generate(
    pipe: StableDiffusionPipeline,
    captions: Sequence[str],
    generator: torch.Generator,
    *,
    steps: int = 50,
    guidance: float = GUIDANCE,
    batch: int = 64,
    show: bool = False,
) -> Tensor:
    """Generate one image for each caption with DDIM, eta 0.

    Args:
        pipe: the pipeline.
        captions: n prompts.
        generator: of the initial noise.
        steps: of DDIM.
        guidance: scale of classifier-free guidance.
        batch: captions at once.
        show: whether a bar is shown on a terminal.

    Returns:
        images in -1..1, [n, 3, 32, 32].
    """
    images = []
    with progress("images", len(captions), quiet=not show) as bar:
        for i in range(0, len(captions), batch):
            prompts = list(captions[i : i + batch])
            made = pipe(prompts, num_inference_steps=steps, guidance_scale=guidance, generator=generator,
                        output_type="pt")  # fmt: skip
            images.append(made.images)
            bar.update(len(prompts))
    return 2 * torch.cat(images) - 1
