"""`nextn demo`: train a small DeepSeek-V3 with MTP on the machine's own Python sources, decode, and report."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

import nextn
from nextn.cli.console import interruptible, messages, status
from nextn.cli.output import print_arms, print_evaluation
from nextn.config import Recipe, load_recipe
from nextn.errors import ConfigError
from nextn.evaluation.free_running import ARMS, acceptance_probe
from nextn.files import list_checkpoints, read_json, write_json
from nextn.model.device import resolve_device
from nextn.provenance import collect
from nextn.report.html import write_report
from nextn.report.run import report_of_run
from nextn.report.schema import to_table
from nextn.training import (
    PreparedData,
    Trainer,
    check_recipe,
    fit_vocabulary,
    new_model,
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


def demo(
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/demo"),
    minutes: Annotated[float | None, typer.Option(help="How long to train; 4 by default.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Change a setting; may be repeated.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed repeats of each decoding arm.")] = 3,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete what the run wrote and train anew.")] = False,
) -> None:
    """Train, decode losslessly, and write a report, in minutes on two CPU cores.

    Called again, it goes on where it was: an interrupted training is resumed, a finished one only measured again.

    Examples:

        nextn demo

        nextn demo --minutes 20 --out runs/longer

        nextn demo --fresh --set mtp.num_depths=1 --set mtp.share_weights=false
    """
    console = messages()
    if fresh and out.exists():
        _require_run(out)
    plan = None if fresh else _resume_plan(out, minutes, set_, console)
    if plan is None:
        plan = _plan(DEFAULT_MINUTES if minutes is None else minutes, set_ or (), console)
    if fresh:  # not before the plan has turned out well
        _delete_run(out)
    recipe, provenance, data = plan
    model = new_model(recipe, data.tokenizer)
    trainer = Trainer(
        recipe,
        model,
        data.train,
        data.validation,
        out,
        evaluate=acceptance_probe(data.validation, recipe.evaluation),
        provenance=provenance,
        console=console,
    )
    with interruptible(console, f"call nextn demo --out {out} again to go on from the last checkpoint"):
        result = trainer.train(resume=(out / "recipe.json").exists())
    print_evaluation(Console(), result.evaluation)

    trained = nextn.load(result.checkpoint)  # what is measured is what was written: the checkpoint, in float32
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("decoding", total=2 * repeats * len(ARMS))
        if not console.is_terminal:
            console.print("decoding held-out prompts, plain and speculative in turn")
        report = report_of_run(
            "nextn demo: a small DeepSeek-V3 with multi-token prediction",
            out,
            trained,
            recipe,
            data,
            provenance,
            num_repeats=repeats,
            progress=lambda: bar.advance(task),
        )
    write_json(out / "report.json", to_table(report))
    write_report(report, out / "report.html")
    print_arms(Console(), report.arms)
    console.print(f"report: {out / 'report.html'}")
    console.print(f"model:  {result.checkpoint}")
    console.print(f'try:    nextn generate {out} -p "def main(" --show-drafts')


def _plan(minutes: float, assignments: Sequence[str], console: Console) -> tuple[Recipe, dict[str, Any], PreparedData]:
    """A new run: the demo's recipe, as many steps as fit the minutes."""
    if not 0 < minutes <= MAX_MINUTES:
        raise ConfigError(f"--minutes must lie above 0 and be at most {MAX_MINUTES:g}, got {minutes:g}")
    if any(assignment.startswith("training.num_steps") for assignment in assignments):
        raise ConfigError("the demo sets training.num_steps from --minutes; for a fixed number use nextn train")
    recipe = load_recipe(DEMO_RECIPE, assignments)
    _require_measurable(recipe)
    check_recipe(recipe)
    device = resolve_device(recipe.training.device)
    with status(console) as say:
        data = prepare_data(recipe.data, say)
        recipe = fit_vocabulary(recipe, data.tokenizer)
        console.print(data.summary())
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
    return recipe, provenance, data


def _resume_plan(
    out: Path, minutes: float | None, assignments: Sequence[str] | None, console: Console
) -> tuple[Recipe, dict[str, Any], PreparedData] | None:
    """The plan of the run that is already in `out`, None if there is none."""
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
    provenance = read_json(out / "provenance.json")
    with status(console) as say:
        return recipe, provenance, prepare_data(recipe.data, say)


def _require_measurable(recipe: Recipe) -> None:
    """Raise ConfigError for settings with which there is nothing to decode, or nothing to time."""
    for name, minimum in (("num_prompts", 1), ("draft_length", 1), ("max_new_tokens", 2)):
        if getattr(recipe.evaluation, name) < minimum:
            raise ConfigError(
                f"the demo measures decoding, so evaluation.{name} must be at least {minimum}, got "
                f"{getattr(recipe.evaluation, name)}; nextn train has no such limit"
            )


def _require_run(out: Path) -> None:
    if not (out / "recipe.json").exists() and not list_checkpoints(out):
        raise ConfigError(f"--fresh deletes a run, and {out} does not look like one (no recipe.json)")


def _delete_run(out: Path) -> None:
    """Remove what a run and its report wrote into the folder, and nothing else."""
    for name in ("report.json", "report.html"):
        (out / name).unlink(missing_ok=True)
    remove_run(out)
