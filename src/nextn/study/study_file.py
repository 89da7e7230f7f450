"""Writes a study's result as one compact JSON file, and reads it back.

The file holds what the page is rendered from. Comparisons follow from the runs and from the samples of the overheads,
so they are left out and computed again. Runs of one variant and length stand together, seed by seed: they share steps,
tokens, FLOPs, seconds and the number of labels by position, and each metric is a list with one value a seed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from nextn import files
from nextn.study.compare import compare_all
from nextn.study.results import ClaimResult, CurvePoint, RunResult, StudyResult, TargetReached, VariantFacts
from nextn.tables import from_table, to_table

MAX_LINE = 2000
"""Longest list or table, in characters of JSON, that stands on one line."""


@dataclass(frozen=True)
class _Runs:
    """Runs of one variant and length, one a seed.

    Attributes:
        variant, ladder: as in `RunResult`.
        seeds, ids: of the runs.
        step, num_tokens, flops, training_s: at every evaluation; the same for all seeds.
        num_by_position: as in `RunResult`; the same for all seeds.
        loss: at every evaluation, by seed.
        values: by metric and seed; None for a seed that lacks it.
        loss_by_position: as in `RunResult`, by seed.
    """

    variant: str
    ladder: float | None
    seeds: tuple[int, ...]
    ids: tuple[str, ...]
    step: tuple[int, ...]
    num_tokens: tuple[int, ...]
    flops: tuple[float, ...]
    training_s: tuple[float, ...]
    num_by_position: tuple[int, ...]
    loss: tuple[tuple[float, ...], ...]
    values: dict[str, tuple[float | None, ...]]
    loss_by_position: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class _File:
    """A study's result as it is written: `StudyResult`, but for its runs and comparisons."""

    name: str
    title: str
    question: str
    scale: str
    baseline: str
    seeds: tuple[int, ...]
    variants: tuple[VariantFacts, ...]
    runs: tuple[_Runs, ...]
    overheads: dict[str, dict[str, tuple[float, ...]]]
    targets: tuple[TargetReached, ...]
    claims: tuple[ClaimResult, ...]
    notes: tuple[str, ...]
    base_recipe: dict[str, Any]
    evaluation: dict[str, Any]
    provenance: dict[str, Any]


def write_json(result: StudyResult, path: Path) -> None:
    """Write a whole study; `read_json` gives back an equal one.

    JSON has no tuples: inside `changes`, `base_recipe`, `evaluation` and `provenance` they become lists. Runs come back
    seed by seed, as `plan_runs` lists them, and comparisons as `compare_all` makes them.

    Raises:
        CheckpointError: the file cannot be written.
    """
    groups: dict[tuple[Any, ...], list[RunResult]] = {}
    for run in result.runs:
        costs = tuple((point.step, point.num_tokens, point.flops, point.training_s) for point in run.curve)
        groups.setdefault((run.variant, run.ladder, costs, run.num_by_position), []).append(run)
    overheads: dict[str, dict[str, tuple[float, ...]]] = {}
    for one in result.comparisons:
        if not one.seeds:
            overheads.setdefault(one.metric, {})[one.variant] = one.values
    same = {field.name: getattr(result, field.name) for field in fields(_File) if hasattr(result, field.name)}
    written = _File(**same | {"runs": tuple(map(_together, groups.values())), "overheads": overheads})
    table = to_table(written)
    table |= {name: _plain_numbers(table[name]) for name in ("runs", "overheads")}
    files.write_text(path, _json(table) + "\n")


def read_json(path: Path) -> StudyResult:
    """Read what `write_json` wrote.

    Raises:
        CheckpointError: the file is missing or is not JSON.
        ConfigError: it is no study, or one of another version: a key is missing or unknown.
    """
    read = from_table(_File, files.read_json(path), str(path))
    runs = tuple(_apart(read.runs, read.seeds))
    comparisons = compare_all(runs, read.variants, read.baseline, read.seeds, read.overheads)
    same = {field.name: getattr(read, field.name) for field in fields(StudyResult) if hasattr(read, field.name)}
    return StudyResult(**same | {"runs": runs, "comparisons": comparisons})


def _together(runs: Sequence[RunResult]) -> _Runs:
    """Return runs of one variant, length and cost as one table."""
    curve = runs[0].curve
    names = dict.fromkeys(name for run in runs for name in run.values)
    return _Runs(
        variant=runs[0].variant,
        ladder=runs[0].ladder,
        seeds=tuple(run.seed for run in runs),
        ids=tuple(run.id for run in runs),
        step=tuple(point.step for point in curve),
        num_tokens=tuple(point.num_tokens for point in curve),
        flops=tuple(point.flops for point in curve),
        training_s=tuple(point.training_s for point in curve),
        num_by_position=runs[0].num_by_position,
        loss=tuple(tuple(point.loss for point in run.curve) for run in runs),
        values={name: tuple(run.values.get(name) for run in runs) for name in names},
        loss_by_position=tuple(run.loss_by_position for run in runs),
    )


def _apart(groups: Sequence[_Runs], seeds: Sequence[int]) -> Iterator[RunResult]:
    """Yield the runs of all groups, seed by seed."""
    for seed in seeds:
        for group in groups:
            for index in [index for index, other in enumerate(group.seeds) if other == seed]:
                costs = zip(group.step, group.num_tokens, group.flops, group.training_s, strict=True)
                values = {name: by_seed[index] for name, by_seed in group.values.items()}
                yield RunResult(
                    id=group.ids[index],
                    variant=group.variant,
                    seed=seed,
                    ladder=group.ladder,
                    curve=tuple(
                        CurvePoint(*cost, loss=loss) for cost, loss in zip(costs, group.loss[index], strict=True)
                    ),
                    values={name: value for name, value in values.items() if value is not None},
                    loss_by_position=group.loss_by_position[index],
                    num_by_position=group.num_by_position,
                )


def _plain_numbers(value: Any) -> Any:
    """Return whole floats as integers, which JSON writes without `.0`; reading makes them floats again."""
    if isinstance(value, dict):
        return {key: _plain_numbers(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_numbers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _json(value: Any, indent: str = "") -> str:
    """Return JSON whose short lists and tables stand on one line each.

    >>> print(_json({"a": [1, 2], "b": {}}))
    {"a":[1,2],"b":{}}
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    if len(text) <= MAX_LINE or not isinstance(value, dict | list):
        return text
    inner = indent + " "
    if isinstance(value, dict):
        parts = [f"{json.dumps(key)}:{_json(item, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(inner + part for part in parts) + f"\n{indent}}}"
    return "[\n" + ",\n".join(inner + _json(item, inner) for item in value) + f"\n{indent}]"
