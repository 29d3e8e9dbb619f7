"""Pipelines from a folder or a hub id, with one sentence where there is none."""

from __future__ import annotations

from typing import Any

import diffusers
import torch


def load_pipeline(path: str, dtype: torch.dtype, *, what: str) -> Any:
    """Load a diffusers pipeline; its progress bar is off.

    Args:
        path: folder or hub id.
        dtype: of the networks.
        what: names the setting, for messages.

    Raises:
        ValueError: if it cannot be read.
    """
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(path, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{what} must be a folder or hub id of a diffusers pipeline, got {path!r}, which cannot be read "
            f"({type(error).__name__}); check it"
        ) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe
