"""Settings from TOML files as pydantic models: checked before anything is computed, and described for help and docs.

    class Blend(Settings):
        weights: tuple[float, ...]
        steps: int = Field(200, ge=2)

    parse(Blend, read_toml(path)["blend"], file=path, section="[blend]")

A model is strict: true is no number, an integer will do for a float, infinity and nan are refused (but for a field with
``Field(allow_inf_nan=True)``), and a key that is not a field is an error. Lists of the file fill fields of type list or
tuple, and text fills a Path. What is wrong is said in one sentence: file, table, key, what is allowed, what was given.

    kind: Annotated[str, "the name of a backend"]       # text in Annotated says what the value is, for messages
    schedule: Annotated[str, OneOf(SCHEDULES)]          # the choices of a registry

A validator of a field raises ValueError("must be ..."), which follows the key's name; a validator of the model raises a
sentence of its own. What documents a key is its line under "Attributes:" or "Args:" in the docstring of the class, or
``Field(description=...)``.

Source: TOML 1.0.0; pydantic 2.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from inspect import cleandoc
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, NamedTuple, Self, TypeVar, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticUndefined, core_schema
from pydantic_core.core_schema import LiteralSchema


def _relax(schema: Any) -> None:
    """Let tuples and paths in a schema, but not what is in them, be filled as in a file."""
    if isinstance(schema, dict):
        if schema.get("type") in ("tuple", "lax-or-strict"):
            schema["strict"] = False
        for part in schema.values():
            _relax(part)
    elif isinstance(schema, list | tuple):
        for part in schema:
            _relax(part)


class Settings(BaseModel):
    """A table of settings; see the module's docstring. Made in Python, it raises the same sentences without a file."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True, protected_namespaces=()
    )

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ValueError(_sentence(type(self), error, values, ())) from None

    # Without this mark pydantic calls the constructor for inner tables too, and their places in the file are lost.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Take lists for tuples and text for paths, as TOML has neither; all else stays strict."""
        schema = handler(source)
        _relax(schema)
        return schema

    def changed(self, **values: Any) -> Self:
        """Return these settings with other values for some keys, checked as if given anew."""
        return type(self)(**{**dict(self), **values})


M = TypeVar("M", bound=Settings)


class OneOf:
    """One of the names of a registry, as text; stands in ``Annotated[str, OneOf(names)]``."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> LiteralSchema:
        return core_schema.literal_schema(list(self.names))


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a TOML file.

    Args:
        path: the file.

    Returns:
        its top-level table.

    Raises:
        ValueError: if it is not UTF-8 text or not TOML; names the file, and line and column.
        OSError: if it cannot be read.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid TOML: {error}; correct it there") from error


def parse(model: type[M], table: Mapping[str, Any], *, file: str | os.PathLike[str], section: str = "") -> M:
    """Return a table as its model, defaults filled in.

    Args:
        model: what the table may hold.
        table: as read.
        file: the file it came from, for messages.
        section: how the table is headed there (``"[blend]"``, ``"[[rewards]] 2"``), for messages; empty for the
            top level. Inner tables get headings of their own.

    Raises:
        ValueError: for an unknown key, a missing one or a value that is not allowed; names the file, the table, the
            key, and what is allowed.
    """
    try:
        return model.model_validate(dict(table))
    except ValidationError as error:
        raise ValueError(f"{file}: {_sentence(model, error, table, (section,) if section else ())}") from None


class Key(NamedTuple):
    """A key that a table may hold: its dotted name, what it takes, its default as TOML has it, what it means."""

    name: str
    kind: str
    default: str
    description: str


def describe(model: type[Settings], prefix: str = "") -> list[Key]:
    """Return every key of a model, inner tables' after their own, ``rewards[].name`` for one of a list of tables.

    Args:
        model: what to describe.
        prefix: put before each name.

    Returns:
        the keys in the order of the fields; the default of one without is "required", and empty where leaving it out
        means something of its own.
    """
    told = _documented(model)
    keys: list[Key] = []
    for name, field in model.model_fields.items():
        meaning = field.description or told.get(name, "")
        keys.append(Key(prefix + name, _words_of(field), _default(field), " ".join(meaning.split())))
        for inner, form in _models(field.annotation):
            keys += describe(inner, f"{prefix}{name}{form}.")
    return keys


def words(kind: Any, *, plural: bool = False, about: Sequence[Any] = ()) -> str:
    """Return a type in words: ``list[float]`` is "a list of finite numbers".

    Args:
        kind: a type as a field has it.
        plural: whether to name several of it.
        about: what ``Annotated`` or ``Field`` say about it: bounds, lengths, choices, or words of its own.
    """
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return words(parts[0], plural=plural, about=[*parts[1:], *about])
    about = [m for one in about for m in (one.metadata if isinstance(one, FieldInfo) else [one])]
    own = next((one for one in about if isinstance(one, str)), None)
    if own is not None:
        return own
    choices = next((one.names for one in about if isinstance(one, OneOf)), None)
    if choices is None and origin is not None and str(origin) == "typing.Literal":
        choices = parts
    if choices is not None:
        return f"{'any' if plural else 'one'} of " + ", ".join(map(repr, choices))
    if origin in (Union, UnionType):
        inner = [words(part, plural=plural, about=about) for part in parts if part is not NoneType]
        return " or ".join(dict.fromkeys(inner))
    if origin is tuple and parts[-1] is not Ellipsis:
        return f"{'lists' if plural else 'a list'} of {len(parts)} {words(parts[0], plural=True)}"
    if origin in (list, tuple, Sequence):
        return f"{'lists' if plural else 'a list'} of {words(parts[0], plural=True)}{_length(about, '')}"
    if origin in (dict, Mapping):
        of = "" if parts[1] is Any else f" of {words(parts[1], plural=True)}"
        return f"{'tables' if plural else 'a table'}{of}"
    unbounded = kind is float and any(getattr(one, "allow_inf_nan", None) for one in about)
    one, many = ("a number", "numbers") if unbounded else _NAMES.get(kind, ("a table", "tables"))
    return (many if plural else one) + _bounds(about) + (_length(about, " characters") if kind is str else "")


_NAMES: dict[Any, tuple[str, str]] = {
    bool: ("true or false", "true or false"),
    int: ("an integer", "integers"),
    float: ("a finite number", "finite numbers"),
    str: ("a string", "strings"),
    Path: ("a path", "paths"),
    Any: ("anything", "anything"),
}


def _bounds(about: Sequence[Any]) -> str:
    """Return " from 2 to 100", " above 0 and at most 1", ... of the bounds among what is said about a number."""
    at_least = next((one.ge for one in about if isinstance(one, Ge)), None)
    at_most = next((one.le for one in about if isinstance(one, Le)), None)
    if at_least is not None and at_most is not None:
        return f" from {_number(at_least)} to {_number(at_most)}"
    parts = [] if at_least is None else [f"at least {_number(at_least)}"]
    parts += [f"above {_number(one.gt)}" for one in about if isinstance(one, Gt)]
    parts += [] if at_most is None else [f"at most {_number(at_most)}"]
    parts += [f"below {_number(one.lt)}" for one in about if isinstance(one, Lt)]
    return f" {'' if parts[0].startswith(('above', 'below')) else 'of '}{' and '.join(parts)}" if parts else ""


def _number(value: Any) -> str:
    power = value.bit_length() - 1 if isinstance(value, int) and value > 10**9 else 0
    for whole, rest in ((value, ""), (value + 1 if power else 0, " - 1")):
        if power and whole.bit_count() == 1:
            return f"2^{whole.bit_length() - 1}{rest}"
    return str(value) if isinstance(value, int) else f"{value:g}"


def _length(about: Sequence[Any], what: str) -> str:
    least = next((one.min_length for one in about if isinstance(one, MinLen)), 0)
    most = next((one.max_length for one in about if isinstance(one, MaxLen)), None)
    if least == 1 and most is None and what:
        return " that is not empty"
    parts = [f"at least {least}{what}"] if least else []
    parts += [] if most is None else [f"at most {most}{what}"]
    return f", {' and '.join(parts)}" if parts else ""


def _words_of(field: FieldInfo) -> str:
    return words(field.annotation, about=field.metadata)


def _sentence(model: type[Settings], error: ValidationError, table: Mapping[str, Any], heads: Sequence[str]) -> str:
    """Return what is wrong in one sentence, headed by the table that it is in.

    Args:
        model: of the whole table.
        error: of pydantic.
        table: as given.
        heads: how the whole table is headed, empty for the top level.
    """
    found = error.errors(include_url=False)
    # A misspelt key is what another one is missing for.
    first = next((one for one in found if one["type"] == "extra_forbidden"), found[0])
    place = _follow(model, table, first["loc"])
    path = [*heads, *place.path]
    if first["type"] == "extra_forbidden":
        allowed = ", ".join(sorted(_bare(place.kind).model_fields)) or "none"
        return f"{_heading(path)}unknown key {first['loc'][-1]!r}; allowed keys: {allowed}"
    if first["type"] == "value_error" and (not place.path or (_models(place.kind) and not place.inside)):
        return f"{_heading(path)}{first['ctx']['error']}"
    if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        key = first["ctx"]["discriminator"].strip("'")
        tags = ", ".join(repr(tag) for m, _ in _models(place.kind) for tag in get_args(m.model_fields[key].annotation))
        wrong = f"must be one of {tags}, got" if key in place.value else f"is missing; give one of {tags}"
        return f"{_heading(path)}{key} {wrong}" + (f" {_shown(place.value[key])}" if key in place.value else "")
    if isinstance(path[-1], int):  # no table in a list of tables
        path.pop()
    key = path.pop()
    if first["type"] == "value_error":
        return f"{_heading(path)}{key} {first['ctx']['error']}"
    if first["type"] == "missing" and not place.inside:
        return f"{_heading(path)}{key} is missing; give {place.words}"
    whole = first["type"] == "missing" or get_origin(_bare(place.kind)) in (Union, UnionType)
    return f"{_heading(path)}{key} must be {place.words}, got {_shown(place.value if whole else first['input'])}"


class _Place(NamedTuple):
    """Where in the tables an error is: keys and numbers up to it, type, value, words of that; if it is inside of it."""

    path: list[str | int]
    kind: Any
    value: Any
    words: str
    inside: bool


def _follow(kind: Any, value: Any, steps: Sequence[str | int]) -> _Place:
    """Go along the location that pydantic gives as far as it leads through tables."""
    path: list[str | int] = []
    told = ""
    for step in steps:
        bare = _bare(kind)
        if get_origin(bare) in (Union, UnionType) and _models(bare):
            # The tag of a union of tables, which is in no file.
            kind = next((m for m, _ in _models(bare) if step in _tags(m)), kind)
            continue
        if isinstance(bare, type) and issubclass(bare, Settings) and step in bare.model_fields:
            field = bare.model_fields[str(step)]
            kind, told = field.annotation, _words_of(field)
        elif get_origin(bare) in (dict, Mapping):
            kind = get_args(bare)[1]
            told = words(kind)
        elif get_origin(bare) in (list, tuple, Sequence) and _models(bare):
            kind = get_args(bare)[0]
        else:
            return _Place(path, kind, value, told, True)
        path.append(step)
        try:
            value = value[step]
        except (LookupError, TypeError):
            value = None
    return _Place(path, kind, value, told, False)


def _tags(model: type[Settings]) -> set[Any]:
    return {model.__name__, *(tag for field in model.model_fields.values() for tag in get_args(field.annotation))}


def _heading(path: Sequence[str | int]) -> str:
    """Return a table's name as the file heads it, and a blank: ``[methods.code] ``, ``[[rewards]] 2 ``."""
    names = [part for part in path if isinstance(part, str)]
    if not names:
        return ""
    if len(path) == 1 and names[0].startswith("["):
        return f"{names[0]} "
    dotted = ".".join([names[0].strip("[]"), *names[1:]])
    last = path[-1]
    return f"[[{dotted}]] {last + 1} " if isinstance(last, int) else f"[{dotted}] "


def _bare(kind: Any) -> Any:
    """Return a type without its annotations and without None."""
    if get_origin(kind) is Annotated:
        return _bare(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        parts = [part for part in get_args(kind) if part is not NoneType]
        return _bare(parts[0]) if len(parts) == 1 else Union[tuple(parts)]  # noqa: UP007
    return kind


def _models(kind: Any) -> list[tuple[type[Settings], str]]:
    """Return the models in a type, and how a key in them is written after the key's own name."""
    kind = _bare(kind)
    origin, parts = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and issubclass(kind, Settings):
        return [(kind, "")]
    if origin in (list, tuple, Sequence):
        return [(model, f"[]{form}") for model, form in _models(parts[0])]
    if origin in (dict, Mapping):
        return [(model, f".NAME{form}") for model, form in _models(parts[1])]
    if origin in (Union, UnionType):
        return [found for part in parts for found in _models(part)]
    return []


def _shown(value: Any) -> str:
    """Return a value for a message: what it is and, if short, itself."""
    if isinstance(value, Mapping | BaseModel):
        return "a table"
    text = repr(value) if not isinstance(value, bool) else str(value).lower()
    return text if len(text) <= 60 else f"{text[:57]}..."


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is None or value is PydanticUndefined or isinstance(value, BaseModel):
        return ""
    if value in (float("inf"), -float("inf")):
        return str(value)
    return json.dumps(value, ensure_ascii=False, default=str)


_ENTRY = re.compile(r"^ {4}(?P<names>\w+(?:, \w+)*): (?P<text>.*(?:\n {5,}.*)*)", re.MULTILINE)


def _documented(model: type) -> dict[str, str]:
    """Return what the docstrings of a class and of those it extends say of its fields."""
    told: dict[str, str] = {}
    for owner in reversed(model.__mro__):
        if issubclass(owner, Settings):
            for entry in _ENTRY.finditer(cleandoc(owner.__doc__ or "")):
                told |= dict.fromkeys(entry["names"].split(", "), entry["text"])
    return told
