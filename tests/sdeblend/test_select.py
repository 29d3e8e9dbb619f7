"""One member a step: the draws' counts and marginals, their generators, keys and rows; what cannot be drawn."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdeblend import (
    BackwardSDE,
    Blend,
    Bound,
    CountingStack,
    Heun,
    OneMemberPerStep,
    Preference,
    Stack,
    VPLinear,
    solve,
)
from sdeblend.grid import time_grid
from sdeblend.select import select_members, systematic_sequence
from tests.support.core import Z, seeded
from toy.mixtures.mixture import GaussianMixture
from toy.scores.stack import MixtureStack

SCHEDULE = VPLinear()
GRID = time_grid(SCHEDULE, 40)
METHODS = ["systematic", "independent", "shared"]


def row(*values):
    return torch.tensor(values, dtype=torch.float64)


probabilities = (
    st.lists(st.integers(0, 50), min_size=2, max_size=6)
    .filter(any)
    .map(lambda n: torch.tensor(n, dtype=torch.float64) / sum(n))
)


def prefix_counts(sequence, members):
    """Return the uses of each member among the first k steps, (k, K), k from 0."""
    hits = torch.nn.functional.one_hot(sequence.long(), members).double()
    return torch.cat([hits.new_zeros(1, members), hits.cumsum(0)])


def worst_prefix(sequence, w):
    k = torch.arange(len(sequence) + 1, dtype=torch.float64)[:, None]
    return float((prefix_counts(sequence, len(w)) - k * w).abs().max())


def worst_window(sequence, w):
    k = torch.arange(len(sequence) + 1, dtype=torch.float64)[:, None]
    excess = prefix_counts(sequence, len(w)) - k * w
    return float((excess.amax(0) - excess.amin(0)).max())


@given(probabilities)
def test_counts_stay_within_the_chairman_bound(w):
    sequence = systematic_sequence(w[None], 700)[0]
    used = int((w > 0).sum())
    assert worst_prefix(sequence, w) <= 1 - 1 / (2 * max(used, 2) - 2) + 1e-9
    assert worst_window(sequence, w) <= (1 if used <= 2 else 2) + 1e-9
    assert set(sequence.tolist()) <= set(w.nonzero().flatten().tolist())


def test_independent_draws_do_not_stay_within_it():
    w = row(0.3, 0.5, 0.2)
    draws = select_members(w, 700, 1, "independent", seeded())[:, 0]
    assert worst_prefix(draws, w) > 2 and worst_window(draws, w) > 4


@settings(max_examples=settings().max_examples // 4)
@given(probabilities, st.integers(1, 60), st.integers(0, 1000))
def test_every_sample_follows_the_sequence_from_its_own_start(w, steps, seed):
    index = select_members(w, steps, 5, "systematic", seeded(seed))
    assert index.shape == (steps, 5) and index.dtype == torch.int16
    for i in range(5):
        assert worst_window(index[:, i], w) <= (1 if int((w > 0).sum()) <= 2 else 2) + 1e-9


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("w", [row(0.5, 0.5), row(0.1, 0.62, 0.28), row(0, 0.25, 0.75)])
def test_each_step_has_the_marginals(method, w):
    draws = 20_000
    if method == "shared":
        index = select_members(w, draws, 1, method, seeded()).T
    else:
        index = select_members(w, 7, draws, method, seeded())
    share = torch.nn.functional.one_hot(index.long(), len(w)).double().mean(1)
    error = (w * (1 - w) / draws).sqrt().clamp_min(1e-12)
    slack = 2 / 2048 if method == "systematic" else 0.0  # a start within a sequence of that length
    assert bool(((share - w).abs() <= Z * error + slack * (w > 0)).all())
    wrong = w.roll(1) if w[0] != w[1] else row(0.52, 0.48)
    assert bool(((share - wrong).abs() > Z * error + slack).any())


def test_independent_draws_are_independent_across_samples_and_steps():
    index = select_members(row(0.3, 0.7), 2, 40_000, "independent", seeded()).double()
    a, b = (index - 0.7) / 0.21**0.5
    assert abs(float((a * b).mean())) < Z / 200
    assert abs(float((a[1:] * a[:-1]).mean())) < Z / 200


def test_systematic_samples_have_independent_starts():
    index = select_members(row(0.3, 0.7), 1, 40_000, "systematic", seeded()).double()[0]
    z = (index - 0.7) / 0.21**0.5
    assert abs(float((z[1:] * z[:-1]).mean())) < Z / 200


def test_shared_draws_serve_the_whole_batch():
    index = select_members(row(0.3, 0.7), 60, 9, "shared", seeded())
    assert bool((index == index[:, :1]).all()) and len(index.unique()) == 2


@pytest.mark.rng_untouched
@pytest.mark.parametrize("method", ["systematic", "independent"])
def test_generators_by_sample_make_members_independent_of_the_batch(method):
    w = row(0.2, 0.5, 0.3)
    whole = select_members(w, 30, 6, method, [seeded(i) for i in range(6)])
    part = select_members(w, 30, 2, method, [seeded(4), seeded(1)])
    assert torch.equal(part, whole[:, [4, 1]])
    assert torch.equal(whole, select_members(w, 30, 6, method, [seeded(i) for i in range(6)]))


@pytest.mark.parametrize("method", ["systematic", "independent"])
def test_weights_by_sample(method):
    w = torch.stack([row(1, 0, 0), row(0, 0.5, 0.5), row(1, 0, 0), row(0.2, 0.2, 0.6)])
    index = select_members(w, 400, 4, method, seeded())
    assert bool((index[:, [0, 2]] == 0).all()) and bool((index[:, 1] > 0).all())
    share = torch.nn.functional.one_hot(index.long(), 3).double().mean(0)
    assert float((share - w).abs().max()) < (0.01 if method == "systematic" else 0.15)


def members():
    mixtures = [GaussianMixture([1.0], [[m, 0.0]], [0.5]) for m in (-2.0, 0.0, 3.0)]
    return MixtureStack(mixtures, SCHEDULE)


def test_a_run_sees_the_noise_of_the_blend():
    # One Gaussian each: scores differ by a shift that does not depend on x, so the runs differ by the draws only.
    stack, w = members(), row(0.2, 0.3, 0.5)
    x = SCHEDULE.prior((500, 2), generator=seeded(1), dtype=torch.float64)
    selection = OneMemberPerStep(stack, w, GRID, 500, generator=seeded(2))
    runs = [
        solve(BackwardSDE(SCHEDULE, score), x, GRID, noise=seeded(3)).samples for score in (selection, Blend(stack, w))
    ]
    assert torch.equal(runs[0][:, 1], runs[1][:, 1])  # nothing is drawn in this direction but the noise
    assert float((runs[0][:, 0] - runs[1][:, 0]).std()) > 0.01
    other = OneMemberPerStep(stack, w, GRID, 500, generator=seeded(4))
    again = solve(BackwardSDE(SCHEDULE, other), x, GRID, noise=seeded(3)).samples
    assert torch.equal(again[:, 1], runs[1][:, 1]) and not torch.equal(again[:, 0], runs[0][:, 0])


@pytest.mark.parametrize("method", METHODS)
def test_the_draw_is_keyed_on_the_time_and_costs_one_evaluation(method):
    stack = CountingStack(members())
    selection = OneMemberPerStep(stack, Preference([0.5, 0.3]), GRID, 8, method=method, generator=seeded(2))
    x = torch.randn(8, 2, generator=seeded(), dtype=torch.float64)
    for place in (3, 0, 3):
        expected = torch.stack([members()(x, GRID[place])[k, i] for i, k in enumerate(selection.index[place])])
        torch.testing.assert_close(selection(x, GRID[place]), expected)
    assert stack.evaluations == 3 * 8
    assert torch.equal(selection(x, GRID[5]), selection(x, GRID[5].clone()))
    with pytest.raises(ValueError, match=r"times of its grid, got t = 0\.123"):
        selection(x, torch.tensor(0.123))


def test_heun_takes_one_member_per_time():
    # Heun calls twice a step: at t, and at s, which the next step starts from.
    stack = CountingStack(members())
    selection = OneMemberPerStep(stack, row(0.2, 0.3, 0.5), GRID, 8, generator=seeded(2))
    x = SCHEDULE.prior((8, 2), generator=seeded(1))
    first, second = (solve(BackwardSDE(SCHEDULE, selection), x, GRID, noise=seeded(), step=Heun()) for _ in range(2))
    assert stack.evaluations == 2 * 8 * (2 * 39 + 1) and first.evaluations == 79
    assert torch.equal(first.samples, second.samples)


def test_rows_keep_their_members():
    w = torch.stack([row(0.2, 0.3, 0.5), row(1, 0, 0), row(0, 0.5, 0.5), row(0.4, 0.4, 0.2)])
    for weights in (w, w[0]):
        selection = OneMemberPerStep(members(), weights, GRID, 4, generator=seeded(2))
        x, index = torch.randn(4, 2, generator=seeded()), torch.tensor([3, 1])
        part = selection.rows(index)
        assert torch.equal(part.index, selection.index[:, index])
        assert torch.equal(part.probabilities, weights[index] if weights.ndim == 2 else weights)
        torch.testing.assert_close(part(x[index], GRID[4]), selection(x, GRID[4])[index])


def test_selection_of_bound_functions_sees_their_own_rows():
    class Scaled(Bound):
        def __init__(self, factor):
            self.factor = factor

        def __call__(self, x, t):
            return self.factor[:, None] * x

        def rows(self, index):
            return Scaled(self.factor[index])

    factor = torch.arange(1.0, 7.0, dtype=torch.float64)
    selection = OneMemberPerStep(Stack([Scaled(factor), Scaled(-factor)]), row(0.5, 0.5), GRID, 6, generator=seeded())
    x = torch.ones(6, 1, dtype=torch.float64)
    for place in range(5):
        sign = 1 - 2 * selection.index[place].double()
        torch.testing.assert_close(selection(x, GRID[place])[:, 0], sign * factor)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"coefficients": row(-0.2, 0.5, 0.7)}, ValueError, r"probabilities, got -0\.2; use a Blend"),
        ({"coefficients": Preference([0.5, 0.5], strength=1.5)}, ValueError, r"probabilities, got -0\.5"),
        ({"coefficients": row(0.2, 0.5, 0.2)}, ValueError, r"sum to 1, got 0\.9"),
        ({"coefficients": row(float("nan"), 0.5, 0.5)}, ValueError, "finite"),
        ({"coefficients": row(0.5, 0.5)}, ValueError, r"shape \(3,\)"),
        ({"coefficients": torch.full((3, 3), 1 / 3)}, ValueError, "3 samples need a batch of as many, got 4"),
        ({"coefficients": torch.full((4, 3), 1 / 3), "method": "shared"}, ValueError, "one set of weights"),
        ({"method": "random"}, ValueError, "systematic, independent, shared, got 'random'"),
        ({"generator": [seeded(), seeded()]}, ValueError, "4 samples got 2 generators"),
        ({"generator": [seeded()] * 4, "method": "shared"}, ValueError, "give one generator"),
        ({"generator": None}, TypeError, "torch.Generator of its own, got NoneType"),
    ],
)
def test_what_cannot_be_drawn_is_named(change, kind, words):
    given = {"coefficients": row(0.2, 0.3, 0.5), "generator": seeded()} | change
    with pytest.raises(kind, match=words) as info:
        OneMemberPerStep(members(), grid=GRID, batch=4, **given)
    assert "\n" not in str(info.value)
