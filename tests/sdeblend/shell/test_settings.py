"""Settings: each kind of mistake is one sentence, and every key is described."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError, field_validator, model_validator

from sdeblend.shell.settings import OneOf, Settings, describe, parse, read_toml, words


class Reward(Settings):
    """A reward.

    Attributes:
        name: told apart by it.
        linear, quadratic: its coefficients,
            both of them.
    """

    name: str = Field(min_length=1)
    linear: tuple[float, ...] | None = None
    quadratic: list[list[float]] | None = None

    @model_validator(mode="after")
    def _some(self) -> Reward:
        if self.name == "none":
            raise ValueError("a reward needs linear or quadratic, got neither; give one")
        return self


class Plane(Settings):
    kind: Literal["plane"]
    size: int


class Line(Settings):
    kind: Literal["line"]
    length: float


class Blend(Settings):
    """How rewards are blended.

    Args:
        kl_weight: alpha.
        steps: of the solver.
    """

    kl_weight: float
    weights: list[float] = Field([0.5, 0.5])
    means: list[list[float]] = Field([])
    steps: int = Field(200, ge=2)
    corrected: bool = False
    solver: Literal["heun", "dpm-2m"] = "heun"
    strength: float | tuple[float, ...] = 1
    threshold: float = Field(0.5, gt=0, le=1)
    clip: float = Field(1.0, gt=0, allow_inf_nan=True)
    seed: int = Field(0, ge=0, le=2**32 - 1)
    window: tuple[float, float] = (0, 1)
    out: Path = Path("out")
    spacing: Annotated[str, OneOf({"uniform": 1, "karras": 2})] | None = None
    backend: Annotated[str, "the name of a backend"] = "mixture"
    names: list[Annotated[str, Field(min_length=1)]] = Field([])
    text: str = Field("", description="stands under the title")

    @field_validator("steps")
    @classmethod
    def _even(cls, steps: int) -> int:
        if steps % 2:
            raise ValueError(f"must be even, got {steps}")
        return steps


class Problem(Settings):
    blend: Blend
    rewards: tuple[Reward, ...] = Field((), max_length=2)
    methods: dict[str, Reward] = Field({})
    scales: dict[str, float] = Field({})
    extra: dict[str, Any] = Field({})
    space: Annotated[Plane | Line, Field(discriminator="kind")] | None = None


def check(table: dict[str, Any]) -> Blend:
    return parse(Blend, table, file="problem.toml", section="[blend]")


def test_defaults_are_filled_in_and_values_become_what_the_field_is() -> None:
    settings = check({"means": [[1], [2.5]], "kl_weight": 1, "strength": [1, 2], "out": "a/b", "window": [0, 2]})
    assert settings.means == [[1.0], [2.5]]
    assert type(settings.kl_weight) is float and type(check({"kl_weight": 1}).strength) is float
    assert settings.strength == (1.0, 2.0) and settings.window == (0.0, 2.0)
    assert settings.out == Path("a/b")
    settings.weights.append(1.0)
    assert check({"kl_weight": 1}).weights == [0.5, 0.5]
    assert check({"kl_weight": 1, "clip": math.inf}).clip == math.inf


MISTAKES = [
    ({"kl_wieght": 1.0}, "unknown key 'kl_wieght'; allowed keys: backend, clip, corrected, kl_weight, means, "),
    ({}, "kl_weight is missing; give a finite number"),
    ({"kl_weight": "big"}, "kl_weight must be a finite number, got 'big'"),
    ({"kl_weight": "1"}, "kl_weight must be a finite number, got '1'"),
    ({"kl_weight": math.nan}, "kl_weight must be a finite number, got nan"),
    ({"kl_weight": math.inf}, "kl_weight must be a finite number, got inf"),
    ({"kl_weight": 10**400}, "kl_weight must be a finite number, got 1000"),
    ({"kl_weight": True}, "kl_weight must be a finite number, got true"),
    ({"kl_weight": 1, "steps": 2.0}, "steps must be an integer of at least 2, got 2.0"),
    ({"kl_weight": 1, "steps": True}, "steps must be an integer of at least 2, got true"),
    ({"kl_weight": 1, "steps": 0}, "steps must be an integer of at least 2, got 0"),
    ({"kl_weight": 1, "steps": 3}, "steps must be even, got 3"),
    ({"kl_weight": 1, "corrected": 1}, "corrected must be true or false, got 1"),
    ({"kl_weight": 1, "solver": "euler"}, "solver must be one of 'heun', 'dpm-2m', got 'euler'"),
    ({"kl_weight": 1, "spacing": "log"}, "spacing must be one of 'uniform', 'karras', got 'log'"),
    ({"kl_weight": 1, "means": [[1.0], ["a"]]}, "means must be a list of lists of finite numbers, got 'a'"),
    ({"kl_weight": 1, "strength": {}}, "strength must be a finite number or a list of finite numbers, got a table"),
    ({"kl_weight": 1, "strength": [1, "a"]}, "strength must be a finite number or a list of finite numbers, got [1"),
    ({"kl_weight": 1, "threshold": 0}, "threshold must be a finite number above 0 and at most 1, got 0"),
    ({"kl_weight": 1, "clip": math.nan}, "clip must be a number above 0, got nan"),
    ({"kl_weight": 1, "seed": 2**32}, "seed must be an integer from 0 to 2^32 - 1, got 4294967296"),
    ({"kl_weight": 1, "window": [1]}, "window must be a list of 2 finite numbers, got [1]"),
    ({"kl_weight": 1, "window": [1, 2, 3]}, "window must be a list of 2 finite numbers, got [1, 2, 3]"),
    ({"kl_weight": 1, "out": 3}, "out must be a path, got 3"),
    ({"kl_weight": 1, "backend": 3}, "backend must be the name of a backend, got 3"),
    ({"kl_weight": 1, "names": [""]}, "names must be a list of strings that is not empty, got ''"),
]


@pytest.mark.parametrize(("table", "message"), MISTAKES)
def test_refuses_in_one_sentence(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        check(table)
    assert str(caught.value).startswith(f"problem.toml: [blend] {message}")
    assert len(str(caught.value)) < 250
    assert not isinstance(caught.value, ValidationError)


@pytest.mark.parametrize(("table", "message"), MISTAKES)
def test_in_python_the_sentence_has_no_file(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Blend(**table)
    assert str(caught.value).startswith(message)
    assert not isinstance(caught.value, ValidationError)


BLEND = {"kl_weight": 1}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "blend is missing; give a table"),
        ({"blend": 3}, "blend must be a table, got 3"),
        ({"blend": BLEND, "rewards": ["r"]}, "rewards must be a list of tables, at most 2, got 'r'"),
        ({"blend": BLEND, "rewards": [{}]}, "[[rewards]] 1 name is missing; give a string that is not empty"),
        ({"blend": BLEND, "rewards": [{"name": "a"}, {"nam": 1}]}, "[[rewards]] 2 unknown key 'nam'; allowed keys: "),
        ({"blend": BLEND, "rewards": [{"name": "none"}]}, "[[rewards]] 1 a reward needs linear or quadratic, got nei"),
        ({"blend": BLEND, "methods": {"code": {}}}, "[methods.code] name is missing"),
        ({"blend": BLEND, "methods": {"code": 3}}, "[methods] code must be a table, got 3"),
        ({"blend": BLEND, "scales": {"left": "a"}}, "[scales] left must be a finite number, got 'a'"),
        ({"blend": BLEND, "scales": 2}, "scales must be a table of finite numbers, got 2"),
        ({"blend": BLEND, "extra": 2}, "extra must be a table, got 2"),
        ({"blend": BLEND, "space": {"kind": "cube"}}, "[space] kind must be one of 'plane', 'line', got 'cube'"),
        ({"blend": BLEND, "space": {}}, "[space] kind is missing; give one of 'plane', 'line'"),
        ({"blend": BLEND, "space": 3}, "space must be a table, got 3"),
        ({"blend": BLEND, "space": {"kind": "line", "length": "a"}}, "[space] length must be a finite number, got 'a'"),
        ({"blend": BLEND | {"n": 1}, "extra": 2}, "[blend] unknown key 'n'; allowed keys: "),
    ],
)
def test_inner_tables_have_headings_of_their_own(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse(Problem, table, file="problem.toml")
    assert str(caught.value).startswith(f"problem.toml: {message}")


def test_a_section_heads_what_is_in_it() -> None:
    with pytest.raises(ValueError, match=r"^f: \[\[rewards\]\] 2 unknown key 'nam'; allowed keys: linear, name, q"):
        parse(Reward, {"nam": 1}, file="f", section="[[rewards]] 2")
    with pytest.raises(ValueError, match=r"^f: \[model\.scales\] a must be a finite number, got 'b'"):
        parse(Problem, {"blend": BLEND, "scales": {"a": "b"}}, file="f", section="[model]")


def test_settings_are_values() -> None:
    reward = Reward(name="a", linear=[1])
    assert reward == Reward(name="a", linear=(1.0,)) and hash(reward.changed(quadratic=None)) == hash(reward)
    with pytest.raises(ValidationError):
        reward.name = "b"  # type: ignore[misc]
    with pytest.raises(ValueError, match=r"^name must be a string that is not empty, got ''"):
        reward.changed(name="")


def test_describe_lists_every_key() -> None:
    keys = {key.name: key for key in describe(Problem)}
    inner = [f"blend.{name}" for name in Blend.model_fields] + [f"rewards[].{name}" for name in Reward.model_fields]
    inner += [f"methods.NAME.{name}" for name in Reward.model_fields] + ["space.size", "space.length"]
    assert {*Problem.model_fields, *inner} <= set(keys)
    assert keys["blend.kl_weight"] == ("blend.kl_weight", "a finite number", "required", "alpha.")
    assert keys["blend.steps"] == ("blend.steps", "an integer of at least 2", "200", "of the solver.")
    assert keys["blend.text"].description == "stands under the title"
    assert keys["rewards[].linear"].description == keys["rewards[].quadratic"].description
    assert keys["rewards[].linear"][2:] == ("", "its coefficients, both of them.")
    assert [keys[f"blend.{name}"].default for name in ("weights", "solver", "corrected", "out")] == [
        "[0.5, 0.5]", '"heun"', "false", '"out"',
    ]  # fmt: skip


def test_types_in_words() -> None:
    assert words(list[Literal["exact", "mpa"]]) == "a list of any of 'exact', 'mpa'"
    assert words(dict[str, list[int]]) == "a table of lists of integers"
    assert words(float | None) == "a finite number"


def test_read_toml_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "problem.toml"
    file.write_text("[blend]\nsteps = 20\n")
    assert read_toml(file) == {"blend": {"steps": 20}}
    file.write_text("[blend\n")
    with pytest.raises(ValueError, match=r"problem\.toml: not valid TOML: .*line 1"):
        read_toml(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"problem\.toml: not valid TOML"):
        read_toml(file)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)


@given(
    table=st.dictionaries(st.sampled_from([*Blend.model_fields, "other"]), values, max_size=3), complete=st.booleans()
)
def test_any_table_is_either_taken_whole_or_refused_with_a_sentence(table: dict[str, Any], complete: bool) -> None:
    if complete:
        table = {"kl_weight": 0.25} | table
    try:
        settings = check(table)
    except ValueError as error:
        assert str(error).startswith("problem.toml: [blend] ")
        assert "\n" not in str(error)
    else:
        for key, value in table.items():
            found = getattr(settings, key)
            assert (list(found) if isinstance(found, tuple) else str(found) if key == "out" else found) == value
