"""Pipelines from a folder or a hub id: one sentence where there is none, silence where all is well."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging


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


@contextmanager
def no_false_alarms(*, checked: bool = False) -> Iterator[None]:
    """Silence base weights "newly initialised" (a test compares them), files for one component, other adapters.

    Args:
        checked: silence diffusers too, where what it warns of is checked here and refused.
    """
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    other = diffusers_logging.get_verbosity()
    logging.set_verbosity_error()
    if checked:
        diffusers_logging.set_verbosity(diffusers_logging.CRITICAL)  # its errors are raised as well
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            warnings.filterwarnings("ignore", message="Adapter .* was active which is now deleted")
            yield
    finally:
        logging.set_verbosity(level)
        diffusers_logging.set_verbosity(other)
        if bar:
            logging.enable_progress_bar()
