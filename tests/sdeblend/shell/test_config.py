"""Settings are checked key by key."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdeblend.config import REQUIRED, check_keys, describe, load_toml


def test_load_toml_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "problem.toml"
    file.write_text("[blend]\nsteps = 20\n")
    assert load_toml(file) == {"blend": {"steps": 20}}
    file.write_text("[blend\n")
    with pytest.raises(ValueError, match=r"problem\.toml: not valid TOML: .*line 1"):
        load_toml(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"problem\.toml: not valid TOML"):
        load_toml(file)


SPEC = {
    "kl_weight": (float, REQUIRED),
    "weights": (list[float], [0.5, 0.5]),
    "means": (list[list[float]], []),
    "steps": (int, 200),
    "corrected": (bool, False),
    "solver": (Literal["heun", "dpm-2m"], "heun"),
    "strength": (float | list[float], 1.0),
}


def check(table: dict[str, Any]) -> dict[str, Any]:
    return check_keys(table, SPEC, file="problem.toml", section="[blend]")


def test_defaults_are_filled_in_and_integers_become_floats() -> None:
    settings = check({"means": [[1], [2.5]], "kl_weight": 1, "strength": [1, 2]})
    assert list(settings) == list(SPEC)
    assert settings["means"] == [[1.0], [2.5]]
    assert type(settings["kl_weight"]) is float
    assert settings["strength"] == [1.0, 2.0]
    settings["weights"].append(1.0)
    assert check({"kl_weight": 1})["weights"] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"kl_wieght": 1.0}, "unknown key 'kl_wieght'; allowed keys: corrected, kl_weight, means, "),
        ({}, "kl_weight is missing; give a finite number"),
        ({"kl_weight": "big"}, "kl_weight must be a finite number, got 'big'"),
        ({"kl_weight": float("nan")}, "kl_weight must be a finite number, got nan"),
        ({"kl_weight": 10**400}, "kl_weight must be a finite number, got 1000"),
        ({"kl_weight": True}, "kl_weight must be a finite number, got true"),
        ({"kl_weight": 1, "steps": 2.0}, "steps must be an integer, got 2.0"),
        ({"kl_weight": 1, "steps": True}, "steps must be an integer, got true"),
        ({"kl_weight": 1, "corrected": 1}, "corrected must be true or false, got 1"),
        ({"kl_weight": 1, "solver": "euler"}, "solver must be one of 'heun', 'dpm-2m', got 'euler'"),
        ({"kl_weight": 1, "means": [[1.0], ["a"]]}, "means must be a list of lists of finite numbers, got 'a'"),
        ({"kl_weight": 1, "strength": {}}, "strength must be a finite number or a list of finite numbers, got a"),
    ],
)
def test_refuses_in_one_sentence(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        check(table)
    assert str(caught.value).startswith(f"problem.toml: [blend] {message}")
    assert len(str(caught.value)) < 200


def test_the_top_level_has_no_section() -> None:
    with pytest.raises(ValueError, match=r"^problem\.toml: blend must be a table, got 3$"):
        check_keys({"blend": 3}, {"blend": (dict, REQUIRED)}, file="problem.toml")
    with pytest.raises(ValueError, match=r"rewards must be a list of tables, got 'r'"):
        check_keys({"rewards": ["r"]}, {"rewards": (list[dict], REQUIRED)}, file="problem.toml")


def test_describes_lists_of_choices() -> None:
    assert describe(list[Literal["exact", "mpa"]]) == "a list of any of 'exact', 'mpa'"


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)


@given(table=st.dictionaries(st.sampled_from([*SPEC, "other"]), values, max_size=3), complete=st.booleans())
def test_any_table_is_either_taken_whole_or_refused_with_a_sentence(
    table: dict[str, Any], complete: bool
) -> None:
    if complete:
        table = {"kl_weight": 0.25} | table
    try:
        settings = check(table)
    except ValueError as error:
        assert str(error).startswith("problem.toml: [blend] ")
        assert "\n" not in str(error)
    else:
        assert set(table) <= set(settings) == set(SPEC)
        for key, value in table.items():
            assert settings[key] == value
