"""Preferences: the base takes the rest, names and their order, weights and strength by sample."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdeblend import Preference

numbers = st.floats(-5, 5, allow_nan=False)


def row(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:weights that sum to more than 1")
@given(st.lists(numbers, min_size=1, max_size=6), numbers)
def test_the_base_takes_the_rest(weights, strength):
    c = Preference(weights, strength).coefficients()
    assert c.dtype == torch.float64 and c.shape == (1 + len(weights),)
    torch.testing.assert_close(c[1:], strength * torch.tensor(weights, dtype=torch.float64))
    assert float(c.sum()) == pytest.approx(1, abs=1e-13 * (1 + sum(map(abs, weights)) * abs(strength)))


@pytest.mark.parametrize(
    ("weights", "strength", "expected"),
    [
        ([0.3, 0.7], 1.0, (0, 0.3, 0.7)),  # DB-MPA
        ([1.0], 0.25, (0.75, 0.25)),  # DB-KLA
        ([1.0], 2.0, (-1, 2)),  # beyond the member
        ([1.0], 0.0, (1, 0)),  # the base
        ([0.3, 0.7], 1.2, (-0.2, 0.36, 0.84)),
        ([0.2, 0.2], 1.0, (0.6, 0.2, 0.2)),
    ],
)
def test_named_cases(weights, strength, expected):
    torch.testing.assert_close(Preference(weights, strength).coefficients(), row(*expected))


def test_names_and_their_order():
    preference = Preference({"vivid": 0.7, "small": 0.2})
    assert preference.names == ("vivid", "small")
    torch.testing.assert_close(preference.coefficients(), row(0.1, 0.7, 0.2))
    torch.testing.assert_close(preference.coefficients(["small", "other", "vivid"]), row(0.1, 0.2, 0, 0.7))
    assert Preference([0.5, 0.5]).names is None and Preference([0.5, 0.5]).weights == (0.5, 0.5)
    assert repr(preference) == "Preference({'vivid': 0.7, 'small': 0.2}, strength=1.0)"


def test_weights_and_strength_by_sample():
    w, strength = row(0.1, 0.5, 0.9), row(1.0, 2.0, 0.5)
    c = Preference({"a": w, "b": 0.1}, strength).coefficients()
    assert c.shape == (3, 3)
    for i in range(3):
        one = Preference({"a": float(w[i]), "b": 0.1}, float(strength[i])).coefficients()
        torch.testing.assert_close(c[i], one)
    torch.testing.assert_close(Preference([1.0], strength).coefficients(), torch.stack([1 - strength, strength], 1))
    assert Preference({"a": w}).coefficients(["b", "a"]).shape == (3, 3)


names = st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=5, unique=True)


@pytest.mark.filterwarnings("ignore:weights that sum to more than 1")
@given(st.data(), names, numbers)
def test_another_order_of_the_names_is_the_same_preference(data, given_names, strength):
    weights = {name: data.draw(numbers) for name in given_names}
    preference = Preference(weights, strength)
    other = Preference(dict(data.draw(st.permutations(list(weights.items())))), strength)
    assert preference == other and hash(preference) == hash(other)
    assert torch.equal(preference.coefficients(given_names), other.coefficients(given_names))
    assert Preference.from_json(json.loads(json.dumps(preference.to_json()))) == preference
    assert pickle.loads(pickle.dumps(preference)) == preference == copy.deepcopy(preference)
    assert preference != Preference(list(weights.values()), strength)
    assert preference != Preference(weights | {given_names[0]: weights[given_names[0]] + 1}, strength)


def test_preferences_by_sample_go_to_json_and_back():
    preference = Preference({"a": row(0.1, 0.5), "b": 0.2}, row(1, 2))
    again = Preference.from_json(json.loads(json.dumps(preference.to_json())))
    assert again == preference and len({again, preference}) == 1
    assert torch.equal(again.coefficients(), preference.coefficients())


def test_what_was_given_stays_the_givers():
    w, weights = row(0.1, 0.5), {"a": 0.5}
    one, two = Preference({"a": w}), Preference(weights)
    w[0], weights["a"] = 9.0, 9.0
    two.weights["a"] = 9.0
    assert one == Preference({"a": row(0.1, 0.5)}) and two == Preference({"a": 0.5})


@pytest.mark.parametrize(
    ("weights", "strength", "base"),
    [
        ({"a": 0.9, "b": 0.9}, 1.0, "-0.8"),
        ({"a": 30, "b": 70}, 1.0, "-99"),
        ([2.0], 0.8, "-0.6"),
        ({"a": row(0.2, 1.5), "b": 0.5}, 1.0, "-1"),
    ],
)
def test_a_negative_base_at_strength_one_is_told_once(weights, strength, base):
    with pytest.warns(UserWarning, match=rf"negative coefficient, here {base}: .*normalized") as told:
        preference = Preference(weights, strength)
        preference.coefficients()
        preference.coefficients(preference.names)
    assert len(told) == 1 and told[0].filename == __file__
    normal = preference.normalized()  # says nothing: warnings are errors
    assert normal.strength == strength
    c = normal.coefficients()
    torch.testing.assert_close(c[..., 0], torch.full_like(c[..., 0], 1 - strength))


@pytest.mark.parametrize(("weights", "strength"), [([0.3, 0.7], 1.7), ([0.5], -2.0), ([0.7, 0.3], 1.0), ([-1.0], 1.0)])
def test_what_is_meant_is_not_told(weights, strength):
    Preference(weights, strength).coefficients()  # warnings are errors


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: Preference({}), ValueError, "at least one weight"),
        (lambda: Preference({"a": float("nan")}), ValueError, "weight of 'a' must be finite, got nan"),
        (lambda: Preference({"a": float("inf")}), ValueError, "finite"),
        (lambda: Preference({"a": row(0.1, float("nan"))}), ValueError, "weight of 'a' must be finite"),
        (lambda: Preference([0.5], float("nan")), ValueError, "strength must be finite"),
        (lambda: Preference({"a": "much"}), TypeError, "weight of 'a' must be a number, got 'much'"),
        (lambda: Preference({"a": True}), TypeError, "must be a number, got True"),
        (lambda: Preference({"a": None}), TypeError, "numbers"),
        (lambda: Preference({"a": torch.zeros(2, 2)}), ValueError, r"one a sample, got shape \(2, 2\)"),
        (lambda: Preference({"a": 0.5, "c": 0.5}).coefficients(["a", "b"]), ValueError, "only a, b, got c"),
        (lambda: Preference({"a": row(0.1, 0.2), "b": row(0.1, 0.2, 0.3)}), ValueError, "2 and 3 rows"),
        (lambda: Preference({"a": row(0.1, 0.2)}, strength=row(1, 2, 3)), ValueError, "2 and 3 rows"),
        (lambda: Preference([0.5]).coefficients(["a", "b"]), ValueError, r"one a member \(a, b\), got 1; give 2"),
        (lambda: Preference({"a": 0.5, "b": -0.5}).normalized(), ValueError, "sum is not above 0"),
        (lambda: Preference.from_json({"a": 0.5}), ValueError, r"a preference is \{.weights"),
        (lambda: Preference.from_json([0.5]), ValueError, r"a preference is \{.weights"),
        (lambda: Preference(0.5), TypeError, "by name or in order, got 0.5"),
        (lambda: Preference("a"), TypeError, "by name or in order, got 'a'"),
    ],
)
def test_bad_preferences_are_named(call, kind, words):
    with pytest.raises(kind, match=words) as info:
        call()
    assert "\n" not in str(info.value)
