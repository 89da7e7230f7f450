"""`nextn demo`: train a small DeepSeek-V3 with MTP on the machine's own Python sources, decode, and report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from nextn.cli.console import interruptible, messages, status
from nextn.cli.output import print_arms, print_evaluation
from nextn.demo import delete_demo, plan_demo, require_demo, resume_demo
from nextn.evaluation.free_running import ARM_TEMPERATURES, acceptance_probe
from nextn.files import write_json
from nextn.interop.load import load
from nextn.report.html import write_report
from nextn.report.run import report_of_run
from nextn.report.schema import to_table
from nextn.training import Trainer, new_model


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
    if fresh:
        require_demo(out)
    with status(console) as say:
        plan = None if fresh else resume_demo(out, minutes, set_ or (), say)
        if plan is None:
            plan = plan_demo(minutes, set_ or (), say, console.print)
    if fresh:  # not before the plan has turned out well
        delete_demo(out)
    trainer = Trainer(
        plan.recipe,
        new_model(plan.recipe, plan.data.tokenizer),
        plan.data.train,
        plan.data.validation,
        out,
        evaluate=acceptance_probe(plan.data.validation, plan.recipe.evaluation),
        provenance=plan.provenance,
        console=console,
    )
    with interruptible(console, f"call nextn demo --out {out} again to go on from the last checkpoint"):
        result = trainer.train(resume=(out / "recipe.json").exists())
    print_evaluation(Console(), result.evaluation)

    trained = load(result.checkpoint)  # the written checkpoint is measured, in float32
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("decoding", total=2 * repeats * len(ARM_TEMPERATURES))
        if not console.is_terminal:
            console.print("decoding held-out prompts, plain and speculative in turn")
        report = report_of_run(
            "nextn demo: a small DeepSeek-V3 with multi-token prediction",
            out,
            trained,
            plan.recipe,
            plan.data,
            plan.provenance,
            num_repeats=repeats,
            progress=lambda: bar.advance(task),
        )
    write_json(out / "report.json", to_table(report))
    write_report(report, out / "report.html")
    print_arms(Console(), report.arms)
    console.print(f"report: {out / 'report.html'}")
    console.print(f"model:  {result.checkpoint}")
    console.print(f'try:    nextn generate {out} -p "def main(" --show-drafts')
