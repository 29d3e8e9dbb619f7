"""Methods of a pipeline's parts replaced for the length of a block, and put back whatever happens."""

from __future__ import annotations

import functools
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
def followed_scheduler(pipe: Any, begin: Callable[[], None], step: Callable[..., Any]) -> Iterator[Callable[[], None]]:
    """Call ``begin`` before each run of a pipeline's scheduler, and ``step(original, ...)`` in place of each step.

    Yields:
        what must be called now and then, to follow a scheduler that is exchanged inside the block.
    """
    with ExitStack() as undo:
        followed: list[Any] = []

        def begun(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            begin()
            return original(*args, **kwargs)

        def follow() -> None:
            if followed == [] or followed[0] is not pipe.scheduler:
                undo.close()
                followed[:] = [pipe.scheduler]
                undo.enter_context(patched(pipe.scheduler, "set_timesteps", begun))
                undo.enter_context(patched(pipe.scheduler, "step", step))
                begin()

        follow()
        yield follow


def forward_name(network: nn.Module) -> str:
    """Return where a network's own forward is: accelerate's offloading owns ``forward``, and its hooks stay outside."""
    return "_old_forward" if hasattr(network, "_hf_hook") else "forward"


def _wrapped(original: Callable[..., Any], around: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    return replacement
