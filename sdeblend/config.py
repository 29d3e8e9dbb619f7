"""Settings from a TOML file, checked key by key before anything is computed.

A table is described by a mapping from each key to (kind, default). A kind is ``bool``, ``int``, ``float``
(an integer will do, infinity and nan will not), ``str``, ``dict`` (a table), ``list[kind]``, a union
``kind | kind``, or ``Literal["a", "b"]``. The default ``REQUIRED`` means that there is none.

Source: TOML 1.0.0.
"""

from __future__ import annotations

import copy
import os
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Final, Literal, Union, get_args, get_origin

REQUIRED: Final = object()
Kind = Any  # what `float | list[float]` or `Literal["a"]` is to a type checker
Spec = Mapping[str, tuple[Kind, Any]]

_NAMES = {
    bool: ("true or false", "true or false"),
    int: ("an integer", "integers"),
    float: ("a finite number", "finite numbers"),
    str: ("a string", "strings"),
    dict: ("a table", "tables"),
}


def load_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a TOML file.

    Args:
        path: The file.

    Returns:
        Its top-level table.

    Raises:
        ValueError: If it is not UTF-8 text or not TOML; names the file, and line and column.
        OSError: If it cannot be read.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid TOML: {error}; correct it there") from error


def check_keys(
    table: Mapping[str, Any], spec: Spec, *, file: str | os.PathLike[str], section: str = ""
) -> dict[str, Any]:
    """Return the settings of one table with defaults filled in, refusing what the spec does not allow.

    Args:
        table: The table as read.
        spec: Key -> (kind, default); see the module's docstring.
        file: The file it came from, for messages.
        section: How the table is headed there (``"[blend]"``, ``"[[rewards]] 2"``), for messages; empty for
            the top level.

    Returns:
        Exactly the keys of ``spec``, in its order; integers given for ``float`` converted.

    Raises:
        ValueError: For an unknown key, a missing required key or a value of another kind; names the file,
            the table, the key, and what is allowed.
    """
    where = f"{file}: {section} " if section else f"{file}: "
    for key in table:
        if key not in spec:
            allowed = ", ".join(sorted(spec)) or "none"
            raise ValueError(f"{where}unknown key {key!r}; allowed keys: {allowed}")
    settings: dict[str, Any] = {}
    for key, (kind, default) in spec.items():
        if key in table:
            try:
                settings[key] = _converted(table[key], kind)
            except ValueError as error:
                raise ValueError(f"{where}{key} must be {describe(kind)}, got {error}") from None
        elif default is REQUIRED:
            raise ValueError(f"{where}{key} is missing; give {describe(kind)}")
        else:
            settings[key] = copy.deepcopy(default)
    return settings


def describe(kind: Kind, *, plural: bool = False) -> str:
    """Return a kind in words: ``list[float]`` is "a list of finite numbers".

    Args:
        kind: As in a spec.
        plural: Whether to name several of it.

    Returns:
        The words.
    """
    origin: Any = get_origin(kind)
    parts = get_args(kind)
    if origin is list:
        return f"{'lists' if plural else 'a list'} of {describe(parts[0], plural=True)}"
    if origin in (Union, UnionType):
        return " or ".join(describe(part, plural=plural) for part in parts)
    if origin is Literal:
        return f"{'any' if plural else 'one'} of " + ", ".join(repr(part) for part in parts)
    return _NAMES[kind][plural]


def _converted(value: Any, kind: Kind) -> Any:
    """Return ``value`` as ``kind``, or raise a ValueError that says what was given instead."""
    origin: Any = get_origin(kind)
    parts = get_args(kind)
    if origin is list:
        if isinstance(value, list):
            return [_converted(item, parts[0]) for item in value]
    elif origin in (Union, UnionType):
        for part in parts:
            try:
                return _converted(value, part)
            except ValueError:
                continue
    elif origin is Literal:
        if any(type(value) is type(part) and value == part for part in parts):
            return value
    elif kind is float:
        # A bool is an int to Python and never a number to a reader of TOML.
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
            return float(value)
    elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise ValueError(_shown(value))


def _shown(value: Any) -> str:
    """Return a value for a message: what it is and, if short, itself."""
    if isinstance(value, dict):
        return "a table"
    text = repr(value) if not isinstance(value, bool) else str(value).lower()
    return text if len(text) <= 60 else f"{text[:57]}..."
