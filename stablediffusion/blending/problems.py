"""Which images of a run are particles of one problem: those with the same inputs and the same weights.

An image's inputs are the entries of its rows in every batched argument of the denoiser (prompts, sizes, image
prompts), what goes into the state beside the noise (a masked picture, a reference's tokens), and the pictures that the
pipeline starts from or a ControlNet looks at. Rows of one text-encoder batch differ by rounding, and are the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from stablediffusion.blending.calls import Call

# Made from the state at each step, so that they differ between images of one problem.
_OF_THE_STATE = ("down_block_additional", "mid_block_additional", "controlnet", "block_samples")


def same_problem(inputs: Iterable[Tensor], coefficients: Tensor, images: int) -> Tensor:
    """Return which images are of one problem, long (B,), numbered in order of appearance.

    Args:
        inputs: each (n, ...): entry i of n = B is image i's, n = G B has branches in front; of other numbers an entry
            may be any image's, so that images are told apart rather than mixed up.
        coefficients: (K,) or (B, K).
        images: B.
    """
    own = [_by_image(value, images) for value in inputs if value.ndim and len(value) > 1]
    if coefficients.ndim == 2:
        own.append(coefficients)
    groups = torch.full((images,), -1)
    for first in range(images):
        if groups[first] < 0:
            same = groups < 0
            for value in own:
                same &= _equal(value, value[first])
            groups[same] = int(groups.max()) + 1
    return groups


def inputs_of(calls: Iterable[Call], state: Tensor) -> list[Tensor]:
    """Return the batched inputs of a step's calls of the denoiser.

    Args:
        calls: of one step.
        state: what the scheduler steps, (B, *event): the rest of a call's state is an input.
    """
    found: list[Tensor] = []
    for call in calls:
        found += [value for name, value in call.batched() if not name.startswith(_OF_THE_STATE)]
        sample = call.sample
        if sample.ndim == state.ndim:
            for dim, length in enumerate(state.shape[1:], start=1):
                if sample.shape[dim] > length:
                    found.append(sample.narrow(dim, length, sample.shape[dim] - length))
    return found


def pictures_of(arguments: Mapping[str, object]) -> list[Tensor]:
    """Return the pictures among a method's arguments: tensors (n, ...) other than noise and start."""
    return [
        value
        for name, value in arguments.items()
        if isinstance(value, Tensor) and value.ndim >= 3 and name not in ("latents", "noise")
    ]


def _by_image(value: Tensor, images: int) -> Tensor:
    """Return an input with an entry an image (B, ...)."""
    count = len(value)
    if count % images == 0:
        return value.reshape(count // images, images, *value.shape[1:]).transpose(0, 1)
    if images % count == 0:  # repeated one after the other or each by itself: equal only if equal in both ways
        index = torch.arange(images, device=value.device)
        return torch.stack([value[index % count], value[index // (images // count)]], dim=1)
    return torch.arange(images, device=value.device)


def _equal(value: Tensor, one: Tensor) -> Tensor:
    """Return which entries of (B, ...) are equal to one up to rounding, bool (B,) on the CPU."""
    if not value.is_floating_point():
        return (value == one).reshape(len(value), -1).all(1).cpu()
    tolerance = 1e-5 if value.dtype in (torch.float32, torch.float64) else 2 * torch.finfo(value.dtype).eps
    flat, wanted = value.reshape(len(value), -1), one.reshape(1, -1)
    if value.dtype not in (torch.float32, torch.float64):
        flat, wanted = flat.float(), wanted.float()
    return ((flat - wanted).norm(dim=1) <= tolerance * torch.maximum(flat.norm(dim=1), wanted.norm(dim=1))).cpu()
