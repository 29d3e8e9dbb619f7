"""One member a step (DB-MPA-LS): the cost of one model, the law of the blend as the step goes to zero.

At each step one member i is drawn with probability w_i and steps alone. The generator of the process is
that of the blend, so marginals agree in the limit; at step h the one-step covariance has the extra term
h^2 g^4 Var_w(S_i). How the draws are made matters at finite h:

* shared: one draw for the whole batch a step (the published code): errors of order n^(-1/2) that
  no number of samples averages out.
* independent: one draw a sample and step, order 1/n.
* systematic: each sample follows a low-discrepancy sequence from a random start, order 1/n with a
  smaller constant. The sequence is the chairman assignment of Tijdeman: after every k steps the
  count of member i is within 1 - 1/(2K - 2) of k w_i, so in any window within 1 for two members and
  within 2 for more.

Only for coefficients that are probabilities: a negative one cannot be drawn.

Source: Diffusion Blend 2505.18547, Proposition 2 and Algorithm 3; Tijdeman, The chairman assignment problem, 1980.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from sdeblend.blend import check_coefficients
from sdeblend.preference import Preference
from sdeblend.score import Bound, ScoreStack, prepare_times, restrict_rows

Selection = Literal["systematic", "independent", "shared"]
# A random start in a sequence of this length gives member i a probability within 2/PERIOD of w_i.
PERIOD = 2048


def check_probabilities(coefficients: Tensor, count: int) -> Tensor:
    """Return ``coefficients`` if each row is a probability vector over ``count`` members, or raise."""
    c = check_coefficients(torch.as_tensor(coefficients, dtype=torch.float64), count)
    if bool((c < 0).any()):
        raise ValueError(
            f"one member a step needs coefficients that are probabilities, got {float(c.min()):g}; "
            "use a Blend for negative ones (strength above 1)"
        )
    return c


def systematic_sequence(probabilities: Tensor, length: int) -> Tensor:
    """Return the chairman assignment: the member of each of ``length`` steps, spread as evenly as can be.

    Args:
        probabilities: (R, K), rows sum to one.
        length: number of steps.

    Returns:
        members, int16 (R, length); the count of member i among the first k differs from k w_i by at most
        1 - 1/(2K' - 2), K' the number of members of non-zero probability.

    Source: Tijdeman 1980: of the members whose quota is due, take the one whose deadline is first.
    """
    # numpy: the recursion is thousands of tiny operations, where its overhead is a fifth of torch's.
    w = probabilities.double().numpy()
    slack = 1 / (2 * np.maximum((w > 0).sum(1, keepdims=True), 2) - 2)
    rate, rows = np.where(w > 0, w, 1.0), np.arange(len(w))
    count = np.zeros_like(w)
    out = np.empty((len(w), length), dtype=np.int16)
    for step in range(1, length + 1):
        due = (step * w - count >= slack - 1e-9) & (w > 0)
        choice = np.where(due, (1 - slack + count) / rate, np.inf).argmin(1)
        count[rows, choice] += 1
        out[:, step - 1] = choice
    return torch.from_numpy(out)


def select_members(
    probabilities: Tensor,
    steps: int,
    batch: int,
    method: Selection,
    generator: torch.Generator | Sequence[torch.Generator],
) -> Tensor:
    """Draw which member serves each sample at each step.

    Args:
        probabilities: (K,) or (B, K).
        steps: number of steps n.
        batch: number of samples B.
        method: "systematic", "independent" or "shared" (see the module).
        generator: its own generator, so that the noise of a run stays the same; or one a sample, so that
            a sample's members do not depend on the batch it is in (not for "shared").

    Returns:
        members, int16 (n, B), on the CPU.
    """
    if method not in get_args(Selection):
        raise ValueError(f"the selection must be one of {', '.join(get_args(Selection))}, got {method!r}")
    if not isinstance(generator, (torch.Generator, list, tuple)):
        raise TypeError(f"a selection needs a torch.Generator of its own, got {type(generator).__name__}; seed one")
    if not isinstance(generator, torch.Generator) and (method == "shared" or len(generator) != batch):
        raise ValueError(
            f"selection {method!r} of {batch} samples got {len(generator)} generators; give one generator"
            + ("" if method == "shared" else ", or one a sample")
        )
    if method == "shared":
        if probabilities.ndim == 2:
            raise ValueError("a shared draw needs one set of weights for the batch, got one a sample; use 'systematic'")
        draw = torch.multinomial(probabilities, steps, replacement=True, generator=_only(generator))
        return draw.to(torch.int16)[:, None].expand(steps, batch).contiguous()
    if method == "independent":
        cumulative = probabilities.cumsum(-1)[..., :-1].expand(batch, -1)
        draws = [(_uniform(batch, generator)[:, None] >= cumulative).sum(1).to(torch.int16) for _ in range(steps)]
        return torch.stack(draws)
    rows, row = probabilities[None], torch.zeros(batch, dtype=torch.long)
    if probabilities.ndim == 2:
        rows, row = probabilities.unique(dim=0, return_inverse=True)
    sequence = systematic_sequence(rows, PERIOD + steps)
    start = (_uniform(batch, generator) * PERIOD).long()
    return torch.stack([sequence[row, start + n] for n in range(steps)])


def _only(generator: torch.Generator | Sequence[torch.Generator]) -> torch.Generator:
    if not isinstance(generator, torch.Generator):
        raise TypeError("this selection needs one torch.Generator")
    return generator


def _uniform(batch: int, generator: torch.Generator | Sequence[torch.Generator]) -> Tensor:
    """Return float64 (B,) in [0, 1), from one generator or from each sample's own."""
    if isinstance(generator, torch.Generator):
        return torch.rand(batch, generator=generator, dtype=torch.float64)
    return torch.cat([torch.rand(1, generator=g, dtype=torch.float64) for g in generator])


def member_scores(stack: ScoreStack, x: Tensor, t: Tensor, member: Tensor) -> Tensor:
    """Evaluate each row by one member of its own: one evaluation a row, whatever K is.

    Args:
        stack: K members.
        x: state (B, *event).
        t: time, 0-dim.
        member: which member serves each row, long (B,).

    Returns:
        scores (B, *event).
    """
    used = member.unique().tolist()
    if len(used) == 1:
        return stack(x, t, used)[0]
    out = torch.empty_like(x)
    for k in used:
        index = (member == k).nonzero().flatten()
        out[index] = restrict_rows(stack, index)(x[index], t, [k])[0]
    return out


class OneMemberPerStep(Bound):
    """DB-MPA-LS as a score function: at each time of the grid every sample has one member.

    The draw is keyed on the time, not on the call, so a step that calls the score twice at one time
    (Heun, guidance) gets the same member, and a run can be repeated.

    Args:
        stack: K members.
        coefficients: a ``Preference`` (member 0 is the base), (K,) or (B, K); probabilities.
        grid: the times of the run, decreasing.
        batch: number of samples B.
        method: "systematic", "independent" or "shared".
        generator: draws the members and nothing else, on the CPU; or one a sample.

    Raises:
        ValueError: a negative coefficient, a sum other than one, or an unknown method.
    """

    def __init__(
        self,
        stack: ScoreStack,
        coefficients: Preference | Tensor,
        grid: Tensor,
        batch: int,
        *,
        method: Selection = "systematic",
        generator: torch.Generator | Sequence[torch.Generator],
    ) -> None:
        if isinstance(coefficients, Preference):
            coefficients = coefficients.over(stack)
        self.probabilities = check_probabilities(coefficients, len(stack))
        if self.probabilities.ndim == 2 and len(self.probabilities) != batch:
            raise ValueError(f"weights for {len(self.probabilities)} samples need a batch of as many, got {batch}")
        self.stack = stack
        self.index = select_members(self.probabilities, len(grid), batch, method, generator)
        self._place = {float(t): n for n, t in enumerate(grid)}

    def members_at(self, t: Tensor) -> Tensor:
        """Return which member serves each sample at time t, int16 (B,), on the CPU.

        Raises:
            ValueError: a time that is not of the grid.
        """
        place = self._place.get(float(t))
        if place is None:
            raise ValueError(
                f"one member a step is drawn for the times of its grid, got t = {float(t):g}; solve on that grid"
            )
        return self.index[place]

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Return each sample's own member's score (B, *event); one evaluation a sample."""
        return member_scores(self.stack, x, t, self.members_at(t).to(x.device))

    def prepare(self, times: Tensor) -> None:
        prepare_times(self.stack, times)

    def rows(self, index: Tensor) -> OneMemberPerStep:
        part, rows = copy.copy(self), index.cpu()
        part.stack, part.index = restrict_rows(self.stack, index), self.index[:, rows]
        part.probabilities = self.probabilities[rows] if self.probabilities.ndim == 2 else self.probabilities
        return part
