"""Feynman-Kac steering: particles of the base, resampled by potentials made of the reward.

With predictions r_k = r(E[x_0 | x_{t_k}]) at the resampling times and r_K the reward of the sample itself, the
particles are weighted by a product of potentials whose total telescopes to exp(r_K / alpha),

    difference: exp((r_k - r_{k-1}) / alpha),
    maximum:    exp(max_{j<=k} r_j / alpha),
    sum:        exp(sum_{j<=k} r_j / alpha),

where for the last two the final potential makes up for the others. So with enough particles the weighted samples
have the law p_base exp(r / alpha) / Z, whatever the potential; with few, the potentials differ. Where a reward is
not finite the potential is zero, and so is the weight from there on.

Source: Singhal et al. 2501.06848 (FK steering); Del Moral 2004.
"""

from __future__ import annotations

from typing import Final, Literal, get_args

import torch
from pydantic import Field

from sdeblend.certificate import effective_sample_size
from sdeblend.correct import systematic_resample
from sdeblend.methods.blocks import advance, blocks, denoised
from sdeblend.methods.case import Case, Drawn, NotApplicable, usable
from sdeblend.methods.draws import Draws
from sdeblend.methods.method import Method, Sampler
from sdeblend.preference import Preference
from sdeblend.shell.settings import Settings

Potential = Literal["difference", "maximum", "sum"]


class Steering(Settings):
    """Options of steering.

    Attributes:
        every: steps between two resampling times.
        threshold: effective share of the particles below which they are redrawn.
    """

    every: int = Field(default=5, ge=1)
    threshold: float = Field(default=0.5, gt=0, le=1)


def _steered(potential: Potential) -> Sampler:
    """Return the sampler with the seeds as particles of one problem; facts: "ess" of the final weights."""

    def sample(case: Case, preference: Preference, draws: Draws, options: Steering) -> Drawn:
        if case.kl_weight is None:
            raise NotApplicable("it needs a kl_weight that is known")
        if float(case.grid[-1]) != 0:
            raise NotApplicable("it needs a grid that ends at 0, since its last potential is exact")
        x, score, reward = case.start(draws), case.base(len(draws)), case.weighted(preference)
        noise, generator, steps, batch = draws.noise(), draws.generator("ancestors"), len(case.grid) - 1, len(draws)
        given = torch.zeros(batch, dtype=torch.float64, device=x.device)  # log of the potentials so far
        residual = given.clone()  # of those since the last resampling
        history = given.clone()  # running maximum or sum of predicted rewards over alpha
        if potential == "maximum":
            history -= torch.inf
        lost = torch.zeros(batch, dtype=torch.bool, device=x.device)  # since then, by a reward that failed
        calls, rewards, first_ancestors = 0, 0, torch.arange(batch, device=x.device)
        for first, last in blocks(case, options.every):
            x = advance(case, score, x, first, last, noise)
            value = usable(reward(denoised(case, score, x, last))).double() / case.kl_weight
            calls += last - first + bool(case.grid[last])
            rewards += 1
            if potential == "difference" or last == steps:
                increment = value - given
            else:
                history = torch.maximum(history, value) if potential == "maximum" else history + value
                increment = history
            lost = lost | value.isneginf()
            if bool(lost.all()):
                raise FloatingPointError(
                    f"steering needs one of {batch} particles to have had finite rewards only, got none at step "
                    f"{last}; take more"
                )
            given, residual = given + increment, (residual + increment).masked_fill(lost, -torch.inf)
            if last < steps and float(effective_sample_size(residual)) < options.threshold * batch:
                chosen = systematic_resample(residual, generator)
                x, given, history = x[chosen], given[chosen], history[chosen]
                first_ancestors = first_ancestors[chosen]
                residual, lost = torch.zeros_like(residual), torch.zeros_like(lost)
        facts = {"ess": float(effective_sample_size(residual)) / batch}
        return Drawn(x, calls, reward_calls=rewards, log_weights=residual, ancestors=first_ancestors, facts=facts)

    return sample


METHODS: Final = tuple(
    Method(
        f"steer-{potential}", f"FK steering, {potential}", _steered(potential), "Singhal et al. 2501.06848",
        "1 model call a step, 1 reward call a resampling", Steering,
    )
    for potential in get_args(Potential)
)  # fmt: skip
