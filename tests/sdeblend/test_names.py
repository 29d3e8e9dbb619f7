"""Names belong to the stack: a preference by name never goes by order, on any stack of the core."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdeblend import Blend, Concatenated, CountingStack, OneMemberPerStep, Preference, ScoreStack, Stack
from tests.support.core import seeded

NAMES = ("left", "right", "up")
T = torch.tensor(0.5, dtype=torch.float64)
FUNCTIONS = [lambda x, t, k=k: k - x for k in (0.0, 1.0, -3.0, 5.0)]
WEIGHTS = {"left": 0.2, "right": 0.3, "up": 0.4}
STACKS = {
    "stack": lambda: Stack(FUNCTIONS, NAMES),
    "counting": lambda: CountingStack(Stack(FUNCTIONS, NAMES)),
    "rows": lambda: CountingStack(Stack(FUNCTIONS, NAMES)).rows(torch.arange(4)),
}


@pytest.mark.parametrize("kind", STACKS)
@given(st.permutations(list(WEIGHTS.items())))
def test_another_order_of_the_names_gives_the_same_blend(kind, items):
    x, grid = torch.randn(4, 2, generator=seeded(), dtype=torch.float64), torch.tensor([0.5, 0.1, 0.0])
    stack = STACKS[kind]()
    expected = 0.1 * (0 - x) + 0.2 * (1 - x) + 0.3 * (-3 - x) + 0.4 * (5 - x)
    torch.testing.assert_close(Blend(stack, Preference(dict(items)))(x, T), expected)
    draws = [
        OneMemberPerStep(stack, Preference(weights), grid, 4, generator=seeded(1)).probabilities
        for weights in (dict(items), WEIGHTS)
    ]
    assert torch.equal(*draws)


@pytest.mark.parametrize("kind", STACKS)
def test_a_misspelt_name_is_refused(kind):
    for make in (
        lambda p: Blend(STACKS[kind](), p),
        lambda p: OneMemberPerStep(STACKS[kind](), p, torch.tensor([0.5, 0.1]), 4, generator=seeded()),
    ):
        with pytest.raises(ValueError, match="can weigh only left, right, up, got lefd; load it or drop it"):
            make(Preference({"lefd": 0.5, "right": 0.5}))


def test_a_name_left_out_weighs_nothing():
    assert torch.equal(
        Blend(STACKS["stack"](), Preference({"up": 0.4})).coefficients,
        Blend(STACKS["stack"](), Preference([0.0, 0.0, 0.4])).coefficients,
    )


@pytest.mark.parametrize("stack", [FUNCTIONS, Stack(FUNCTIONS), Concatenated([Stack(FUNCTIONS, NAMES)])])
def test_a_stack_without_names_takes_weights_in_order_only(stack):
    with pytest.raises(ValueError, match="weights by name need a stack with names, got left, right, up on one without"):
        Blend(stack, Preference(WEIGHTS))
    c = Blend(stack, Preference(list(WEIGHTS.values()))).coefficients
    torch.testing.assert_close(c, torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"a preference over 2 members needs .* 3 scores, got 4"):
        Blend(stack, Preference([0.5, 0.5]))


@pytest.mark.parametrize("names", [("a", "b"), ("a", "b", "b"), ("a", "b", "c", "d"), "abc"])
def test_names_that_do_not_fit_are_refused(names):
    with pytest.raises(ValueError, match="4 scores needs 3 different names, of the members after the base"):
        Stack(FUNCTIONS, names)


def test_a_stack_is_one_by_inheritance():
    class Duck:
        names = NAMES

        def __len__(self):
            return 4

        def __call__(self, x, t, active=None):
            return torch.stack([f(x, t) for f in FUNCTIONS])

    with pytest.raises(TypeError, match=r"inherits from sdeblend\.ScoreStack"):
        Blend(Duck(), Preference(WEIGHTS))

    class Own(Duck, ScoreStack):
        pass

    assert torch.equal(Blend(Own(), Preference({"up": 1.0})).coefficients, torch.tensor([0.0, 0, 0, 1]).double())
