"""Noise: replay to the bit, samples that do not depend on their batch, one Brownian path on nested grids."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from sdeblend import (
    Ancestral,
    BackwardSDE,
    BatchNoise,
    BrownianNoise,
    ExponentialMultistep,
    PerSampleNoise,
    ReplayNoise,
    VPLinear,
    solve,
    time_grid,
)
from sdeblend.noise import noise_source
from tests.support.core import mean_z, seeded
from toy.mixtures.mixture import GaussianMixture
from toy.scores.stack import mixture_score

SCHEDULE = VPLinear()
MIXTURE = GaussianMixture([0.3, 0.7], [[-1.0, 0.5], [1.0, 0.0]], [0.2, 0.6])
SDE = BackwardSDE(SCHEDULE, mixture_score(MIXTURE, SCHEDULE))
# Scores that are the same to the bit whatever the batch: no matrix product, whose order of sums may change.
POINTWISE = BackwardSDE(SCHEDULE, lambda x, t: -x + torch.tanh(x))
GRID = time_grid(SCHEDULE, 12)


def start(batch, dtype=torch.float32):
    generators = [seeded(1000 + i) for i in range(batch)]
    return torch.cat([SCHEDULE.prior((1, 2), generator=g, dtype=dtype) for g in generators])


@pytest.mark.rng_untouched
@pytest.mark.parametrize("step", [None, Ancestral(eta=0.5), ExponentialMultistep()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_run_is_repeated_to_the_bit(step, dtype):
    x = start(9, dtype)
    first = solve(SDE, x, GRID, noise=seeded(3), step=step).samples
    assert torch.equal(first, solve(SDE, x, GRID, noise=BatchNoise(seeded(3)), step=step).samples)
    draws, recorder = [], BatchNoise(seeded(3))

    def record(n, t, s, like):
        draws.append(recorder(n, t, s, like))
        return draws[-1]

    assert torch.equal(first, solve(SDE, x, GRID, noise=record, step=step).samples)
    assert torch.equal(first, solve(SDE, x, GRID, noise=ReplayNoise(draws), step=step).samples)
    assert not torch.equal(first, solve(SDE, x, GRID, noise=seeded(4), step=step).samples)


def test_samples_do_not_depend_on_their_batch():
    def run(rows):
        generators = [seeded(50 + i) for i in rows]
        return solve(POINTWISE, start(8)[rows], GRID, noise=generators).samples

    whole = run(list(range(8)))
    assert torch.equal(run([5]), whole[[5]])
    assert torch.equal(run([6, 2, 7]), whole[[6, 2, 7]])
    # the control: with one generator for the batch they do
    batch = [solve(POINTWISE, start(8)[:n], GRID, noise=seeded(1)).samples[:3] for n in (3, 8)]
    assert not torch.equal(*batch)


@pytest.mark.parametrize(
    "source", [lambda: BatchNoise(seeded()), lambda: PerSampleNoise([seeded(i) for i in range(4000)])]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_are_standard_normal_and_shaped_as_the_state(source, dtype):
    like = torch.zeros(4000, 3, 2, dtype=dtype)
    z = source()(0, GRID[0], GRID[1], like)
    assert z.shape == like.shape and z.dtype == dtype
    assert mean_z(z.flatten(), 0) < 5 and mean_z(z.flatten().square(), 1) < 5 < mean_z(z.flatten().square(), 1.1)


def test_brownian_increments_are_exact_on_nested_grids():
    fine = torch.linspace(1, 0.2, 65, dtype=torch.float64)
    noise = BrownianNoise(fine, (500, 2), seeded())
    like = torch.zeros(500, 2, dtype=torch.float64)
    for stride in (2, 8, 64):
        coarse = fine[::stride]
        for n, (t, s) in enumerate(pairwise(coarse)):
            whole = noise(n, t, s, like) * (t - s).sqrt()
            parts = fine[n * stride : (n + 1) * stride + 1]
            pieces = [noise(0, u, v, like) * (u - v).sqrt() for u, v in pairwise(parts)]
            torch.testing.assert_close(whole, torch.stack(pieces).sum(0))
    z = torch.stack([noise(n, t, s, like) for n, (t, s) in enumerate(pairwise(fine))])
    assert mean_z(z.flatten(), 0) < 5 and mean_z(z.flatten().square(), 1) < 5
    assert mean_z((z[1:] * z[:-1]).flatten(), 0) < 5  # increments are independent
    assert noise(0, fine[0], fine[1], like.float()).dtype == torch.float32


def test_brownian_path_is_known_on_its_grid_only():
    noise = BrownianNoise(torch.tensor([1.0, 0.5, 0.1]), (2, 1), seeded())
    with pytest.raises(ValueError, match=r"0\.5 -> 0\.3"):
        noise(0, torch.tensor(0.5), torch.tensor(0.3), torch.zeros(2, 1))


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: BatchNoise(3), TypeError, "torch.Generator, got int"),
        (lambda: noise_source(None), TypeError, "got NoneType.*manual_seed"),
        (lambda: noise_source([]), TypeError, "list of them"),
        (lambda: noise_source([seeded(), 1]), TypeError, "list of them"),
        (lambda: solve(SDE, start(3), GRID, noise=[seeded(), seeded()]), ValueError, "3 samples.*got 2"),
        (lambda: solve(SDE, start(3), GRID, noise=ReplayNoise([torch.zeros(3, 2)])), ValueError, "step 1.*1 draws"),
        (lambda: solve(SDE, start(3), GRID, noise=ReplayNoise([torch.zeros(2, 2)])), ValueError, r"got shape \(2, 2\)"),
    ],
)
def test_bad_noise_is_named(call, kind, words):
    with pytest.raises(kind, match=words) as info:
        call()
    assert "\n" not in str(info.value)
