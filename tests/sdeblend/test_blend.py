"""Blends: affine in every parametrisation, nested, permuted, by sample, in time; no evaluation too many."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdeblend import SCHEDULES, Blend, Concatenated, CountingStack, Preference, Stack, VPLinear, convert
from sdeblend.blend import combine
from tests.support.core import relative, seeded
from toy.mixtures.mixture import GaussianMixture
from toy.scores.stack import MixtureStack

T = torch.tensor(0.4, dtype=torch.float64)
OTHERS = ["eps", "x0", "v", "flow"]
finite = st.floats(-3, 3, allow_nan=False)
coefficients = st.lists(finite, min_size=2, max_size=5).map(
    lambda c: torch.tensor([*c, 1 - sum(c)], dtype=torch.float64)
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def leaf(seed, dim=2):
    """Return a smooth, non-linear score."""
    matrix, shift = draw(dim, dim, seed=seed), draw(dim, seed=seed + 100)
    return lambda x, t: torch.tanh(x @ matrix + shift) - x * (1 + t)


def leaves(count):
    return [leaf(seed) for seed in range(count)]


def row(*values):
    return torch.tensor(values, dtype=torch.float64)


@given(coefficients, st.sampled_from(list(SCHEDULES)), st.sampled_from(OTHERS), st.floats(0.2, 0.8))
def test_blending_commutes_with_every_parametrisation(c, name, other, share):
    schedule = SCHEDULES[name]()
    t = schedule.t_min * (schedule.t_max / schedule.t_min) ** share
    x, members = draw(4, 3), draw(len(c), 4, 3, seed=1)
    converted = convert(members, x, t, schedule, source="score", target=other)
    after = convert(combine(members, c), x, t, schedule, source="score", target=other)
    before = combine(converted, c)
    scale = float(c.abs().sum()) * float(converted.abs().max())
    assert float((after - before).abs().max()) < 1e-12 * scale


@pytest.mark.parametrize("other", ["x0", "v", "flow"])
def test_a_sum_of_one_and_a_half_does_not_commute(other):
    # The control of the test above. eps = -sigma S is linear, so there any sum commutes.
    schedule, x, members, c = VPLinear(), draw(4, 3), draw(2, 4, 3, seed=1), row(0.5, 1.0)
    after = convert(combine(members, c), x, 0.4, schedule, source="score", target=other)
    before = combine(convert(members, x, 0.4, schedule, source="score", target=other), c)
    assert relative(after, before) > 0.05


@given(coefficients, st.floats(-2, 9))
def test_blending_commutes_with_guidance(c, g):
    with_prompt, without = draw(len(c), 4, 3), draw(len(c), 4, 3, seed=1)
    guidance = row(1 - g, g)
    guided = torch.stack([combine(torch.stack(pair), guidance) for pair in zip(without, with_prompt, strict=True)])
    blended = torch.stack([combine(without, c), combine(with_prompt, c)])
    error = (combine(guided, c) - combine(blended, guidance)).abs().max()
    assert float(error) < 1e-12 * float(c.abs().sum()) * (1 + 2 * abs(g)) * 4


@given(coefficients, st.randoms(use_true_random=False))
def test_the_order_of_members_does_not_matter(c, random):
    functions, order = leaves(len(c)), list(range(len(c)))
    random.shuffle(order)
    x = draw(5, 2)
    shuffled = Blend([functions[k] for k in order], c[order])
    assert relative(shuffled(x, T), Blend(functions, c)(x, T)) < 1e-12 * float(c.abs().sum())


def counted(function):
    def call(x, t):
        call.count += 1
        return function(x, t)

    call.count = 0
    return call


def test_nested_blends_are_flat_and_evaluate_a_leaf_once():
    a, b, d = (counted(leaf(k)) for k in range(3))
    inner, other = Blend([a, b], row(0.3, 0.7)), Blend([b, d, a], row(0.5, 0.25, 0.25))
    nested = Blend([inner, other, d], row(0.6, 0.5, -0.1))
    x = draw(5, 2)
    expected = row(0.6 * 0.3 + 0.5 * 0.25, 0.6 * 0.7 + 0.5 * 0.5, 0.5 * 0.25 - 0.1)
    torch.testing.assert_close(nested.coefficients, expected)
    got = nested(x, T)
    assert (a.count, b.count, d.count) == (1, 1, 1)
    torch.testing.assert_close(got, Blend([a, b, d], expected)(x, T), rtol=1e-12, atol=1e-12)
    by_hand = 0.6 * inner(x, T) + 0.5 * other(x, T) - 0.1 * d(x, T)
    torch.testing.assert_close(got, by_hand, rtol=1e-12, atol=1e-12)


def test_a_leaf_named_twice_counts_twice():
    a, b = counted(leaf(0)), leaf(1)
    nested = Blend([Blend([a, a, b], row(0.5, 0.2, 0.3)), b], row(0.5, 0.5))
    torch.testing.assert_close(nested.coefficients, row(0.35, 0.65))
    torch.testing.assert_close(nested(draw(5, 2), T), 0.35 * leaf(0)(draw(5, 2), T) + 0.65 * b(draw(5, 2), T))
    assert a.count == 1


def test_blends_that_share_a_stack_evaluate_it_once():
    stack = CountingStack(Stack(leaves(3)))
    nested = Blend([Blend(stack, row(0.5, 0.5, 0)), Blend(stack, row(0, 0.5, 0.5)), leaf(9)], row(0.4, 0.4, 0.2))
    x = draw(5, 2)
    got = nested(x, T)
    assert stack.calls == 1 and stack.evaluations == 3 * 5
    assert isinstance(nested.stack, Concatenated) and len(nested.stack) == 4
    everything = torch.stack([f(x, T) for f in [*leaves(3), leaf(9)]])
    torch.testing.assert_close(got, combine(everything, row(0.2, 0.4, 0.2, 0.2)))


def test_a_nested_coefficient_that_cancels_is_not_evaluated():
    a, b = counted(leaf(0)), counted(leaf(1))
    nested = Blend([Blend([a, b], row(2, -1)), b], row(0.5, 0.5))
    torch.testing.assert_close(nested(draw(3, 2), T), a(draw(3, 2), T))
    assert b.count == 0


def test_nested_rows_and_times():
    functions, x = leaves(3), draw(4, 2)
    per_sample = torch.stack([row(0.1 * i, 1 - 0.1 * i) for i in range(4)])
    in_time = Blend(functions[1:], lambda t: torch.stack([t, 1 - t]))
    nested = Blend([Blend(functions[:2], per_sample), in_time], row(0.5, 0.5))
    assert not nested.constant
    a, b, d = (f(x, T) for f in functions)
    w = per_sample[:, 1:]
    torch.testing.assert_close(nested(x, T), ((1 - w) * a + w * b) / 2 + (0.4 * b + 0.6 * d) / 2)
    assert Blend([Blend(functions[:2], per_sample), functions[2]], row(0.5, 0.5)).coefficients.shape == (4, 3)


@given(st.integers(1, 6), st.integers(2, 4), st.integers(0, 10_000))
def test_coefficients_by_sample_equal_a_loop_over_rows(batch, count, seed):
    c = draw(batch, count, seed=seed)
    c[:, 0] += 1 - c.sum(1)
    functions, x = leaves(count), draw(batch, 2, seed=seed + 1)
    whole = Blend(functions, c)
    evaluation = whole.evaluate(x, T)
    for i in range(batch):
        one = Blend(functions, c[i]).evaluate(x[i : i + 1], T)
        scale = float(c[i].abs().sum())
        torch.testing.assert_close(evaluation.score[i], one.score[0], rtol=0, atol=1e-12 * scale * 10)
        torch.testing.assert_close(evaluation.spread()[i : i + 1], one.spread(), rtol=1e-9, atol=1e-10 * scale)
    index = torch.arange(batch).flip(0)[: max(1, batch // 2)]
    torch.testing.assert_close(whole.rows(index)(x[index], T), evaluation.score[index], rtol=1e-12, atol=1e-12)


def test_zero_coefficients_are_not_evaluated():
    stack, x = CountingStack(Stack(leaves(4))), draw(5, 2)
    evaluation = Blend(stack, row(0, 0.5, 0, 0.5)).evaluate(x, T)
    assert stack.evaluations == 2 * 5 and evaluation.active == (1, 3)
    assert evaluation.members.shape == (2, 5, 2) and torch.equal(evaluation.coefficients, row(0.5, 0.5))
    mixed = torch.zeros(5, 4, dtype=torch.float64)
    mixed[:, 2], mixed[4] = 1, row(0.5, 0, 0.5, 0)
    Blend(stack, mixed)(x, T)  # member 0 counts in one row only: it is evaluated, 1 and 3 are not
    assert stack.evaluations == 4 * 5
    one = Blend(stack, row(0, 0, 0, 1))
    torch.testing.assert_close(one(x, T), leaf(3)(x, T), rtol=0, atol=0)
    assert stack.evaluations == 5 * 5 and float(one.evaluate(x, T).spread().abs().max()) == 0


def test_coefficients_in_time():
    functions, x = leaves(2), draw(5, 2)
    stack = CountingStack(Stack(functions))
    blend = Blend(stack, lambda t: torch.stack([(t > 0.5).double(), (t <= 0.5).double()]))
    for t, k in ((0.7, 0), (0.3, 1)):
        t = torch.tensor(t, dtype=torch.float64)
        torch.testing.assert_close(blend(x, t), functions[k](x, t))
    assert stack.evaluations == 2 * 5 and not blend.constant
    with pytest.raises(ValueError, match="depend on time"):
        _ = blend.coefficients
    with pytest.raises(ValueError, match=r"sum to 1, got 1\.4"):
        Blend(functions, lambda t: torch.stack([t, torch.ones_like(t)]))(x, T)
    torch.testing.assert_close(blend.rows(torch.tensor([3, 1]))(x[[3, 1]], T), functions[1](x[[3, 1]], T))


@given(coefficients)
def test_spread_is_the_weighted_variance(c):
    functions, x = leaves(len(c)), draw(6, 2)
    evaluation = Blend(functions, c).evaluate(x, T)
    squares = evaluation.members.square().sum(2)
    plain = evaluation.coefficients @ squares - evaluation.score.square().sum(1)
    scale = float((evaluation.coefficients.abs().sum() ** 2) * squares.max())
    torch.testing.assert_close(evaluation.spread(), plain, rtol=0, atol=1e-12 * scale)
    pairs = evaluation.pair_spread().sum((1, 2))
    torch.testing.assert_close(pairs, evaluation.spread(), rtol=0, atol=1e-11 * scale)
    if bool((c >= 0).all()):
        assert bool((evaluation.spread() >= 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_blend_keeps_dtype_and_event_shape_and_state(dtype):
    x = draw(3, 4, 5, 2).to(dtype)
    before = x.clone()
    blend = Blend([lambda x, t: x, lambda x, t: -x], row(0.25, 0.75))
    got = blend(x, T)
    assert got.dtype == dtype and got.shape == x.shape and torch.equal(x, before)
    torch.testing.assert_close(got, -x / 2)
    assert blend.evaluate(x, T).spread().dtype == torch.float64


def test_a_blend_of_mixture_scores():
    schedule = VPLinear()
    mixtures = [GaussianMixture([0.5, 0.5], [[-k - 1.0, 0.0], [1.0, k]], [0.3, 0.5 + k]) for k in range(3)]
    stack, x = CountingStack(MixtureStack(mixtures, schedule, ("a", "b"))), draw(5, 2)
    got = Blend(stack, Preference({"a": 0.5, "b": 0.4}, strength=1.5))(x, T)
    scores = [mixture.noised(schedule, T).score(x) for mixture in mixtures]
    torch.testing.assert_close(got, -0.35 * scores[0] + 0.75 * scores[1] + 0.6 * scores[2], rtol=1e-10, atol=1e-10)
    assert stack.calls == 1


def test_the_sum_is_checked_with_a_tolerance():
    # The authors' sum(w) == 1 rejects valid preferences such as this one.
    w = [0.1] * 10
    assert sum(w) != 1
    Blend(leaves(10), w)


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: Blend(leaves(2), row(0.5, 0.6)), ValueError, r"1, got 1\.1 \(\[0\.5, 0\.6\]\).*0\.4, or rescale"),
        (lambda: Blend(leaves(2), torch.tensor([[0.5, 0.5], [1, 1]])), ValueError, r"got 2 \(\[1, 1\]\)"),
        (lambda: Blend(leaves(2), row(float("nan"), 1)), ValueError, "must be finite"),
        (lambda: Blend(leaves(2), row(float("inf"), 1)), ValueError, "must be finite"),
        (lambda: Blend(leaves(2), row(0.5, 0.25, 0.25)), ValueError, r"shape \(2,\) or \(B, 2\), got \(3,\)"),
        (lambda: Blend(leaves(3), Preference([0.5, 0.1, 0.2])), ValueError, "4 scores, got 3; put the base first"),
        (lambda: Blend(leaves(2), "half"), TypeError, "must be numbers"),
        (lambda: Blend(3, row(0.5, 0.5)), TypeError, "ScoreStack or a list"),
        (lambda: Blend([], row()), ValueError, "at least one score"),
        (lambda: Blend(leaves(2), torch.full((3, 2), 0.5))(draw(4, 2), T), ValueError, "3 samples.*got 4"),
    ],
)
def test_bad_coefficients_are_named(call, kind, words):
    with pytest.raises(kind, match=words) as info:
        call()
    assert "\n" not in str(info.value)
