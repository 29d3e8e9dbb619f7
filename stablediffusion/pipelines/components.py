"""Which parts of a diffusers pipeline carry adapters: its denoiser and its text encoders."""

from __future__ import annotations

from typing import Any

from torch import nn


def denoiser_of(pipe: Any) -> tuple[str, Any]:
    """Return the name and the module of the network that predicts noise, v or velocity.

    Args:
        pipe: a diffusers pipeline.

    Raises:
        TypeError: if it has neither ``unet`` nor ``transformer``.
    """
    for name in ("unet", "transformer"):
        module = getattr(pipe, name, None)
        if isinstance(module, nn.Module):
            return name, module
    raise TypeError(
        f"a blend needs a diffusers pipeline with a unet or a transformer, got {type(pipe).__name__}; "
        "use a Stable Diffusion, SDXL, SD 3 or Flux pipeline"
    )


def denoisers_of(pipe: Any) -> dict[str, Any]:
    """Return every network that predicts, by name: a second one may serve the low noise levels, as in Wan 2.2.

    Raises:
        TypeError: if there is none.
    """
    first, module = denoiser_of(pipe)
    names = {*getattr(pipe, "components", ()), *getattr(pipe, "_lora_loadable_modules", ())}
    others = {name: getattr(pipe, name, None) for name in sorted(names) if name.startswith(f"{first}_")}
    return {first: module} | {name: other for name, other in others.items() if isinstance(other, nn.Module)}


def text_encoders_of(pipe: Any) -> dict[str, Any]:
    """Return the text encoders that LoRA files of this pipeline can address, by name."""
    names = [name for name in getattr(pipe, "_lora_loadable_modules", ()) if name.startswith("text_encoder")]
    found = {name: getattr(pipe, name, None) for name in names}
    return {name: module for name, module in found.items() if isinstance(module, nn.Module)}


def lora_components(pipe: Any) -> dict[str, Any]:
    """Return the denoisers, then the text encoders, by name."""
    return denoisers_of(pipe) | text_encoders_of(pipe)
