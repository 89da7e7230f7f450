"""Fields with a meaning, and range checks, for the dataclasses of settings."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from nextn.errors import ConfigError


def setting(default: Any, doc: str) -> Any:
    """A dataclass field with a default and a one-line meaning (unit included), which reports show."""
    return field(default=default, metadata={"doc": doc})


def require(settings: Any, table: str, minimum: float, *names: str) -> None:
    """Raise ConfigError unless the named fields are at least `minimum` (None is left alone)."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value >= minimum:
            raise ConfigError(f"{table}.{name} must be at least {minimum:g}, got {value:g}")
