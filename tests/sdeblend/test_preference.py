"""Preferences: the base takes the rest, names and their order, weights and strength by sample."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdeblend import Preference

numbers = st.floats(-5, 5, allow_nan=False)


def row(*values):
    return torch.tensor(values, dtype=torch.float64)


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
    assert Preference([0.5, 0.5]).names == ("0", "1")
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
        (lambda: Preference(0.5), TypeError, "by name or in order, got 0.5"),
        (lambda: Preference("a"), TypeError, "by name or in order, got 'a'"),
    ],
)
def test_bad_preferences_are_named(call, kind, words):
    with pytest.raises(kind, match=words) as info:
        call()
    assert "\n" not in str(info.value)
