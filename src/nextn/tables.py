"""Frozen dataclasses from nested tables (TOML, JSON) and back, checked strictly.

An unknown key is an error that names the nearest known one; a value of another type is one that names the type wanted.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

from nextn.errors import ConfigError

Table = TypeVar("Table")


def override(table: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """A copy of `table` with `a.b=c` assignments applied; values are TOML, bare words are strings.

    >>> override({"data": {"corpus": "x"}}, ["data.corpus=y", "training.seed=3"])
    {'data': {'corpus': 'y'}, 'training': {'seed': 3}}
    """
    result = {key: dict(value) if isinstance(value, Mapping) else value for key, value in table.items()}
    for assignment in assignments:
        name, separator, text = assignment.partition("=")
        if not separator or not name.strip():
            raise ConfigError(f"--set takes table.key=value, got {assignment!r}")
        *tables, key = name.strip().split(".")
        target: dict[str, Any] = result
        for part in tables:
            target = target.setdefault(part, {})
            if not isinstance(target, dict):
                raise ConfigError(f"--set {assignment}: {part} is a value, not a table")
        target[key] = _toml_value(text.strip())
    return result


def overlaid(table: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of nested tables with the values of others, of any depth, put over them.

    >>> overlaid({"mtp": {"num_depths": 1, "scheme": "sequential"}}, {"mtp": {"num_depths": 3}})
    {'mtp': {'num_depths': 3, 'scheme': 'sequential'}}
    """
    result = dict(table)
    for key, value in changes.items():
        old = result.get(key)
        result[key] = overlaid(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def from_table(settings_class: type[Table], table: Mapping[str, Any], where: str = "") -> Table:
    """Build a settings dataclass from a (nested) mapping, checking every key and type.

    The word "none" stands for None, which TOML lacks. Raises ConfigError naming the full key, and for an unknown one
    the nearest key of its table and the other tables that have it.
    """
    homes: dict[str, list[str]] = {}
    for name, key in _keys(settings_class, where):
        homes.setdefault(key, []).append(name)
    return _build(settings_class, table, where, homes)


def _keys(settings_class: Any, where: str) -> Iterator[tuple[str, str]]:
    """(name of the table, key) of every setting in a dataclass and in the tables below it."""
    for key, hint in hints_of(settings_class).items():
        yield where, key
        if dataclasses.is_dataclass(hint):
            yield from _keys(hint, f"{where}.{key}" if where else key)


def _build(settings_class: type[Table], table: Mapping[str, Any], where: str, homes: Mapping[str, list[str]]) -> Table:
    hints = hints_of(settings_class)
    fields = {key_of(field.name): field.name for field in dataclasses.fields(settings_class)}  # type: ignore[arg-type]
    values = {}
    for key, value in table.items():
        name = f"{where}.{key}" if where else key
        if key not in hints:
            nearest = difflib.get_close_matches(key, hints, n=1, cutoff=0.6)
            elsewhere = " and ".join(f"[{home}]" if home else "the recipe itself" for home in homes.get(key, ()))
            ways_out = [f"did you mean {nearest[0]!r}?"] if nearest else []
            ways_out += [f"{key} is a setting of {elsewhere}."] if elsewhere else []
            known = f"{'[' + where + ']' if where else 'A recipe'} knows: {', '.join(sorted(hints))}"
            raise ConfigError(f"unknown setting {name!r}; {' '.join([*ways_out, known])}")
        values[fields[key]] = _convert(value, hints[key], name, homes)
    if missing := sorted(_required(settings_class) - values.keys()):
        raise ConfigError(
            f"{where or 'the table'} lacks {', '.join(missing)}: written by another version of nextn, or cut short"
        )
    return settings_class(**values)


def _required(settings_class: Any) -> set[str]:
    """Fields without a default."""
    return {
        field.name
        for field in dataclasses.fields(settings_class)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }


def _convert(value: Any, kind: Any, name: str, homes: Mapping[str, list[str]]) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} is a table, got {value!r}")
        return _build(kind, value, name, homes)
    if origin in (typing.Union, types.UnionType):
        if value is None or value == "none":
            return None
        return _convert(value, next(a for a in arguments if a is not types.NoneType), name, homes)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{name} must be one of {', '.join(map(str, arguments))}, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{name} must be a list, got {value!r}")
        if arguments[-1] is not Ellipsis and len(value) != len(arguments):
            raise ConfigError(f"{name} must have {len(arguments)} values, got {value!r}")
        return tuple(_convert(item, arguments[0], f"{name}[{index}]", homes) for index, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} must be a table, got {value!r}")
        return {key: _convert(item, arguments[1], f"{name}.{key}", homes) for key, item in value.items()}
    if kind is Any:
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name} must be a finite number, got {value}")
    if type(value) is not kind:
        raise ConfigError(f"{name} must be {kind.__name__}, got {value!r} ({type(value).__name__})")
    return value


def key_of(field: str) -> str:
    """The key of a field: its name, without the underscore behind what is a word of Python (`from_`)."""
    return field.removesuffix("_")


def hints_of(settings_class: Any) -> dict[str, Any]:
    """Type of every setting of a dataclass, by key."""
    return {key_of(name): hint for name, hint in typing.get_type_hints(settings_class).items()}


def to_table(settings: Any) -> dict[str, Any]:
    """A settings dataclass as plain nested dictionaries; `from_table` reads it back to an equal one."""
    return dataclasses.asdict(settings, dict_factory=lambda pairs: {key_of(name): value for name, value in pairs})


def flattened(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every leaf of a nested table; an empty table is a leaf.

    >>> dict(flattened({"a": {"b": 1, "c": {}}, "d": [2]}))
    {'a.b': 1, 'a.c': {}, 'd': [2]}
    """
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
