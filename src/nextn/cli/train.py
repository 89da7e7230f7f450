"""`nextn train`: one recipe, one run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from nextn.cli.console import interruptible, messages, status
from nextn.cli.output import print_evaluation
from nextn.config import load_recipe
from nextn.errors import ConfigError
from nextn.evaluation.free_running import acceptance_probe
from nextn.interop.start import load_start, start
from nextn.model.device import resolve_device
from nextn.provenance import collect
from nextn.training import Trainer, check_recipe, check_run_folder
from nextn.training.dry_run import print_dry_run


def train(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a TOML file such as recipes/python-stdlib.toml.")],
    out: Annotated[Path | None, typer.Option(help="Run folder. Default: runs/NAME-OF-RECIPE.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Change a setting; may be repeated.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the run folder's last checkpoint.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the run's size and plot its schedule; train nothing.")
    ] = False,
) -> None:
    """Train a model with multi-token prediction.

    Writes recipe.json, provenance.json, metrics.jsonl and checkpoints/ into the run folder. A killed run goes on with
    `--resume` and gives bit for bit the losses of an uninterrupted one. `--dry-run` reads no corpus and trains nothing:
    it prints the run's size and schedule, and plots the schedule into schedule.svg.

    Examples:

        nextn train recipes/python-stdlib.toml

        nextn train recipes/python-stdlib.toml --set training.num_steps=200 --set mtp.num_depths=0 --out runs/plain

        nextn train recipes/python-stdlib.toml --resume

        nextn train recipes/python-stdlib.toml --dry-run
    """
    console = messages()
    settings = load_recipe(recipe, set_ or ())
    check_recipe(settings)
    run_folder = out or Path("runs") / recipe.stem
    if dry_run:
        if resume:
            raise ConfigError("--dry-run trains nothing, so it takes no --resume: leave one of them out")
        model = None
        if settings.trunk.from_ is not None:
            with status(console) as say:
                settings, model = load_start(settings, say=say)
        print_dry_run(Console(markup=False, highlight=False), settings, run_folder, model)
        return
    device = resolve_device(settings.training.device)
    check_run_folder(run_folder, settings, resume=resume)  # before the corpus, which may take a minute to read
    with status(console) as say:
        settings, model, data = start(settings, run_folder, say)
    console.print(f"{data.summary()}; run folder {run_folder}")
    trainer = Trainer(
        settings,
        model,
        data.train,
        data.validation,
        run_folder,
        evaluate=acceptance_probe(data.validation, settings.evaluation),
        provenance=collect(seed=settings.training.seed, device=device, corpus=data.provenance()),
        console=console,
    )
    with interruptible(console, "the last checkpoint is complete, and --resume goes on from it"):
        result = trainer.train(resume=resume)
    print_evaluation(Console(), result.evaluation)
    console.print(f"model: {result.checkpoint}")
    console.print(f'try:   nextn generate {result.checkpoint} -p "def " --show-drafts')
