"""Tiny random pipelines of every family and LoRA files for them: no network, no weights, seconds to run.

Every builder is deterministic in its ``seed`` and leaves the global random state as it was.
"""

from stablediffusion.testing.families import FAMILIES
from stablediffusion.testing.families.tiny import TASKS
from stablediffusion.testing.loras import tiny_lora
from stablediffusion.testing.modular import MODULAR, tiny_modular, tiny_modular_call
from stablediffusion.testing.networks import mid_size_unet, sd15_size_unet
from stablediffusion.testing.pipelines import tiny_call, tiny_image, tiny_mask, tiny_pipeline

__all__ = [
    "FAMILIES",
    "MODULAR",
    "TASKS",
    "mid_size_unet",
    "sd15_size_unet",
    "tiny_call",
    "tiny_image",
    "tiny_lora",
    "tiny_mask",
    "tiny_modular",
    "tiny_modular_call",
    "tiny_pipeline",
]
