"""`nextn train`: one recipe, one run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from nextn.cli.output import interruptible, messages, print_evaluation
from nextn.config import load_recipe
from nextn.model.device import resolve_device
from nextn.report.measurement import acceptance_probe
from nextn.report.provenance import collect
from nextn.training import Trainer, fit_vocabulary, new_model, prepare_data


def train(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a TOML file such as recipes/python-stdlib.toml.")],
    out: Annotated[Path | None, typer.Option(help="Run folder. Default: runs/NAME-OF-RECIPE.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Change a setting; may be repeated.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run folder's last checkpoint.")] = False,
) -> None:
    """Train a model with multi-token prediction.

    Writes recipe.json, provenance.json, metrics.jsonl and checkpoints/ into the run folder. A killed run goes on with
    `--resume` and gives bit for bit the losses of an uninterrupted one.

    Examples:

        nextn train recipes/python-stdlib.toml

        nextn train recipes/python-stdlib.toml --set training.num_steps=200 --set mtp.num_depths=0 --out runs/plain

        nextn train recipes/python-stdlib.toml --resume
    """
    console = messages()
    settings = load_recipe(recipe, set_ or ())
    device = resolve_device(settings.training.device)
    run_folder = out or Path("runs") / recipe.stem
    data = prepare_data(settings.data)
    settings = fit_vocabulary(settings, data.tokenizer)
    console.print(f"{data.summary()}; run folder {run_folder}")
    trainer = Trainer(
        settings,
        new_model(settings, data.tokenizer),
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
