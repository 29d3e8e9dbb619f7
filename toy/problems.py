"""Named problems: a base mixture, rewards, and the KL weight that the members are tuned at.

Member i is the tilt base exp(r_i / alpha) / Z_i; the target of weights w and strength lambda is
base exp(lambda sum_i w_i r_i / alpha) / Z. Blending the members' scores with coefficients c (summing to one over
base and members) and correcting by Feynman-Kac weights W leads to that target, with

    log E[W] = log Z_{sum c_i r_i} - sum_i c_i log Z_i.

Source: Diffusion Blend 2505.18547, section 4; ``grid9`` and ``ring8_das``: Kim et al. (DAS) 2501.05803, toy table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sdeblend.blend import Preference, check_coefficients
from sdeblend.schedule import NoiseSchedule
from toy.mixtures.mixture import GaussianMixture
from toy.mixtures.rewards import QuadraticReward, combine
from toy.mixtures.tilting import check_kl_weight, check_reward
from toy.scores.stack import MixtureStack


@dataclass(frozen=True)
class Problem:
    """A base law, named rewards and a KL weight.

    Attributes:
        name: of the problem.
        base: p_0 of the pre-trained model.
        rewards: r_i by name, at least one.
        kl_weight: alpha of the members, above 0.
        reported: further rewards by name, which are measured and have no member.

    Raises:
        ValueError: no reward, a reward of another dimension, kl_weight not above 0.
    """

    name: str
    base: GaussianMixture
    rewards: Mapping[str, QuadraticReward]
    kl_weight: float
    reported: Mapping[str, QuadraticReward] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.rewards:
            raise ValueError("a problem needs at least one reward, got none")
        for reward in self.measured.values():
            check_reward(reward, self.base.dim)
        check_kl_weight(self.kl_weight)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the rewards, in order."""
        return tuple(self.rewards)

    @property
    def measured(self) -> dict[str, QuadraticReward]:
        """The members' rewards and those that are only reported."""
        return {**self.rewards, **self.reported}

    def with_kl_weight(self, kl_weight: float) -> Problem:
        """Return the problem at another KL weight."""
        return replace(self, kl_weight=kl_weight)

    def member(self, name: str, kl_weight: float | None = None) -> GaussianMixture:
        """Return the tilt of the base by one reward, at ``kl_weight`` or else the problem's.

        Raises:
            ValueError: an unknown reward, or a tilt that does not exist.
        """
        if name not in self.rewards:
            raise ValueError(f"{self.name} has rewards {', '.join(self.names)}, got {name!r}")
        return self.base.tilt(self.rewards[name], kl_weight=self.kl_weight if kl_weight is None else kl_weight)

    def members(self) -> list[GaussianMixture]:
        """Return the member of each reward, in order."""
        return [self.member(name) for name in self.names]

    def reward(
        self, weights: Preference | Mapping[str, float] | Sequence[float], strength: float = 1.0
    ) -> QuadraticReward:
        """Return strength times sum_i w_i r_i.

        Args:
            weights: by name or in order; or a ``Preference``, which brings its own strength.
            strength: lambda; leave it out with a ``Preference``.

        Raises:
            ValueError: weights for other rewards, one set a sample, or a strength given twice.
        """
        if isinstance(weights, Preference):
            if strength != 1:
                raise ValueError(f"a Preference brings its own strength, got {strength:g} beside it; set it there")
            c = weights.coefficients(self.names)
            if c.ndim != 1:
                raise ValueError("a target belongs to one preference, got one a sample; ask for each row's own")
            return combine(self.rewards, dict(zip(self.names, c[1:].tolist(), strict=True)))
        return combine(self.rewards, weights) * strength

    def target(
        self, weights: Preference | Mapping[str, float] | Sequence[float], strength: float = 1.0
    ) -> GaussianMixture:
        """Return the wanted law, base exp(strength sum_i w_i r_i / kl_weight) / Z; arguments as ``reward``."""
        return self.base.tilt(self.reward(weights, strength), kl_weight=self.kl_weight)

    def stack(self, schedule: NoiseSchedule) -> MixtureStack:
        """Return the scores of the base and the members, in this order."""
        return MixtureStack([self.base, *self.members()], schedule, self.names)

    def blend_log_normalizer(self, coefficients: Preference | Tensor | Sequence[float]) -> float:
        """Return log E[W] of the corrected blend.

        Args:
            coefficients: over the base and the members, (1 + m,), summing to one; or a ``Preference``.

        Returns:
            log Z of the target less the blend of the members' log Z, in nats.

        Source: theory of Feynman-Kac correction, module docstring.
        """
        if isinstance(coefficients, Preference):
            c = coefficients.coefficients(self.names)
        else:
            c = torch.as_tensor(coefficients, dtype=torch.float64)
        if c.ndim != 1:
            raise ValueError(f"a log normaliser belongs to one set of coefficients (K,), got shape {tuple(c.shape)}")
        check_coefficients(c, 1 + len(self.rewards))
        weights = dict(zip(self.names, c[1:].tolist(), strict=True))
        total = self.base.log_normalizer(self.reward(weights), kl_weight=self.kl_weight)
        each = (
            w * self.base.log_normalizer(self.rewards[name], kl_weight=self.kl_weight)
            for name, w in weights.items()
            if w
        )
        return total - sum(each)


def _axis(dim: int, axis: int, sign: float = 1.0) -> QuadraticReward:
    return QuadraticReward(sign * torch.eye(dim, dtype=torch.float64)[axis])


def _ring(radius: float) -> Tensor:
    angles = torch.arange(8, dtype=torch.float64) * (math.pi / 4)
    return radius * torch.stack([angles.cos(), angles.sin()], -1)


def ring8(kl_weight: float = 0.25) -> Problem:
    """Return eight modes on a ring, and two rewards that pull to the right and up."""
    weights = torch.tensor([1, 2, 1, 1, 2, 1, 1, 1], dtype=torch.float64) / 10
    base = GaussianMixture(weights, _ring(2.0), torch.full((8,), 0.25**2, dtype=torch.float64))
    rewards = {"right": _axis(2, 0).normalized(base), "up": _axis(2, 1).normalized(base)}
    return Problem("ring8", base, rewards, kl_weight)


def line2(kl_weight: float = 0.25) -> Problem:
    """Return two modes on a line; one reward pulls right, the other left and to the middle."""
    base = GaussianMixture([0.6, 0.4], [[-1.5], [1.5]], [0.16, 0.25])
    right, left = QuadraticReward([1.0]), QuadraticReward([-1.0], [[1.0]])
    return Problem("line2", base, {"right": right.normalized(base), "left": left.normalized(base)}, kl_weight)


def conflict_line(kl_weight: float = 0.25) -> Problem:
    """Return three modes on a line and two opposite rewards.

    With equal weights the mean reward vanishes and so does its Jensen gap: the target is the base, yet the members'
    gaps do not cancel and plain blending misses it.
    """
    base = GaussianMixture([0.35, 0.4, 0.25], [[-1.8], [0.3], [2.0]], [0.16, 0.09, 0.2])
    right = QuadraticReward([1.0]).normalized(base)
    return Problem("conflict_line", base, {"right": right, "left": -right}, kl_weight)


def gaussian_linear(kl_weight: float = 0.5) -> Problem:
    """Return one Gaussian with linear rewards, where blending is exact."""
    base = GaussianMixture([1.0], [[0.5, -0.3]], [[[1.0, 0.4], [0.4, 0.6]]])
    rewards = {"right": _axis(2, 0).normalized(base), "up": _axis(2, 1).normalized(base)}
    return Problem("gaussian_linear", base, rewards, kl_weight)


def grid9(kl_weight: float = 1.0) -> Problem:
    """Return the published 3 x 3 grid of modes with r = -x^2/100 - y^2."""
    places = torch.tensor([-4.0, 0.0, 4.0], dtype=torch.float64)
    base = GaussianMixture([1 / 9] * 9, torch.cartesian_prod(places, places), [0.3] * 9)
    return Problem("grid9", base, {"row": QuadraticReward(quadratic=[[0.02, 0.0], [0.0, 2.0]])}, kl_weight)


def ring8_das(kl_weight: float = 1.0) -> Problem:
    """Return the published ring of eight modes with r = -x^2 - (y - 1)^2 / 10."""
    base = GaussianMixture([1 / 8] * 8, _ring(4.0), [0.3] * 8)
    reward = QuadraticReward([0.0, 0.2], [[2.0, 0.0], [0.0, 0.2]], -0.1)
    return Problem("ring8_das", base, {"centre": reward}, kl_weight)


def high_dimension(dim: int = 64, components: int = 16, kl_weight: float = 0.5) -> Problem:
    """Return a mixture with full covariances in many dimensions and two linear rewards; the same one every time."""
    generator = torch.Generator().manual_seed(dim)
    return random_problem(
        generator, dim, components, rewards=2, quadratic=False, kl_weight=kl_weight, name=f"high_dimension({dim})"
    )


def random_problem(
    generator: torch.Generator,
    dim: int = 2,
    components: int = 4,
    rewards: int = 2,
    *,
    quadratic: bool = True,
    kl_weight: float | None = None,
    name: str = "random",
) -> Problem:
    """Draw a well-conditioned problem: separated modes, full covariances, rewards of variance at most one.

    Every tilt by rewards with weights that sum to at most 1.5 in absolute value exists.

    Args:
        generator: what draws.
        dim: d.
        components: K.
        rewards: how many, named "r1", "r2", ...
        quadratic: whether rewards have a quadratic part, of either sign, or are linear.
        kl_weight: alpha; drawn from [.2, 2] if left out.
        name: of the problem.

    Returns:
        the problem.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def rotation(*shape: int) -> Tensor:
        return torch.linalg.qr(normal(*shape, dim, dim)).Q

    alpha = check_kl_weight(float(uniform(0.2, 2.0, 1)) if kl_weight is None else kl_weight)
    weights = uniform(0.3, 1.0, components)
    spectrum, basis = uniform(0.05, 0.4, components, dim), rotation(components)
    base = GaussianMixture(
        weights / weights.sum(), 1.5 * normal(components, dim), (basis * spectrum.unsqueeze(-2)) @ basis.mT
    )
    # Precisions are at least 1 / .4: rewards with weights up to 1.5 in all may take half of that.
    room = min(0.5, 0.5 / 0.4 / 1.5 * alpha)
    drawn: dict[str, QuadraticReward] = {}
    for i in range(rewards):
        reward = QuadraticReward(normal(dim)).normalized(base)
        if quadratic:
            turn = rotation()
            q = (turn * uniform(-room, room, dim)) @ turn.T
            reward = reward + QuadraticReward(quadratic=(q + q.T) / 2)
        drawn[f"r{i + 1}"] = reward / max(1.0, math.sqrt(base.reward_variance(reward)))
    return Problem(name, base, drawn, alpha)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "ring8": ring8,
    "line2": line2,
    "conflict_line": conflict_line,
    "gaussian_linear": gaussian_linear,
    "grid9": grid9,
    "ring8_das": ring8_das,
    "high_dimension": high_dimension,
}
