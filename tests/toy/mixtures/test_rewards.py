"""Rewards: the algebra is the algebra of functions; what is no reward is refused."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.strategies import close, dims, generator, mixtures, refuses, rewards, seeds
from toy import QuadraticReward, combine


@st.composite
def pairs(draw):
    dim = draw(dims)
    return draw(rewards(dim, 1.0)), draw(rewards(dim, 1.0)), draw(mixtures(dim)), draw(seeds)


@given(pairs(), st.floats(-3, 3))
def test_algebra_is_that_of_functions(drawn, factor):
    first, second, _, seed = drawn
    x = torch.randn(5, first.dim, generator=generator(seed), dtype=torch.float64)
    close((first + second)(x), first(x) + second(x), scale=1)
    close((first - second)(x), first(x) - second(x), scale=1)
    close((factor * first)(x), factor * first(x), scale=1)
    close((first * factor + second / 2)(x), factor * first(x) + second(x) / 2, scale=1)
    close(combine([first, second], [factor, 0.5])(x), factor * first(x) + second(x) / 2, scale=1)
    close(combine({"a": first, "b": second}, {"b": factor})(x), factor * second(x), scale=1)


@given(pairs())
def test_gradient(drawn):
    reward, _, _, seed = drawn
    x = torch.randn(4, reward.dim, generator=generator(seed), dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(reward(x).sum(), x)
    close(reward.grad(x).detach(), expected, scale=1)


@given(pairs())
def test_normalized_has_unit_variance(drawn):
    reward, _, base, _ = drawn
    assert math.isclose(base.reward_variance(reward.normalized(base)), 1, rel_tol=1e-12)


def test_values_written_out():
    reward = QuadraticReward([1.0, 2.0], [[2.0, 1.0], [1.0, 4.0]], 3.0)
    assert float(reward(torch.tensor([1.0, -1.0]))) == 3 + 1 - 2 - (2 - 2 + 4) / 2
    assert reward(torch.zeros(2, 5, 2)).shape == (2, 5)
    assert reward(torch.zeros(7, 2)).dtype == torch.float32
    assert not reward.is_linear and QuadraticReward([1.0]).is_linear
    assert QuadraticReward(quadratic=[[2.0]]).dim == 1
    assert "constant=3" in repr(reward) and "quadratic" not in repr(QuadraticReward([1.0]))


LINEAR: Any = QuadraticReward([1.0, 0.0])
REWARD: Any = QuadraticReward


@pytest.mark.parametrize(
    ("call", "parts", "kind"),
    [
        (lambda: QuadraticReward(), ["neither"], ValueError),
        (lambda: QuadraticReward([[1.0]]), ["linear", "(1, 1)"], ValueError),
        (lambda: QuadraticReward([1.0], [1.0]), ["quadratic", "(1,)"], ValueError),
        (lambda: QuadraticReward([1.0], torch.eye(2)), ["(1,)", "(2, 2)"], ValueError),
        (lambda: QuadraticReward(quadratic=torch.ones(2, 3)), ["(2, 3)"], ValueError),
        (lambda: QuadraticReward(torch.ones(0)), ["(0,)"], ValueError),
        (lambda: QuadraticReward([math.nan]), ["finite", "nan"], ValueError),
        (lambda: QuadraticReward([1.0, 1.0], [[1.0, 2.0], [0.0, 1.0]]), ["symmetric", "2"], ValueError),
        (lambda: QuadraticReward([1.0], constant=math.inf), ["constant", "inf"], ValueError),
        (lambda: REWARD([1.0], constant="1"), ["constant", "'1'"], ValueError),
        (lambda: REWARD(["a"]), ["linear"], TypeError),
        (lambda: QuadraticReward([[1.0], [1.0, 2.0]]), ["linear"], (TypeError, ValueError)),
        (lambda: LINEAR(torch.zeros(3)), ["(3,)", "2 dimensions"], ValueError),
        (lambda: LINEAR(torch.zeros(3, 2, dtype=torch.long)), ["int64"], TypeError),
        (lambda: LINEAR + QuadraticReward([1.0]), ["2 and 1"], ValueError),
        (lambda: LINEAR * math.nan, ["factor", "nan"], ValueError),
        (lambda: LINEAR / 0, ["0"], ValueError),
        (lambda: combine([], []), ["none"], ValueError),
        (lambda: combine([LINEAR], [1.0, 2.0]), ["1 rewards", "2"], ValueError),
        (lambda: combine({"a": LINEAR}, {"b": 1.0}), ["a", "b"], ValueError),
        (lambda: combine([LINEAR], [math.nan]), ["nan"], ValueError),
    ],
)
def test_refuses(call, parts, kind):
    refuses(call, *parts, kind=kind)


def test_other_operands_are_left_to_python():
    for operation in (lambda: LINEAR + 1, lambda: LINEAR - 1, lambda: LINEAR * LINEAR):
        with pytest.raises((TypeError, ValueError)):
            operation()


def test_normalized_needs_variance():
    from toy import GaussianMixture

    base = GaussianMixture([1.0], [[0.0, 0.0]], [1.0])
    refuses(lambda: (LINEAR * 0).normalized(base), "variance 0")
