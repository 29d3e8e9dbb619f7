"""What hypothesis draws for the closed forms: mixtures, rewards, problems, preferences, and points to ask them at.

Shapes are drawn by hypothesis, so that failures shrink to few components and dimensions; the numbers come from a
generator with a drawn seed, which keeps them well-conditioned and an example cheap.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from sdeblend import Preference, VPLinear
from toy import GaussianMixture, Problem, QuadraticReward, random_problem

SCHEDULE = VPLinear()
MAX_COMPONENTS, MAX_DIM = 8, 6

seeds = st.integers(0, 2**32 - 1)
dims = st.integers(1, MAX_DIM)
times = st.sampled_from([1e-3, 0.01, 0.1, 0.3, 0.6, 1.0])
kl_weights = st.sampled_from([0.1, 0.25, 0.5, 1.0, 4.0])


def generator(seed: int) -> torch.Generator:
    """Return a generator with this seed."""
    return torch.Generator().manual_seed(seed)


@st.composite
def mixtures(draw: st.DrawFn, dim: int | None = None) -> GaussianMixture:
    """Draw a mixture of 1-8 components in 1-6 dimensions; covariances full, or isotropic one time in four."""
    d = draw(dims) if dim is None else dim
    count, isotropic, g = draw(st.integers(1, MAX_COMPONENTS)), draw(st.integers(0, 3)) == 3, generator(draw(seeds))
    weights = 0.1 + torch.rand(count, generator=g, dtype=torch.float64)
    means = 1.5 * torch.randn(count, d, generator=g, dtype=torch.float64)
    spectrum = 0.05 + torch.rand(count, d, generator=g, dtype=torch.float64)
    if isotropic:
        return GaussianMixture(weights / weights.sum(), means, spectrum[:, 0])
    basis = torch.linalg.qr(torch.randn(count, d, d, generator=g, dtype=torch.float64)).Q
    covariances = (basis * spectrum.unsqueeze(-2)) @ basis.mT
    return GaussianMixture(weights / weights.sum(), means, (covariances + covariances.mT) / 2)


@st.composite
def rewards(draw: st.DrawFn, dim: int, convexity: float = 0.0) -> QuadraticReward:
    """Draw a reward, linear half of the time; otherwise Q has eigenvalues from -convexity to 1.

    A tilt at kl_weight alpha of ``mixtures()``, whose covariances are below 1.05, exists if convexity < .95 alpha.
    """
    linear, g = draw(st.booleans()), generator(draw(seeds))
    b, c = torch.randn(dim, generator=g, dtype=torch.float64), float(torch.randn((), generator=g))
    if linear:
        return QuadraticReward(b, constant=c)
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=g, dtype=torch.float64)).Q
    values = -convexity + (1 + convexity) * torch.rand(dim, generator=g, dtype=torch.float64)
    q = (basis * values) @ basis.T
    return QuadraticReward(b, (q + q.T) / 2, c)


@st.composite
def problems(draw: st.DrawFn, dim: int | None = None, kl_weight: float | None = None) -> Problem:
    """Draw a problem with 1-4 rewards; every target with weights up to 1.5 in all exists."""
    return random_problem(
        generator(draw(seeds)),
        draw(dims) if dim is None else dim,
        draw(st.integers(1, MAX_COMPONENTS)),
        draw(st.integers(1, 4)),
        quadratic=draw(st.booleans()),
        kl_weight=kl_weight,
    )


@st.composite
def preferences(draw: st.DrawFn, names: tuple[str, ...], max_strength: float = 1.5) -> Preference:
    """Draw weights that are non-negative and sum to one, and a strength from 0 to ``max_strength``."""
    raw = [draw(st.integers(0, 10)) for _ in names]
    total = sum(raw) or 1
    weights = {name: (value / total if sum(raw) else 1 / len(raw)) for name, value in zip(names, raw, strict=True)}
    return Preference(weights, draw(st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.25, max_strength])))


def points(mixture: GaussianMixture, t: float, count: int, seed: int) -> Tensor:
    """Return points where x_t lies, spread a little wider, (count, d) float64."""
    return mixture.noised(SCHEDULE, t).sample(count, generator=generator(seed)) * 1.2


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10, scale: float = 0.0) -> None:
    """Check max |actual - expected| <= tolerance times the larger of max |expected| and ``scale``."""
    assert actual.shape == expected.shape
    error = float((actual - expected).abs().max())
    assert error <= tolerance * max(float(expected.abs().max()), scale), f"off by {error:g}"


def refuses(
    call: Callable[[], object], *parts: str, kind: type[Exception] | tuple[type[Exception], ...] = ValueError
) -> None:
    """Check that a call raises ``kind`` with one sentence that contains all of ``parts``."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and not message.endswith(".") and len(message) < 300, message
    assert not re.search(r"[a-z]{2}\. [A-Z]", message), message
    for part in parts:
        assert part in message, f"{part!r} is not in {message!r}"
