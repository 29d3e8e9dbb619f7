"""Members that are networks: a base trained on a mixture, low-rank members trained on its tilts, and their soups.

Each member is tuned by denoising score matching on exact samples of its tilt, that is for its reward with nothing in
the way but the network: what is left between a soup, a blend and the tuned model is their own. With W the base's
weights and U_i D_i member i's difference,

    soup of differences:  W + sum_i w_i U_i D_i,        soup of factors:  W + (sum_i w_i U_i) (sum_i w_i D_i),

the second one, with cross terms U_i D_j, is what averaging the files of two LoRAs does.

Source: Rame et al. 2306.04488 (rewarded soup); Hu et al. 2106.09685 (LoRA); Vincent 2011 (denoising score matching).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from sdeblend.methods.case import MoreMembers, OneModel
from sdeblend.preference import Preference
from sdeblend.schedule import NoiseSchedule
from sdeblend.score import ScoreFunction, Stack
from toy.evaluate.case import MixtureCase
from toy.mixtures.mixture import GaussianMixture
from toy.networks.network import Network, add_low_rank, for_mixture, low_rank_layers, pretrain
from toy.problems import Problem
from toy.tables import Solver

BATCH: Final = 512
Factors = list[tuple[Tensor, Tensor]]


class NetworkScore:
    """The score -eps(x, t) / sigma(t) of a network; differentiable in x where gradients are on.

    Args:
        network: predicts eps.
        schedule: the forward process.
    """

    def __init__(self, network: Network, schedule: NoiseSchedule) -> None:
        self.network, self.schedule = network.requires_grad_(False).eval(), schedule

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the score (B, d) at x (B, d) and time t."""
        eps: Tensor = self.network(x, t.to(torch.float64).expand(len(x)))
        return eps / -float(self.schedule.sigma(t))


class LearnedCase(MixtureCase):
    """A problem whose base, members and model tuned for r(w) are networks; target and rewards stay in closed form.

    Args:
        problem, solver, variant: as ``MixtureCase``.
        rank: of the members' differences to the base.
        train_steps: of the base and of each member.
        seed: of weights and training.
        bases: trained bases by what they model, to be looked up in and added to.
    """

    def __init__(
        self,
        problem: Problem,
        solver: Solver,
        variant: str,
        *,
        rank: int,
        train_steps: int,
        seed: int,
        bases: dict[bytes, Network],
    ) -> None:
        super().__init__(problem, solver, variant)
        self.rank, self.steps, self.seed = rank, train_steps, seed
        base = self.problem.base
        parts = (base.log_weights, base.means, base.covariances, torch.tensor(seed))
        known = b"".join(value.numpy().tobytes() for value in parts)
        if known not in bases:
            bases[known] = for_mixture(base, self.schedule, seed=seed)
            pretrain(bases[known], base, steps=self.steps, batch=BATCH, seed=seed)
        self.network = bases[known].requires_grad_(False)
        self.factors = [self.tuned(law, 1 + place) for place, law in enumerate(self.problem.members())]
        self._scores = Stack([self._with([]), *(self._with([(1.0, f)]) for f in self.factors)], self.names)
        self._tuned: dict[tuple[Any, ...], NetworkScore] = {}

    def stack(self, batch: int) -> Stack:  # type: ignore[override]
        return self._scores

    def differentiable_base(self, batch: int) -> ScoreFunction:
        return self._scores.functions[0]

    def higher_order(self, role: MoreMembers, preference: Preference, batch: int) -> None:  # type: ignore[override]
        return None

    def score(self, role: OneModel, preference: Preference, batch: int) -> ScoreFunction | None:
        shares = list(self.shares(preference).values())
        if role == "soup-deltas":
            return self._with(list(zip(shares, self.factors, strict=True)))
        if role == "soup-factors":
            return self._with([(1.0, [_mean(shares, layer) for layer in zip(*self.factors, strict=True)])])
        key = (*self.weights(preference).items(), preference.strength)
        if key not in self._tuned:
            self._tuned[key] = self._with([(1.0, self.tuned(self.target(preference), 1 + len(self.factors)))])
        return self._tuned[key]

    def tuned(self, law: GaussianMixture, stream: int) -> Factors:
        """Return the low-rank factors (U, D) a layer of the base tuned to a law."""
        network, seed = copy.deepcopy(self.network), self.seed * 100 + stream
        add_low_rank(network, self.rank, torch.Generator().manual_seed(seed))
        pretrain(network, law, steps=self.steps, batch=BATCH, seed=seed)
        return [(layer.up.detach(), layer.down.detach()) for layer in low_rank_layers(network)]

    def _with(self, differences: Sequence[tuple[float, Factors]]) -> NetworkScore:
        """Return the base with weighted differences added to its weights."""
        network = copy.deepcopy(self.network)
        linear = [layer for layer in network.layers if isinstance(layer, nn.Linear)]
        with torch.no_grad():
            for weight, factors in differences:
                for layer, (up, down) in zip(linear, factors, strict=True):
                    layer.weight += weight * up @ down
        return NetworkScore(network, self.schedule)


def _mean(shares: Sequence[float], layer: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the weighted sums of the factors U and of the factors D of one layer."""
    up, down = (torch.stack([w * f[k] for w, f in zip(shares, layer, strict=True)]).sum(0) for k in (0, 1))
    return up, down
