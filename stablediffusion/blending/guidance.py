"""How a pipeline guides, read off what it hands to its scheduler: the weights of the rows of a step's passes.

Guidance of every usual kind (classifier-free in one batch or two calls, perturbed attention, skipped layers) makes of
the branches' predictions P_1 .. P_k of an image the sum_j w_j P_j, with weights that sum to one and are the same for
every image and pixel. They are found by least squares from the blend's own predictions, and the members' guided
predictions are the same sum of theirs. What is no such sum (rescaled to another norm, projected) is told apart by its
residual, and for a single image, where a rescaling is a multiple, by the sum of the weights.

Source: Ho and Salimans 2207.12598 (classifier-free guidance).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sdeblend.blend import Evaluation, combine

_FITTED = 1 << 13  # numbers of a prediction that a fit looks at; the residual is of all
_HALF = (torch.float16, torch.bfloat16)


def after_guidance(passes: Sequence[tuple[Evaluation, Tensor]], output: Tensor) -> Evaluation | None:
    """Return the evaluation after guidance, members (K, B, *event), or None if guidance is no sum of the passes.

    Args:
        passes: of one step, each the evaluation (members (K, N, G, *any)) and what the pipeline got of it
            (N, G, *any): the rows of one call, G N of them, a multiple of B.
        output: what the scheduler gets, (B, *event).
    """
    members = [part for evaluation, _ in passes for part in _branches(evaluation.members, output)]
    got = [part[0] for _, value in passes for part in _branches(value.unsqueeze(0), output)]
    if not members or any(part.shape[2:] != output.shape[1:] for part in members):
        return None
    weights = _fit(got, output)
    exact = output.float() if output.dtype in _HALF else output
    error = float((_sum(got, weights).to(exact.dtype) - exact).norm())
    size = sum(abs(w) * float(part.float().norm()) for part, w in zip(got, weights, strict=True))
    # guidance is computed in the output's precision: each branch is rounded in proportion to its weight
    if not error <= max(1e-5, float(torch.finfo(output.dtype).eps)) * size:
        return None
    if abs(abs(sum(weights)) - 1) > (5e-2 if output.dtype in _HALF else 1e-3):
        return None
    first, total = passes[0][0], _sum(members, weights)
    return Evaluation(combine(total, first.coefficients), total, first.coefficients, first.active)


def _sum(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = torch.zeros_like(parts[0], dtype=torch.float32 if parts[0].dtype in _HALF else parts[0].dtype)
    for part, weight in zip(parts, weights, strict=True):
        total.add_(part, alpha=weight)
    return total


def _branches(members: Tensor, output: Tensor) -> list[Tensor]:
    """Return the branches (K, B, *event) of rows (K, N, G, *any), cut to what goes on to the scheduler."""
    rows = members.transpose(1, 2).flatten(1, 2)
    if rows.shape[1] % len(output):
        return []
    event = rows.shape[2:]
    branches = rows.reshape(len(rows), -1, len(output), *event).transpose(0, 1)
    wanted = output.shape[1:]
    if event.numel() == wanted.numel():
        branches = branches.reshape(*branches.shape[:3], *wanted)
    elif len(event) == len(wanted):  # tokens of a reference image, or a predicted variance, are cut off behind
        for dim, length in enumerate(wanted):
            if event[dim] > length:
                branches = branches.narrow(3 + dim, 0, length)
    return list(branches)


def _fit(branches: Sequence[Tensor], output: Tensor) -> list[float]:
    """Return the weights w_j of the branches that come nearest to the output; of equal branches the first has all."""
    step = max(1, output.numel() // _FITTED)
    first, *others = (part.detach().flatten()[::step].cpu().to("cpu", torch.float64) for part in branches)
    columns = torch.stack([first, *(other - first for other in others)], dim=1)
    size = columns.norm(dim=0)
    # a branch that differs by rounding only says nothing
    used = size > 1e-6 * size[0]
    used[0] = True
    target = output.detach().flatten()[::step].cpu().to("cpu", torch.float64)
    solved = torch.zeros(len(branches), dtype=torch.float64)
    scaled = columns[:, used] / size[used].clamp_min(1e-300)
    solution = torch.linalg.lstsq(scaled, target[:, None], driver="gelsd").solution[:, 0]
    solved[used] = solution / size[used].clamp_min(1e-300)
    total, *rest = solved.tolist()
    return [total - sum(rest), *rest]
