"""Reads the files of a study's runs and computes its result."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nextn.config import Recipe
from nextn.errors import CheckpointError, ConfigError
from nextn.files import read_json
from nextn.mtp.cost import active_depths_by_step, training_flops
from nextn.provenance import collect
from nextn.study.claims import judge
from nextn.study.compare import compare_all
from nextn.study.definition import LoadedStudy, Variant
from nextn.study.evaluate import RunMetrics
from nextn.study.jobs import Job
from nextn.study.ladder import reach_targets
from nextn.study.plan import recipe_as_begun
from nextn.study.results import CurvePoint, RunResult, StudyResult, VariantFacts
from nextn.study.speeds import NUM_TIMING_RUNS, Speeds
from nextn.study.worker import TRAINED
from nextn.tables import flattened, from_table, to_table
from nextn.training import read_metrics


def collect_result(
    loaded: LoadedStudy,
    recipes: Mapping[str, Recipe],
    jobs: Sequence[Job],
    speeds: Speeds,
    corpora: Mapping[str, Any],
) -> StudyResult:
    """Read what all jobs left, compare the variants and judge the claims.

    Raises CheckpointError when a run's files are damaged.
    """
    study = loaded.study
    whole = [job for job in jobs if job.divergence() is None]
    runs = tuple(_run_result(job, recipes[job.run.variant], speeds) for job in whole)
    runs = tuple(_with_draft_model(run, loaded, runs) for run in runs)
    variants = tuple(_facts(given, recipes[given.name], speeds) for given in loaded.variants)
    overheads = _overheads(loaded, recipes, speeds)
    comparisons = compare_all(runs, variants, loaded.baseline.name, study.seeds, overheads)
    return StudyResult(
        name=loaded.name,
        title=study.title,
        question=study.question,
        scale=loaded.scale,
        baseline=loaded.baseline.name,
        seeds=study.seeds,
        variants=variants,
        runs=runs,
        comparisons=comparisons,
        targets=reach_targets(runs, study.target_losses),
        claims=tuple(judge(claim, comparisons, loaded.baseline.name) for claim in study.claims),
        notes=(*_notes(loaded, recipes), *_warnings(jobs)),
        base_recipe=to_table(loaded.recipes[loaded.baseline.name]),
        evaluation=to_table(study.evaluation),
        provenance=_provenance(whole, corpora),
    )


def _facts(given: Variant, recipe: Recipe, speeds: Speeds) -> VariantFacts:
    changes = dict(flattened(given.changes))
    return VariantFacts(given.name, changes, given.against, _rounded(speeds.mean_step_s(given.name, recipe)))


def _run_result(job: Job, recipe: Recipe, speeds: Speeds) -> RunResult:
    """One run from its files; `recipe` is its variant's, vocabulary size filled in."""
    run = job.run
    recipe = replace(recipe, training=run.recipe.training)
    recipe_as_begun(recipe, job.folder)
    measured = _measures(Path(job.spec.metrics))
    curve = _curve(job.folder / "metrics.jsonl", recipe, run.variant, speeds)
    if run.ladder is not None:
        values = {"loss": measured.values["loss"]}
    else:
        end = curve[-1]
        values = measured.values | {
            "training_tok_per_s": end.num_tokens / end.training_s,
            "training_flops": end.flops,
            "peak_memory_bytes": float(_table(job.folder / TRAINED)["peak_memory_bytes"]),
            **_expert_loads(job.folder / "metrics.jsonl"),
        }
    return RunResult(
        id=run.id,
        variant=run.variant,
        seed=run.seed,
        ladder=run.ladder,
        curve=curve,
        values={name: _rounded(value) for name, value in values.items()},
        loss_by_position=tuple(map(_rounded, measured.loss_by_position)),
        num_by_position=measured.num_by_position,
    )


def _rounded(value: float) -> float:
    """Round to eight significant digits, more than float32 holds and than any page shows; whole numbers stay exact.

    >>> _rounded(1.346903491536646), _rounded(18204755755008.0)
    (1.3469035, 18204755755008.0)
    """
    return value if value == int(value) else float(f"{value:.8g}")


def _expert_loads(metrics: Path) -> dict[str, float]:
    """Load of the busiest expert relative to the mean at the end of a run, mean over layers; empty without experts."""
    last = [record for record in read_metrics(metrics) if record["kind"] == "train"][-1]
    loads: dict[str, list[float]] = {}
    for layer, load in last["expert_load_max_over_mean"].items():
        loads.setdefault("expert_load_mtp" if layer.startswith("scheme.") else "expert_load_trunk", []).append(load)
    return {name: statistics.fmean(values) for name, values in loads.items()}


def _measures(path: Path) -> RunMetrics:
    try:
        return from_table(RunMetrics, _table(path))
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}; delete it, and the same command evaluates again") from None


def _table(path: Path) -> dict[str, Any]:
    table = read_json(path)
    if not isinstance(table, dict):
        raise CheckpointError(f"{path} does not hold a table; delete it, and the same command evaluates again")
    return table


def _curve(metrics: Path, recipe: Recipe, variant: str, speeds: Speeds) -> tuple[CurvePoint, ...]:
    """The evaluations of a run, with what its training had cost by then."""
    flops = training_flops(recipe)
    training_s = list(itertools.accumulate(speeds.step_s(variant, depths) for depths in active_depths_by_step(recipe)))
    evaluations = [record for record in read_metrics(metrics) if record["kind"] == "evaluation"]
    if not evaluations or evaluations[-1]["step"] != recipe.training.num_steps:
        raise CheckpointError(f"{metrics} lacks evaluations of its run; delete {metrics.parent} to train it again")
    return tuple(
        CurvePoint(
            step=record["step"],
            num_tokens=record["num_tokens"],
            flops=flops[record["step"] - 1],
            training_s=_rounded(training_s[record["step"] - 1]),
            loss=_rounded(record["loss_per_depth"][0]),
        )
        for record in evaluations
    )


def _with_draft_model(run: RunResult, loaded: LoadedStudy, runs: Sequence[RunResult]) -> RunResult:
    """The run with what its draft model cost besides, if it has one."""
    name = _variant(loaded, run.variant).draft_model
    if not name or run.ladder is not None:
        return run
    draft = next(other for other in runs if (other.variant, other.seed, other.ladder) == (name, run.seed, None))
    extra = draft.curve[-1]
    curve = tuple(
        replace(point, flops=point.flops + extra.flops, training_s=_rounded(point.training_s + extra.training_s))
        for point in run.curve
    )
    peaks = (run.values["peak_memory_bytes"], draft.values["peak_memory_bytes"])
    values = run.values | {
        "training_flops": curve[-1].flops,
        "training_tok_per_s": _rounded(curve[-1].num_tokens / curve[-1].training_s),
        "peak_memory_bytes": max(peaks),
    }
    return replace(run, curve=curve, values=values)


def _overheads(
    loaded: LoadedStudy, recipes: Mapping[str, Recipe], speeds: Speeds
) -> dict[str, dict[str, tuple[float, ...]]]:
    """Samples of the overheads of every variant over its baseline. A draft model's cost is its target's too.

    FLOPs are exact, so their two samples are equal.
    """

    def relative_times(name: str) -> list[float]:
        times = [1 + overhead for overhead in speeds.overheads(name, recipes[name])]
        draft = _variant(loaded, name).draft_model
        if not draft:
            return times
        share = recipes[draft].training.num_steps / recipes[name].training.num_steps
        return [a + share * b for a, b in zip(times, relative_times(draft), strict=True)]

    overheads: dict[str, dict[str, tuple[float, ...]]] = {"time_overhead": {}, "flops_overhead": {}}
    for given in loaded.variants:
        name, baseline = given.name, given.against or loaded.baseline.name
        ratios = zip(relative_times(name), relative_times(baseline), strict=True)
        overheads["time_overhead"][name] = tuple(_rounded(a / b - 1) for a, b in ratios)
        flops = _rounded(_flops_per_step(loaded, recipes, name) / _flops_per_step(loaded, recipes, baseline) - 1)
        overheads["flops_overhead"][name] = (flops, flops)
    return overheads


def _variant(loaded: LoadedStudy, name: str) -> Variant:
    return next(given for given in loaded.variants if given.name == name)


def _flops_per_step(loaded: LoadedStudy, recipes: Mapping[str, Recipe], name: str) -> float:
    """Mean over a variant's run, its draft model's training included."""
    recipe, draft = recipes[name], _variant(loaded, name).draft_model
    flops = training_flops(recipe)[-1] + (training_flops(recipes[draft])[-1] if draft else 0)
    return flops / recipe.training.num_steps


def _notes(loaded: LoadedStudy, recipes: Mapping[str, Recipe]) -> tuple[str, ...]:
    """What a reader must know to judge the figures."""
    study = loaded.study
    notes = [
        f"{len(study.seeds)} seeds. A variant is compared with the baseline's run of the same seed, which begins with "
        "the same weights of the trunk and reads the same text in the same order; intervals are 95%, by Student's t.",
        "Times are those of training steps measured in turn with the baseline's on one machine, not the runs' own. "
        f"Their scatter over {NUM_TIMING_RUNS} timing runs is in the interval of the time overhead, not in that of "
        "effective speedup.",
        "Every interval stands for itself: of twenty variants that change nothing, one will look resolved.",
    ]
    baseline = recipes[loaded.baseline.name]
    if others := [name for name, recipe in recipes.items() if _num_tokens(recipe) != _num_tokens(baseline)]:
        notes.append(f"Not trained on as many tokens as the baseline: {', '.join(others)}.")
    if others := [name for name, recipe in recipes.items() if recipe.model != baseline.model]:
        notes.append(f"Whose trunk differs from the baseline's, so that seeds give other weights: {', '.join(others)}.")
    if len(study.seeds) < 3:
        notes.append("Fewer than three seeds: intervals are very wide, and most differences cannot be resolved.")
    if study.ladder:
        multiples = ", ".join(f"{multiple:g}" for multiple in sorted({*study.ladder, 1.0}))
        notes.append(
            f"What the baseline would do with another budget is read between baselines trained from start to end at "
            f"{multiples} times its length, each with its own learning-rate schedule."
        )
    if study.target_losses:
        notes.append(
            "Steps and time to given losses are read from each run's own curve, whose learning rate is that of the "
            "whole run."
        )
    return tuple(notes)


def _num_tokens(recipe: Recipe) -> int:
    return recipe.training.num_steps * recipe.training.batch_size * recipe.data.sequence_length


def _warnings(jobs: Sequence[Job]) -> list[str]:
    """Runs that are missing, and runs that were not trained alike."""
    lost = {(job.run.variant, job.run.seed): message for job in jobs if (message := job.divergence()) is not None}
    warnings = [f"Left out: {variant}, seed {seed}: {message}" for (variant, seed), message in lost.items()]
    machines = {json.dumps(_machine(job), sort_keys=True) for job in jobs if job.divergence() is None}
    if len(machines) > 1:
        warnings.append("Warning: not all runs were trained on the same hardware: " + " and ".join(sorted(machines)))
    return warnings


def _machine(job: Job) -> dict[str, Any]:
    """Processor and device that a run was trained on."""
    machine = _table(job.folder / "provenance.json")["machine"]
    return {"cpu": machine["cpu"], "device": machine["device"]}


def _provenance(jobs: Sequence[Job], corpora: Mapping[str, Any]) -> dict[str, Any]:
    """Of this result, and of the runs that it rests on."""
    trained = [_table(job.folder / "provenance.json") for job in jobs]
    commits = sorted({str(run["nextn"]["commit"]) for run in trained})
    first = trained[0]["machine"] if trained else {}
    return collect(seed=jobs[0].run.seed if jobs else 0, corpus=corpora) | {
        "trained_with": {"commits": commits, "machine": first, "num_runs": len(trained)}
    }
