"""What `nextn demo` trains: a new run of as many steps as fit the minutes, or the run that is already in the folder."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nextn.config import Recipe, load_recipe
from nextn.errors import ConfigError
from nextn.files import list_checkpoints, read_json
from nextn.model.device import resolve_device
from nextn.provenance import collect
from nextn.training import (
    PreparedData,
    check_recipe,
    fit_vocabulary,
    prepare_data,
    read_recipe,
    remove_run,
    time_steps,
    with_depths_on,
)

DEMO_RECIPE = Path(__file__).with_name("demo.toml")

DEFAULT_MINUTES = 4.0

MAX_MINUTES = 10_000.0
"""A week. Longer runs are for `nextn train`."""

MIN_STEPS = 40
"""A run is at least this long, however slow the machine."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class DemoPlan:
    """A run that is about to start or to go on.

    Attributes:
        recipe: with its number of steps.
        provenance: for a new run with `training_cost`, the seconds of a step with and without MTP.
        data: what it is trained on.
    """

    recipe: Recipe
    provenance: dict[str, Any]
    data: PreparedData


def plan_demo(
    minutes: float | None, assignments: Sequence[str], say: Say = lambda _: None, note: Say = lambda _: None
) -> DemoPlan:
    """A new run: the demo's recipe, as many steps as fit the minutes. Times a few steps.

    Args:
        minutes: how long to train; None: `DEFAULT_MINUTES`.
        assignments: TABLE.KEY=VALUE, changes of the recipe.
        say: called with a progress message before each slow step.
        note: called with the summary of the data, once they are read.

    Raises:
        ConfigError: minutes out of range, or settings with which there is nothing to measure.
    """
    minutes = DEFAULT_MINUTES if minutes is None else minutes
    if not 0 < minutes <= MAX_MINUTES:
        raise ConfigError(f"--minutes must lie above 0 and be at most {MAX_MINUTES:g}, got {minutes:g}")
    if any(assignment.startswith("training.num_steps") for assignment in assignments):
        raise ConfigError("the demo sets training.num_steps from --minutes; for a fixed number use nextn train")
    recipe = load_recipe(DEMO_RECIPE, assignments)
    _require_measurable(recipe)
    check_recipe(recipe)
    device = resolve_device(recipe.training.device)
    data = prepare_data(recipe.data, say)
    recipe = fit_vocabulary(recipe, data.tokenizer)
    note(data.summary())
    say("timing a few steps with and without MTP")
    depths = range(1, recipe.mtp.num_depths + 1)
    recipes = {
        "K = 0": replace(recipe, mtp=replace(recipe.mtp, num_depths=0)),
        # At full weight, since a schedule may have depths off in a run's first steps.
        f"K = {len(depths)}": with_depths_on(recipe, depths),
    }
    seconds = time_steps(recipes, data)
    plain_s, mtp_s = (statistics.median(seconds[name]) for name in ("K = 0", f"K = {len(depths)}"))
    num_steps = max(MIN_STEPS, round(minutes * 60 / mtp_s))
    recipe = replace(recipe, training=replace(recipe.training, num_steps=num_steps))
    provenance = collect(seed=recipe.training.seed, device=device, corpus=data.provenance())
    provenance["training_cost"] = {
        "plain_step_s": plain_s,
        "mtp_step_s": mtp_s,
        "mtp_time_overhead": mtp_s / plain_s - 1,
    }
    return DemoPlan(recipe, provenance, data)


def resume_demo(
    out: Path, minutes: float | None, assignments: Sequence[str], say: Say = lambda _: None
) -> DemoPlan | None:
    """The plan of the run that is already in `out`, None if there is none.

    Raises:
        ConfigError: `minutes` or `assignments` are given, which cannot change a run; or the folder is no whole run.
    """
    if not (out / "recipe.json").exists():
        if list_checkpoints(out):
            raise ConfigError(
                f"{out} holds checkpoints but no recipe.json; add --fresh (which deletes them) or choose another --out"
            )
        return None
    if assignments or minutes is not None:
        raise ConfigError(
            f"{out} already holds a run, which --set and --minutes cannot change; add --fresh (which deletes it) or "
            "choose another --out"
        )
    recipe = read_recipe(out / "recipe.json")
    _require_measurable(recipe)
    return DemoPlan(recipe, read_json(out / "provenance.json"), prepare_data(recipe.data, say))


def require_demo(out: Path) -> None:
    """Raise ConfigError for a folder that is there and does not look like a run: it is not ours to delete from."""
    if out.exists() and not (out / "recipe.json").exists() and not list_checkpoints(out):
        raise ConfigError(f"--fresh deletes a run, and {out} does not look like one (no recipe.json)")


def delete_demo(out: Path) -> None:
    """Remove the files that a run and its report wrote into the folder, and nothing else."""
    for name in ("report.json", "report.html"):
        (out / name).unlink(missing_ok=True)
    remove_run(out)


def _require_measurable(recipe: Recipe) -> None:
    """Raise ConfigError for settings with which there is nothing to decode, or nothing to time."""
    for name, minimum in (("num_prompts", 1), ("draft_length", 1), ("max_new_tokens", 2)):
        if getattr(recipe.evaluation, name) < minimum:
            raise ConfigError(
                f"the demo measures decoding, so evaluation.{name} must be at least {minimum}, got "
                f"{getattr(recipe.evaluation, name)}; nextn train has no such limit"
            )
