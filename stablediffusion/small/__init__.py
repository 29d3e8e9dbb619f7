"""A text-to-image model of Stable Diffusion's classes that fits into the package: scenes of coloured shapes.

    pipe = load_small()
    image = pipe("a large red circle on a blue striped background", guidance_scale=1.5).images[0]

Its data are drawn (``stablediffusion.scenes``), so what it does can be measured exactly. ``files`` says where it lies,
``stablediffusion.making`` how it was made, MODEL_CARD.md what it can and cannot do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from stablediffusion.small.files import MODEL

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

__all__ = ["MODEL", "load_small"]


def load_small(dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """Load the bundled pipeline, without network; its progress bar is off.

    Args:
        dtype: of the networks; the files hold half precision.
    """
    from stablediffusion.pipelines.loading import no_false_alarms

    # transformers tells of image processors without torchvision, which nothing here uses
    with no_false_alarms():
        from diffusers import StableDiffusionPipeline

        pipe = StableDiffusionPipeline.from_pretrained(MODEL, dtype=dtype, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe
