"""`nextn demo`: train a small DeepSeek-V3 with MTP on the machine's own Python sources, decode, and report."""

from __future__ import annotations

import importlib.resources
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress

import nextn
from nextn.checkpoint import read_json, write_json
from nextn.cli.output import print_arms, print_evaluation
from nextn.config import Recipe, from_table, override
from nextn.errors import ConfigError
from nextn.report.html import write_report
from nextn.report.measurement import ARMS, acceptance_probe
from nextn.report.provenance import collect
from nextn.report.run import report_of_run
from nextn.report.schema import to_table
from nextn.training import (
    PreparedData,
    Trainer,
    fit_vocabulary,
    list_checkpoints,
    new_model,
    prepare_data,
    resolve_device,
    time_steps,
)

MIN_STEPS = 40
"""A run is at least this long, however slow the machine."""


def demo(
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/demo"),
    minutes: Annotated[float, typer.Option(help="How long to train.")] = 4.0,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Change a setting; may be repeated.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Timed repeats of each decoding arm.")] = 3,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete the run folder and train anew.")] = False,
) -> None:
    """Train, decode losslessly, and write a report, in minutes on two CPU cores.

    Called again, it goes on where it was: an interrupted training is resumed, a finished one only measured again.

    Examples:

        nextn demo

        nextn demo --minutes 20 --out runs/longer

        nextn demo --fresh --set mtp.num_depths=1 --set mtp.share_weights=false
    """
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    if fresh and out.exists():
        _delete_run(out)
    recipe, provenance, data = _resume_plan(out, set_) or _plan(out, minutes, set_, console)
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
            notes=_notes(recipe, repeats, result.evaluation["loss_per_depth"]),
            progress=lambda: bar.advance(task),
        )
    write_json(out / "report.json", to_table(report))
    write_report(report, out / "report.html")
    print_arms(Console(), report.arms)
    console.print(f"report: {out / 'report.html'}")
    console.print(f"model:  {result.checkpoint}")
    console.print(f'try:    nextn generate {out} -p "def main(" --show-drafts')


def _plan(
    out: Path, minutes: float, assignments: list[str] | None, console: Console
) -> tuple[Recipe, dict[str, Any], PreparedData]:
    """A new run: the demo's recipe, as many steps as fit the minutes."""
    if minutes <= 0:
        raise ConfigError(f"--minutes must be above 0, got {minutes:g}")
    table = tomllib.loads(importlib.resources.files("nextn.cli").joinpath("demo.toml").read_text(encoding="utf-8"))
    recipe = from_table(Recipe, override(table, assignments or ()))
    data = prepare_data(recipe.data)
    recipe = fit_vocabulary(recipe, data.tokenizer)
    console.print(
        f"{data.corpus.name}: {len(data.train):,} tokens to train on, {len(data.validation):,} held out; "
        "timing a few steps with and without MTP"
    )
    times = time_steps(recipe, data)
    num_steps = max(MIN_STEPS, round(minutes * 60 / times.mtp_step_s))
    recipe = replace(recipe, training=replace(recipe.training, num_steps=num_steps))
    device = resolve_device(recipe.training.device)
    provenance = collect(seed=recipe.training.seed, device=device, corpus=data.provenance())
    provenance["training_cost"] = vars(times) | {"mtp_time_share": times.mtp_time_share}
    return recipe, provenance, data


def _resume_plan(out: Path, assignments: list[str] | None) -> tuple[Recipe, dict[str, Any], PreparedData] | None:
    """The plan of the run that is already in `out`, None if there is none."""
    if not (out / "recipe.json").exists():
        return None
    if assignments:
        raise ConfigError(f"{out} already holds a run; --set needs --fresh (which deletes it) or another --out")
    recipe = from_table(Recipe, read_json(out / "recipe.json"))
    return recipe, read_json(out / "provenance.json"), prepare_data(recipe.data)


def _delete_run(out: Path) -> None:
    """Remove a run folder; anything else is refused."""
    if not (out / "recipe.json").exists() and not list_checkpoints(out):
        raise ConfigError(f"--fresh deletes a run, and {out} does not look like one (no recipe.json)")
    shutil.rmtree(out)


def _notes(recipe: Recipe, repeats: int, loss_per_depth: list[float]) -> tuple[str, ...]:
    """What a reader must know to judge the figures."""
    evaluation = recipe.evaluation
    notes = (
        f"Decoding was measured on {evaluation.num_prompts} prompts of {evaluation.prompt_length} tokens from files "
        f"held out of training, {evaluation.max_new_tokens} new tokens each, {repeats} repeats, in float32 on "
        f"{torch.get_num_threads()} CPU threads.",
        "The baseline is this library's own plain cached decoding of the same weights in the same process, repeats "
        "in turn; acceptance is not speed.",
        "A model trained for minutes is undertrained: its greedy text loops, which flatters acceptance. Judge it "
        "by the sampled figures too.",
    )
    if min(loss_per_depth) == loss_per_depth[0]:
        return notes
    return (
        *notes,
        "Here an MTP depth predicts its label better than depth 0 does. It is not a leak: both have read the same true "
        "tokens, and tests show that no later one has any effect. The depth has one layer more, and reads the newest "
        "token beside the trunk's finished summary of all before it.",
    )
