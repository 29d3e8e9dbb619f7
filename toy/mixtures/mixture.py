"""Gaussian mixtures: the distributions on which everything in diffusion alignment has a closed form.

    p_0 = sum_k pi_k N(mu_k, C_k),       p_t = sum_k pi_k N(a mu_k, a^2 C_k + s^2 I)     (a = alpha(t), s = sigma(t)),

and for r(x) = c + b.x - x'Qx/2 the tilt p_0 exp(r / alpha) / Z is a mixture with the same number of components
(``toy.mixtures.tilting``), log Z = logsumexp_k(log pi_k + log constant_k). Under one component N(mu, C), with
g = b - Q mu, a reward has mean r(mu) - tr(QC)/2 and Cov(r1, r2) = g1'C g2 + tr(Q1 C Q2 C)/2.

Everything is float64 and exact to rounding; eigenbases C_k = U_k diag(lam_k) U_k' are computed once, because
noise leaves U_k and only maps lam_k to a^2 lam_k + s^2. Weights are kept as logarithms. The fast scores for
sampling are in ``toy.scores.stack``; these are what they are tested against.

Source: Diffusion Blend 2505.18547, Proposition 1 (tilt); Song et al. 2011.13456 (noised law).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from sdeblend.schedule import NoiseSchedule, Time
from toy.mixtures.posterior import Posterior
from toy.mixtures.rewards import Numbers, QuadraticReward, finite
from toy.mixtures.tilting import Tilted, check_kl_weight, check_reward, tilt_components

WEIGHT_TOLERANCE = 1e-6


class GaussianMixture:
    """The mixture sum_k weights_k N(means_k, covariances_k).

    Args:
        weights: pi, (K,), positive, summing to one.
        means: mu, (K, d).
        covariances: C, (K, d, d) symmetric and positive definite; or isotropic variances (K,).

    Raises:
        ValueError: shapes that do not fit, weights that are not positive or do not sum to one within 1e-6, a
            covariance that is not symmetric or not positive definite (which component, which eigenvalue).
        TypeError: for what is not numbers.
    """

    def __init__(
        self, weights: Tensor | Sequence[float], means: Numbers, covariances: Numbers | Sequence[Numbers]
    ) -> None:
        pi, mu, cov = (finite(v, n) for v, n in ((weights, "weights"), (means, "means"), (covariances, "covariances")))
        if pi.ndim != 1 or mu.ndim != 2 or len(pi) != len(mu) or 0 in mu.shape:
            raise ValueError(
                f"a mixture needs weights (K,) and means (K, d), got {tuple(pi.shape)} and {tuple(mu.shape)}; give "
                "one weight and one mean a component"
            )
        count, dim = mu.shape
        if cov.shape not in ((count,), (count, dim, dim)):
            raise ValueError(
                f"{count} components in {dim} dimensions need covariances {(count, dim, dim)} or variances "
                f"({count},), got {tuple(cov.shape)}"
            )
        if bool((pi <= 0).any()):
            k = int((pi <= 0).nonzero()[0])
            raise ValueError(f"mixture weights must be positive, got {float(pi[k]):g} for component {k}; drop it")
        if abs(float(pi.sum()) - 1) > WEIGHT_TOLERANCE:
            raise ValueError(f"mixture weights must sum to 1, got {float(pi.sum()):g}; divide them by their sum")
        if cov.ndim == 1:
            if bool((cov <= 0).any()):
                k = int((cov <= 0).nonzero()[0])
                raise ValueError(f"variances must be positive, got {float(cov[k]):g} for component {k}")
            eigenvalues, vectors = (
                cov[:, None].expand(count, dim),
                torch.eye(dim, dtype=torch.float64).expand(count, -1, -1),
            )
        else:
            eigenvalues, vectors = _positive_eigenbasis(cov)
        self.log_weights, self.means = pi.log() - pi.sum().log(), mu
        self.eigenvalues, self.eigenvectors = eigenvalues, vectors

    @property
    def dim(self) -> int:
        """Dimension d."""
        return self.means.shape[1]

    @property
    def components(self) -> int:
        """Number of components K."""
        return self.means.shape[0]

    @cached_property
    def weights(self) -> Tensor:
        """Weights pi, (K,); where they underflow, ``log_weights`` is finite."""
        return self.log_weights.exp()

    @cached_property
    def covariances(self) -> Tensor:
        """Covariances of the components, (K, d, d)."""
        return (self.eigenvectors * self.eigenvalues.unsqueeze(-2)) @ self.eigenvectors.mT

    @cached_property
    def isotropic(self) -> bool:
        """Whether every covariance is a multiple of the identity."""
        return bool((self.eigenvalues == self.eigenvalues[:, :1]).all())

    @cached_property
    def roots(self) -> Tensor:
        """Square roots L_k of the covariances, C_k = L_k L_k', (K, d, d)."""
        return self.eigenvectors * self.eigenvalues.sqrt().unsqueeze(-2)

    @cached_property
    def mean(self) -> Tensor:
        """Mean of the mixture, (d,)."""
        return self.weights @ self.means

    @cached_property
    def covariance(self) -> Tensor:
        """Covariance of the mixture, within and between components, (d, d)."""
        centred = self.means - self.mean
        return torch.einsum("k,kij->ij", self.weights, self.covariances) + (centred.T * self.weights) @ centred

    def log_component_densities(self, x: Tensor) -> Tensor:
        """Return log pi_k + log N(x; mu_k, C_k), float64.

        Args:
            x: points (..., d).

        Returns:
            (..., K).
        """
        whitened = self._in_eigenbases(self._points(x)) / self.eigenvalues.sqrt()
        constants = self.log_weights - self.eigenvalues.log().sum(-1) / 2 - self.dim / 2 * math.log(2 * math.pi)
        return constants - whitened.square().sum(-1) / 2

    def log_prob(self, x: Tensor) -> Tensor:
        """Return log p(x), float64 (...), for points (..., d)."""
        return self.log_component_densities(x).logsumexp(-1)

    def responsibilities(self, x: Tensor) -> Tensor:
        """Return the probability of each component given x, float64 (..., K), for points (..., d)."""
        return self.log_component_densities(x).softmax(-1)

    def score(self, x: Tensor) -> Tensor:
        """Return grad log p(x) = -sum_k resp_k C_k^{-1} (x - mu_k), float64, shaped as x (..., d)."""
        pulls = self._in_eigenbases(self._points(x)) / self.eigenvalues * self.responsibilities(x).unsqueeze(-1)
        return -torch.einsum("kij,...kj->...i", self.eigenvectors, pulls)

    def sample_labels(self, n: int, *, generator: torch.Generator) -> Tensor:
        """Draw n component indices, long (n,)."""
        _check_draw(n, generator)
        return torch.multinomial(self.weights.to(generator.device), n, replacement=True, generator=generator)

    def sample(self, n: int, *, generator: torch.Generator, dtype: torch.dtype = torch.float64) -> Tensor:
        """Draw n exact samples.

        Args:
            n: how many, at least 1.
            generator: what draws; required, the global one is never used.
            dtype: of the samples; float32 or float64. They are drawn in float64 either way.

        Returns:
            (n, d), on the generator's device.
        """
        labels = self.sample_labels(n, generator=generator)
        x = torch.randn(n, self.dim, generator=generator, dtype=torch.float64, device=generator.device)
        roots, means = self.roots.to(x), self.means.to(x)
        for k in range(self.components):
            rows = (labels == k).nonzero().flatten()
            x[rows] = x[rows] @ roots[k].T + means[k]
        return x.to(dtype)

    def tilt(self, reward: QuadraticReward, *, kl_weight: float) -> GaussianMixture:
        """Return p exp(reward / kl_weight) / Z, the optimum of E[reward] - kl_weight KL(. || p).

        Args:
            reward: r.
            kl_weight: alpha > 0.

        Returns:
            the aligned mixture, components in the same order.

        Raises:
            ValueError: kl_weight not above 0, or the target does not exist (component and eigenvalue named).

        Source: Diffusion Blend 2505.18547, Proposition 1.
        """
        tilted = self._tilted(reward, kl_weight)
        log_weights = self.log_weights + tilted.log_factors
        if reward.is_linear:
            values, vectors = self.eigenvalues, self.eigenvectors
        else:
            # Singular values of a root lose half as many digits as eigenvalues of its square.
            vectors, singular, _ = torch.linalg.svd(tilted.roots)
            values = singular.square()
        return _Known(log_weights - log_weights.logsumexp(0), self.means + tilted.shifts, values, vectors)

    def log_normalizer(self, reward: QuadraticReward, *, kl_weight: float) -> float:
        """Return log Z = log E[exp(reward / kl_weight)]."""
        return float((self.log_weights + self._tilted(reward, kl_weight).log_factors).logsumexp(0))

    def tilt_kl(self, reward: QuadraticReward, *, kl_weight: float) -> float:
        """Return KL(tilt || self) = E_tilt[reward] / kl_weight - log Z, in nats."""
        mean = self.tilt(reward, kl_weight=kl_weight).mean_reward(reward)
        return max(mean / check_kl_weight(kl_weight) - self.log_normalizer(reward, kl_weight=kl_weight), 0.0)

    def mean_reward(self, reward: QuadraticReward) -> float:
        """Return E[reward]."""
        return float(self.weights @ self._component_rewards(reward))

    def reward_covariance(self, first: QuadraticReward, second: QuadraticReward) -> float:
        """Return Cov(first(x), second(x))."""
        one, two = self._component_rewards(first), self._component_rewards(second)
        within = torch.einsum("ki,kij,kj->k", first.grad(self.means), self.covariances, second.grad(self.means))
        if not (first.is_linear or second.is_linear):
            product = (first.quadratic @ self.covariances) * (second.quadratic @ self.covariances).mT
            within = within + product.sum((-1, -2)) / 2
        between = (one - self.weights @ one) * (two - self.weights @ two)
        return float(self.weights @ (within + between))

    def reward_variance(self, reward: QuadraticReward) -> float:
        """Return Var(reward(x)), not negative."""
        return max(self.reward_covariance(reward, reward), 0.0)

    def noised(self, schedule: NoiseSchedule, t: Time) -> GaussianMixture:
        """Return the law of x_t = alpha(t) x_0 + sigma(t) eps.

        Args:
            schedule: the forward process.
            t: time, 0-dim; 0 gives the mixture itself.
        """
        time = schedule.check_time(t)
        a, s = float(schedule.alpha(time)), float(schedule.sigma(time))
        return _Known(self.log_weights, a * self.means, a * a * self.eigenvalues + s * s, self.eigenvectors)

    def posterior(self, x: Tensor, schedule: NoiseSchedule, t: Time) -> Posterior:
        """Return the law of x_0 given x_t = x, one mixture a row.

        Args:
            x: (B, d).
            schedule: the forward process.
            t: time, 0-dim, above 0 (at 0 the posterior is a point).

        Raises:
            ValueError: t outside the schedule or 0, x of another shape.
        """
        time = schedule.check_time(t)
        if float(time) == 0:
            raise ValueError("a posterior needs a time above 0, got 0, where x_0 is x itself; use t_min or later")
        if x.ndim != 2:
            raise ValueError(f"a posterior needs points (B, {self.dim}), got shape {tuple(x.shape)}")
        a, s = float(schedule.alpha(time)), float(schedule.sigma(time))
        noised = self.noised(schedule, time)
        log_weights = noised.log_component_densities(x).log_softmax(-1)
        whitened = noised._in_eigenbases(x.to(torch.float64))
        steps = whitened * (a * self.eigenvalues / noised.eigenvalues)
        means = self.means + torch.einsum("kij,bkj->bki", self.eigenvectors, steps)
        scales = (self.eigenvalues / noised.eigenvalues).sqrt() * s
        return Posterior(log_weights, means, self.eigenvectors * scales.unsqueeze(-2), a / (s * s))

    def marginal(self, axes: Sequence[int]) -> GaussianMixture:
        """Return the law of the coordinates ``axes``, in that order, a mixture in len(axes) dimensions."""
        chosen = list(axes)
        if not chosen or len(set(chosen)) < len(chosen) or not all(0 <= axis < self.dim for axis in chosen):
            raise ValueError(f"axes must be distinct, each from 0 to {self.dim - 1}, got {chosen}")
        block = self.covariances[:, chosen][:, :, chosen]
        return _Known(self.log_weights, self.means[:, chosen], *torch.linalg.eigh(block))

    def __repr__(self) -> str:
        return f"GaussianMixture(components={self.components}, dim={self.dim})"

    def _tilted(self, reward: QuadraticReward, kl_weight: float) -> Tilted:
        return tilt_components(self.means, self.roots, reward, kl_weight)

    def _component_rewards(self, reward: QuadraticReward) -> Tensor:
        """Return E[reward] under each component, (K,)."""
        at_mean = check_reward(reward, self.dim)(self.means)
        if reward.is_linear:
            return at_mean
        return at_mean - (reward.quadratic * self.covariances).sum((-1, -2)) / 2

    def _points(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or x.ndim < 1 or x.shape[-1] != self.dim:
            given = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"a mixture in {self.dim} dimensions needs points (..., {self.dim}), got {given}")
        if not bool(x.isfinite().all()):
            raise ValueError(f"points must be finite, got {float(x[~x.isfinite()][0])}; check what made them")
        return x.to(torch.float64)

    def _in_eigenbases(self, x: Tensor) -> Tensor:
        """Return U_k' (x - mu_k), (..., K, d)."""
        centred = x.unsqueeze(-2) - self.means
        return centred if self.isotropic else torch.einsum("kij,...ki->...kj", self.eigenvectors, centred)


class _Known(GaussianMixture):
    """A mixture of parts that are known to be valid, which are not checked or decomposed again."""

    def __init__(self, log_weights: Tensor, means: Tensor, eigenvalues: Tensor, eigenvectors: Tensor) -> None:
        self.log_weights, self.means = log_weights, means
        self.eigenvalues, self.eigenvectors = eigenvalues, eigenvectors


def _positive_eigenbasis(covariances: Tensor) -> tuple[Tensor, Tensor]:
    skew = (covariances - covariances.mT).abs().amax((-1, -2))
    scale = covariances.abs().amax((-1, -2))
    k = int((skew - 1e-9 * scale).argmax())
    if float(skew[k]) > 1e-9 * float(scale[k]):
        raise ValueError(
            f"covariances must be symmetric, got entries that differ by {float(skew[k]):g} in component {k}"
        )
    symmetric = (covariances + covariances.mT) / 2
    values, vectors = torch.linalg.eigh(symmetric)
    # eigh errs by about eps times the largest eigenvalue: below that a value may as well be negative.
    k = int((values[:, 0] / scale.clamp_min(1e-300)).argmin())
    if float(values[k, 0]) <= 1e-15 * values.shape[-1] * float(values[k, -1].abs()):
        raise ValueError(
            f"covariances must be positive definite, got smallest eigenvalue {float(values[k, 0]):g} for component {k}"
        )
    # A multiple of the identity is kept as one: eigh blurs its eigenvalues by rounding.
    diagonal = symmetric.diagonal(dim1=-2, dim2=-1)
    eye = torch.eye(values.shape[-1], dtype=torch.float64)
    same = (symmetric == diagonal[:, :1, None] * eye).all(-1).all(-1)
    values = torch.where(same[:, None], diagonal, values)
    return values, torch.where(same[:, None, None], eye, vectors)


def _check_draw(n: int, generator: torch.Generator) -> None:
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"sampling needs a torch.Generator, got {type(generator).__name__}; pass generator=")
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"sampling needs a whole number of at least 1, got {n!r}")
