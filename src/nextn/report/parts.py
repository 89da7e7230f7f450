"""Makes the parts that all pages share: templates, colours, and the rows of a recipe's settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from nextn.tables import hints_of, key_of
from nextn.wording import count, duration, fixed, percent, plain, plural, visible

# Depth 0 is drawn in ink. Depths 1..n take colours along these ramps, in which hue and lightness both change, so that
# the order shows without colour vision too.
_DEPTH_RAMP = {"light": ("#0f7ba8", "#3462cf", "#6d2fa3"), "dark": ("#8fe0ff", "#74a5ff", "#b48cf5")}
_ARM_COLOURS = {
    "light": ("#c2410c", "#0b7a5e", "#8a6a00", "#475569", "#3462cf", "#a21caf", "#0e7490", "#be123c"),
    "dark": ("#ff9d66", "#4fd0a5", "#e3c04b", "#a9b4c4", "#74a5ff", "#e58cf0", "#5fd6e8", "#ff8aa3"),
}
_TINT_OPACITY = {"light": (0.16, 0.30), "dark": (0.24, 0.42)}  # of the first and the last depth


def template(name: str, package: str = "nextn.report") -> jinja2.Template:
    """A page's template, from the package it belongs to; it may include those of `nextn.report`.

    Whatever is filled in is escaped.
    """
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(place, ".") for place in (package, "nextn.report")]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent, "fixed": fixed, "count": count, "duration": duration, "plural": plural,
        "visible": visible,
    }  # fmt: skip
    return environment.get_template(name)


def settings_rows(table: Mapping[str, Any], kind: Any, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(name, value, meaning) of every setting; the meaning comes from the settings class, empty for a key it lacks."""
    hints = hints_of(kind)
    meanings = {key_of(field.name): field.metadata.get("doc", "") for field in dataclasses.fields(kind)}
    for key, value in table.items():
        hint = hints.get(key)
        if isinstance(value, Mapping) and dataclasses.is_dataclass(hint):
            yield from settings_rows(value, hint, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", plain(value), meanings.get(key, "")


def colours(num_depths: int) -> dict[str, Markup]:
    """CSS variables of a page's colours, by theme."""
    return {theme: _colours(theme, num_depths) for theme in _DEPTH_RAMP}


def _colours(theme: str, num_depths: int) -> Markup:
    """CSS variables of one theme: `--depth-k`, `--tint-k` (background of a token from depth k) and `--arm-i`."""
    first, last = _TINT_OPACITY[theme]
    lines = ["--depth-0: var(--ink);"]
    for depth in range(1, num_depths + 1):
        along = (depth - 1) / max(1, num_depths - 1)
        red, green, blue = _interpolate(_DEPTH_RAMP[theme], along)
        lines.append(f"--depth-{depth}: rgb({red} {green} {blue});")
        lines.append(f"--tint-{depth}: rgb({red} {green} {blue} / {first + along * (last - first):.2f});")
    lines += [f"--arm-{index}: {colour};" for index, colour in enumerate(_ARM_COLOURS[theme])]
    return Markup(" ".join(lines))


def _interpolate(ramp: Sequence[str], along: float) -> tuple[int, ...]:
    place = along * (len(ramp) - 1)
    index = min(int(place), len(ramp) - 2)
    left, right = (tuple(bytes.fromhex(colour[1:])) for colour in ramp[index : index + 2])
    return tuple(round(a + (place - index) * (b - a)) for a, b in zip(left, right, strict=True))
