"""Methods of a pipeline's parts replaced for the length of a block, and put back whatever happens."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


@contextmanager
def patched(owner: Any, name: str, around: Callable[..., Any]) -> Iterator[None]:
    """Replace a bound method of one object by ``around(original, ...)`` with the same signature."""
    original = getattr(owner, name)
    own = owner.__dict__.get(name)
    owner.__dict__[name] = _wrapped(original, around)
    try:
        yield
    finally:
        if own is None:
            owner.__dict__.pop(name, None)
        else:
            owner.__dict__[name] = own


@contextmanager
def patched_forward(network: nn.Module, around: Callable[..., Any]) -> Iterator[None]:
    """Replace a network's forward, wherever offloading moves it in the meantime."""
    name = forward_name(network)
    original, own = getattr(network, name), network.__dict__.get(name)
    replacement = network.__dict__[name] = _wrapped(original, around)
    try:
        yield
    finally:
        for place in ("forward", "_old_forward"):
            if network.__dict__.get(place) is replacement:
                if own is None and place == "forward":
                    del network.__dict__[place]
                else:
                    network.__dict__[place] = original


@contextmanager
def followed_scheduler(
    scheduler: Any, begin: Callable[[], None], step: Callable[..., Any]
) -> Iterator[Callable[[Any], None]]:
    """Call ``begin`` before each run of a scheduler, and ``step(original, ...)`` in place of each step.

    Yields:
        what must be called now and then with the scheduler that is in use, to follow it to another one.
    """
    with ExitStack() as undo:
        followed: list[Any] = []

        def begun(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            begin()
            return original(*args, **kwargs)

        def follow(scheduler: Any) -> None:
            if followed == [] or followed[0] is not scheduler:
                undo.close()
                followed[:] = [scheduler]
                undo.enter_context(patched(scheduler, "set_timesteps", begun))
                undo.enter_context(patched(scheduler, "step", step))
                begin()

        follow(scheduler)
        yield follow


def running_pipeline() -> Any | None:
    """Return the diffusers pipeline in whose call this is, if any: several may share one denoiser."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__":
            owner = frame.f_locals.get("self")
            if hasattr(owner, "scheduler") and hasattr(owner, "components"):
                return owner
        frame = frame.f_back  # type: ignore[assignment]
    return None


def forward_name(network: nn.Module) -> str:
    """Return where a network's own forward is: accelerate's offloading owns ``forward``, and its hooks stay outside."""
    return "_old_forward" if hasattr(network, "_hf_hook") else "forward"


def _wrapped(original: Callable[..., Any], around: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    return replacement
