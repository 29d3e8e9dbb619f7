"""Attach a blend to an unmodified diffusers pipeline, in place and for the length of a ``with`` block.

    with blend(pipe, members, Preference({"compress": 0.3, "vivid": 0.7})) as knobs:
        images = pipe("a red circle", eta=1.0).images
        print(knobs.certificate)

Each denoiser's forward is replaced by one that evaluates base and members and returns their ``sdeblend.Blend``;
pipeline, scheduler, guidance and everything else stay diffusers'. Blending raw predictions before
classifier-free guidance equals the paper's blend after it, because coefficients sum to one. For eps-, v- and
x0-networks this blends scores; for flow models it blends velocities, and the sampler is their ODE unless the scheduler
takes noise (``FlowAncestral``).

Modes: "mpa" blends every member at every step (DB-MPA, DB-KLA through the strength); "ls" runs one member a step and
image (DB-MPA-LS); "soup" and "soup-factors" average weights, as baselines (``adapters``).

A ControlNet sees the base's prompt embeddings, and its residuals serve every member.

Source: Diffusion Blend 2505.18547, Algorithms 1 to 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, get_args

from torch import nn

from sdeblend import Correction, Preference
from sdeblend.correct import CorrectionMode
from sdeblend.select import Selection
from stablediffusion.adapters.members import Members
from stablediffusion.adapters.soups import SOUPS
from stablediffusion.blending.denoiser import Denoiser
from stablediffusion.blending.embeddings import TextEmbeddings
from stablediffusion.blending.engine import Engine, Mode
from stablediffusion.blending.knobs import Knobs
from stablediffusion.blending.patches import (
    followed_scheduler,
    forward_name,
    patched,
    patched_forward,
    running_pipeline,
)
from stablediffusion.pipelines.components import denoisers_of
from stablediffusion.pipelines.schedulers import check_resampling

_MARK = "_sdeblend_attached"


@contextmanager
def blend(
    pipe: Any,
    members: Members,
    preference: Preference | Mapping[str, float],
    *,
    mode: Mode = "mpa",
    correct: CorrectionMode | Correction | None = "certify",
    selection: Selection = "systematic",
    seed: int = 0,
    batched: bool | None = None,
) -> Iterator[Knobs]:
    """Attach a blend to a pipeline for the length of the block; afterwards the pipeline is as before.

    Args:
        pipe: a diffusers pipeline with a UNet or a transformer, of any task.
        members: what ``load_members`` returned for this pipeline (or one that shares its networks).
        preference: weights by member name, and the strength.
        mode: "mpa" (every member at every step), "ls" (one a step), "soup" or "soup-factors".
        correct: "certify" (weights and certificate, images as they are), "resample" or a ``Correction`` (images
            of a prompt are particles), or None. For mode "mpa".
        selection: how mode "ls" draws: "systematic", "independent" or "shared".
        seed: of the blend's own draws (selection, resampling), made anew in every run; image i has its own.
        batched: adapters side by side in one pass; by default on a CUDA device only, where small batches leave
            room. Same numbers up to rounding.

    Yields:
        the knobs: ``preference`` to change, certificates and counts to read.

    Raises:
        ValueError: a preference that names no member or, for "ls", is no probability vector; an adapter that is
            gone or fused; a cache; a scheduler that the correction does not support; a pipeline attached
            already; a block in which the denoiser never ran.

    Source: Diffusion Blend 2505.18547, Algorithms 1 to 3.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"the mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")
    networks = denoisers_of(pipe)
    for name, network in networks.items():
        check_free(name, network)
    members = members.on(pipe)
    correction = _checked(correct, mode, pipe)
    if batched is None:
        cuda = all(next(network.parameters()).is_cuda for network in networks.values())
        batched = mode == "mpa" and cuda and members.adapters_only
    with ExitStack() as undo:
        undo.enter_context(members.borrowed())
        embeddings = TextEmbeddings()
        denoisers = {
            name: Denoiser(
                getattr(network, forward_name(network)), network, members, side_by_side=batched, embeddings=embeddings
            )
            for name, network in networks.items()
        }
        engine = Engine(pipe, members, denoisers, mode=mode, correction=correction, selection=selection, seed=seed)
        undo.enter_context(engine.soup)
        knobs = Knobs(engine)
        knobs.preference = preference
        undo.enter_context(_attached(pipe, networks, engine))
        yield knobs
    unused = [name for name, calls in engine.calls.items() if calls == 0]
    if unused:
        raise ValueError(
            f"a blend on {type(pipe).__name__} was never used: no call of its {' or '.join(unused)} came through in "
            "the 'with' block; call this pipeline inside it, and no copy of it"
            + (f", with steps for both, or without its {unused[0]}" if len(unused) < len(networks) else "")
        )


@contextmanager
def _attached(pipe: Any, networks: Mapping[str, nn.Module], engine: Engine) -> Iterator[None]:
    """Let the engine work in place of the denoisers, of each step of the scheduler, and of the prompt encoder."""
    with ExitStack() as undo:
        follow = undo.enter_context(followed_scheduler(pipe.scheduler, engine.restart, engine.step))
        for name, network in networks.items():
            network.__dict__[_MARK] = engine
            undo.callback(network.__dict__.pop, _MARK, None)

            def forward(original: Callable[..., Any], *args: Any, name: str = name, **kwargs: Any) -> Any:
                engine.pipe = running_pipeline() or engine.pipe
                follow(engine.pipe.scheduler)
                return engine.forward(name, original, *args, **kwargs)

            undo.enter_context(patched_forward(network, forward))
        if hasattr(pipe, "prepare_latents"):
            undo.enter_context(patched(pipe, "prepare_latents", engine.prepare))
        for name, part in getattr(pipe, "components", {}).items():
            if "controlnet" in name and isinstance(part, nn.Module):
                undo.callback(part.register_forward_pre_hook(engine.look, with_kwargs=True).remove)
        if engine.members.text_members and engine.mode not in SOUPS:
            undo.enter_context(patched(pipe, "encode_prompt", engine.encode))
        yield


def check_free(name: str, network: nn.Module) -> None:
    """Raise unless a denoiser can carry a blend."""
    if _MARK in network.__dict__:
        raise ValueError(
            f"a {name} can carry one blend at a time, got a second one; leave the first 'with' block, or change "
            "its knobs.preference"
        )
    if network.__dict__.get("_compiled_call_impl") is not None:
        raise ValueError(
            f"a blend cannot enter a {name} compiled in place, got one; use pipe.{name} = torch.compile(pipe.{name}) "
            f"or pipe.{name}.compile_repeated_blocks()"
        )


def _checked(correct: CorrectionMode | Correction | None, mode: Mode, pipe: Any) -> Correction | None:
    """Return the correction that a mode has on a pipeline, or raise if it cannot be had."""
    correction = Correction(correct) if isinstance(correct, str) else correct
    if correction is None or (mode != "mpa" and correction.mode == "certify"):
        return None
    if correction.groups is not None:
        raise ValueError("a pipeline's particles are its images of one prompt, got groups; leave groups out")
    if correction.mode == "resample":
        if mode != "mpa":
            raise ValueError(f"resampling corrects a blend of all members, got mode {mode!r}; use mode='mpa'")
        check_resampling(pipe.scheduler)
    return correction
