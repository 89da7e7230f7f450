"""Every setting of a recipe as data: name, default, values allowed and meaning, read off the dataclasses' fields."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from nextn.config.recipe import Recipe
from nextn.errors import ConfigError
from nextn.tables import hints_of, key_of, to_table

REQUIRED = "required"
"""Default of a setting that has none."""


@dataclass(frozen=True)
class SettingInfo:
    """A setting.

    Attributes:
        name: dotted, as `--set` takes it.
        default: the value where a recipe says nothing, as JSON has it; None is written "none" in a recipe.
        kind: the type, or the values allowed, in words.
        meaning: in one line, unit included.
    """

    name: str
    default: Any
    kind: str
    meaning: str


def list_settings(table: str = "", settings_class: Any = Recipe) -> tuple[SettingInfo, ...]:
    """The settings of a recipe, or of one of its tables, in their order; a table in a table is listed in its place.

    Args:
        table: dotted name of a table or of a single setting; empty: all of them.
        settings_class: the dataclass whose fields are the tables.

    Raises:
        ConfigError: no such table or setting; the message names the nearest.

    >>> [(info.name, info.default, info.kind) for info in list_settings("objective.detach.trunk")]
    [('objective.detach.trunk', False, 'true or false')]
    >>> [info.name for info in list_settings("objective.curriculum")][:2]
    ['objective.curriculum.kind', 'objective.curriculum.stages']
    """
    every = tuple(_settings_of(settings_class, _instance(settings_class), ""))
    found = tuple(info for info in every if not table or info.name == table or info.name.startswith(f"{table}."))
    if not found:
        known = table_names(settings_class)
        names = [*known, *(info.name for info in every)]
        nearest = difflib.get_close_matches(table, names, n=1, cutoff=0.6)
        same_key = [name for name in names if name.rpartition(".")[2] == table]
        way_out = f"did you mean {(same_key or nearest)[0]!r}? " if same_key or nearest else ""
        raise ConfigError(f"a recipe has no table or setting {table!r}; {way_out}Tables: {', '.join(known)}")
    return found


def table_names(settings_class: Any = Recipe) -> tuple[str, ...]:
    """Names of the tables of a recipe, without those inside of others."""
    hints = hints_of(settings_class)
    return tuple(name for name, hint in hints.items() if _table_class(hint) is not None)


def meaning_of_table(table: str, settings_class: Any = Recipe) -> str:
    """First line of the docstring of one of `table_names`."""
    found = _table_class(hints_of(settings_class)[table])
    return (found.__doc__ or "").partition("\n")[0]


def _settings_of(settings_class: Any, defaults: Any, prefix: str) -> Iterator[SettingInfo]:
    """Settings of a dataclass and of the tables below it; `defaults` is an instance, None where it has no defaults."""
    hints = hints_of(settings_class)
    for field in dataclasses.fields(settings_class):
        key = key_of(field.name)
        hint, name = hints[key], prefix + key
        default = _default_of(field) if defaults is None else getattr(defaults, field.name)
        below = _table_class(hint)
        if below is None:
            yield SettingInfo(name, _plain(default), _kind(hint), field.metadata.get("doc", ""))
        else:
            yield from _settings_of(below, default if isinstance(default, below) else _instance(below), f"{name}.")


def _default_of(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return REQUIRED if field.default is dataclasses.MISSING else field.default


def _instance(settings_class: Any) -> Any:
    """The settings with all their defaults; None where one has no default."""
    try:
        return settings_class()
    except (TypeError, ConfigError):  # a field without default, or defaults that contradict each other
        return None


def _table_class(hint: Any) -> Any:
    """The dataclass that a field holds, also where it may be None; None for other fields."""
    for kind in (hint, *typing.get_args(hint)) if _is_union(hint) else (hint,):
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            return kind
    return None


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _plain(value: Any) -> Any:
    """A default as JSON has it."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_table(value)
    return value


def _kind(hint: Any) -> str:
    """A type in words.

    >>> _kind(float | None), _kind(tuple[int, ...]), _kind(Literal["own", "shared"])
    ('number or none', 'list of whole numbers', 'own or shared')
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if _is_union(hint):
        return " or ".join("none" if kind is types.NoneType else _kind(kind) for kind in arguments)
    if origin is Literal:
        *first, last = map(str, arguments)
        return f"{', '.join(first)} or {last}" if first else last
    if origin is tuple:
        inner = _kind(arguments[0])
        plural = "lists" + inner[4:] if inner.startswith("list") else f"{inner}s"
        return f"list of {plural}"
    if origin is dict or (isinstance(hint, type) and dataclasses.is_dataclass(hint)):
        return "table"
    return {bool: "true or false", int: "whole number", float: "number", str: "text"}.get(hint, "value")
