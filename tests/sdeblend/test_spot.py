"""The certificate of one member a step from some steps: its expectation, that it bounds, and its cost."""

from __future__ import annotations

import math

import pytest
import torch

from sdeblend import (
    Ancestral,
    BackwardSDE,
    Blend,
    CountingStack,
    EulerMaruyama,
    ExponentialMultistep,
    OneMemberPerStep,
    Stack,
    VPLinear,
    certify_one_member,
    solve,
    time_grid,
)
from tests.support.core import Z, seeded

SCHEDULE = VPLinear()
LINES = ((-1.0, 0.4), (-1.6, -0.7), (-0.8, 0.0))  # slope and offset of each member's score
WEIGHTS = (0.5, 0.3, 0.2)
GRID = torch.tensor([0.5, 0.4, 0.32, 0.25, 0.2], dtype=torch.float64)


def stack():
    return Stack([lambda x, t, p=p, q=q: p * x + q for p, q in LINES])


def one(scores, batch, method="independent", weights=WEIGHTS, grid=GRID):
    weights = torch.as_tensor(weights, dtype=torch.float64)
    return BackwardSDE(SCHEDULE, OneMemberPerStep(scores, weights, grid, batch, method=method, generator=seeded(5)))


def start(batch):
    return torch.randn(batch, 1, generator=seeded(1), dtype=torch.float64)


def expected(step):
    """Return E[sum_n spread_n / V_n] from the first two moments of the run, which are linear in themselves."""
    mean, square, nats = 0.0, 1.0, []
    for move in step.plan(SCHEDULE, GRID):
        pairs = [
            (a, b, u * v) for a, u in zip(LINES, WEIGHTS, strict=True) for b, v in zip(LINES, WEIGHTS, strict=True)
        ]
        apart = sum(
            w * ((p - r) ** 2 * square + 2 * (p - r) * (q - s) * mean + (q - s) ** 2) for (p, q), (r, s), w in pairs
        )
        nats.append(apart * move.b**2 / (2 * move.g**2))
        maps = [(move.a + move.b * p, move.b * q, w) for (p, q), w in zip(LINES, WEIGHTS, strict=True)]
        square = sum(w * (k * k * square + 2 * k * m * mean + m * m) for k, m, w in maps) + move.g**2
        mean = sum(w * (k * mean + m) for k, m, w in maps)
    return nats


@pytest.mark.rng_untouched
@pytest.mark.parametrize("step", [EulerMaruyama(), Ancestral()], ids=repr)
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_it_is_unbiased(step, share):
    sde, x = one(stack(), 20_000), start(20_000)
    run, check = certify_one_member(sde, x, GRID, noise=seeded(2), share=share, generator=seeded(3), step=step)
    exact = expected(step)
    assert abs(check.value - sum(exact)) < Z * check.standard_error < 0.1 * sum(exact)
    assert abs(check.value - sum(exact) / 2) > Z * check.standard_error  # a blend's own
    assert check.profile.tolist() == pytest.approx(exact, rel=0.15)
    assert torch.equal(run.samples, solve(sde, x, GRID, noise=seeded(2), step=step).samples)
    assert str(check).startswith("at most ")


@pytest.mark.parametrize("method", ["systematic", "shared"])
def test_however_members_are_drawn_it_is_of_the_members_drawn(method):
    batch = 300
    sde, x = one(stack(), batch, method), start(batch)
    _, check = certify_one_member(sde, x, GRID, noise=seeded(2), share=1.0, generator=seeded(3))
    nats, rows = torch.zeros(batch, dtype=torch.float64), torch.arange(batch)
    for n, move in enumerate(EulerMaruyama().plan(SCHEDULE, GRID)):
        scores = stack()(x, move.t)[..., 0]
        away = (scores - scores[sde.score.index[n].long(), rows]).square()
        nats += (torch.tensor(WEIGHTS).double() @ away) * move.b**2 / (2 * move.g**2)
        x = solve(sde, start(batch), GRID[: n + 2], noise=seeded(2)).samples
    assert check.value == pytest.approx(float(nats.mean()))
    assert check.standard_error == pytest.approx(float(nats.std()) / math.sqrt(batch))


def test_it_bounds_one_step_of_a_mixture():
    # One step from one point: a mixture of Gaussians against the Gaussian that their weighted geometric mean is.
    point, grid = torch.full((4000, 1), 1.3, dtype=torch.float64), GRID[:2]
    move = EulerMaruyama().plan(SCHEDULE, grid)[0]
    _, check = certify_one_member(
        one(stack(), 4000, grid=grid), point, grid, noise=seeded(2), share=1.0, generator=seeded(3)
    )
    means = torch.tensor([move.a * 1.3 + move.b * (p * 1.3 + q) for p, q in LINES], dtype=torch.float64)
    c, v = torch.tensor(WEIGHTS, dtype=torch.float64), move.g**2
    z = torch.linspace(float(means.min()) - 8 * move.g, float(means.max()) + 8 * move.g, 4001, dtype=torch.float64)
    logs = -(z - means[:, None]).square() / (2 * v) - math.log(2 * math.pi * v) / 2
    run, product = (c.log()[:, None] + logs).logsumexp(0), c @ logs
    width = float(z[1] - z[0])
    divergence = float((run.exp() * (run - product)).sum()) * width + math.log(float(product.exp().sum()) * width)
    assert 0 < divergence < check.value


def test_the_cost_is_what_is_evaluated():
    counting = CountingStack(stack())
    grid = time_grid(SCHEDULE, 40)
    sde = one(counting, 500, "systematic", (0.5, 0.0, 0.5), grid)
    run, check = certify_one_member(sde, start(500), grid, noise=seeded(2), share=0.1, generator=seeded(3))
    assert run.evaluations == 40 and counting.evaluations == 500 * (run.evaluations + check.evaluations)
    assert check.evaluations == pytest.approx(2 * 0.1 * 39, rel=0.02)  # two members, at a tenth of the noisy steps
    rows = torch.tensor([WEIGHTS, (0.0, 0.0, 1.0)], dtype=torch.float64)[torch.arange(500) % 2]
    _, mixed = certify_one_member(
        one(stack(), 500, "systematic", rows, grid), start(500), grid, noise=seeded(2), share=0.2, generator=seeded(3)
    )
    _, alone = certify_one_member(
        one(stack(), 500, weights=(0, 0, 1), grid=grid),
        start(500),
        grid,
        noise=seeded(2),
        share=0.2,
        generator=seeded(3),
    )
    assert alone.value == 0 < mixed.value  # a member alone is its own chain


def test_what_has_no_spot_checks_is_named():
    def run(sde=None, **options):
        sde = sde or one(stack(), 4)
        return certify_one_member(sde, start(4), GRID, noise=seeded(2), generator=seeded(3), **{"share": 0.1} | options)

    with pytest.raises(TypeError, match="OneMemberPerStep, got Blend"):
        run(BackwardSDE(SCHEDULE, Blend(stack(), WEIGHTS)))
    for step in (ExponentialMultistep(), Ancestral(eta=0.0)):
        with pytest.raises(ValueError, match="step with noise that remembers no other"):
            run(step=step)
    for share in (0.0, 1.1, math.nan):
        with pytest.raises(ValueError, match="share of steps"):
            run(share=share)
