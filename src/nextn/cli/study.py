"""`nextn study`: compares ways to train, over seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nextn.cli.console import interruptible, messages, results, status
from nextn.cli.study_output import StudyProgress, print_plan, print_result
from nextn.files import make_folder
from nextn.study.jobs import checked_devices
from nextn.study.load import load_study
from nextn.study.page import write_page
from nextn.study.run import locked, plan_study, run_study
from nextn.study.study_file import read_json, write_json
from nextn.study.tables import write_csv


def study(
    recipe: Annotated[Path, typer.Argument(help="The study, a TOML file; with --render, its study.json.")],
    scale: Annotated[
        str, typer.Option(help="Size of the base recipe: cpu, gpu or small in the studies that are shipped.")
    ] = "cpu",
    out: Annotated[
        Path, typer.Option(help="Folder of all studies: they share trained runs, and each has a folder of its own.")
    ] = Path("runs/studies"),
    devices: Annotated[
        str, typer.Option(help="Where to train, comma-separated: cuda:0,cuda:1, or cpu,cpu for two runs at a time.")
    ] = "auto",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Change the base recipe; may be repeated."),
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Show the plan and the time it takes; train nothing.")] = False,
    render: Annotated[
        bool, typer.Option("--render", help="Write the page of a finished study again, beside its study.json.")
    ] = False,
) -> None:
    """Compare ways to train, over several seeds, at equal tokens, FLOPs and time.

    Prints the plan with an estimate of its time. Trains and evaluates what is missing. Writes study.html, study.json
    and study.csv into OUT/NAME-SCALE (with --set, its values too). Every run has a folder in OUT/trained, named by a
    hash of its settings and text. So a killed study resumes where it stopped, and studies share runs.

    Examples:

        nextn study recipes/studies/num_tokens.toml

        nextn study recipes/studies/num_tokens.toml --devices cpu,cpu

        nextn study recipes/studies/claims.toml --scale gpu --devices cuda:0

        nextn study recipes/studies/lambda.toml --plan

        nextn study runs/studies/lambda-cpu/study.json --render
    """
    console = messages()
    if render:
        page = recipe.with_suffix(".html")
        write_page(read_json(recipe), page)
        console.print(f"page: {page}")
        return
    loaded, used = load_study(recipe, scale, set_ or ()), checked_devices(devices)
    with locked(out), interruptible(console, "finished runs are kept, and the same command goes on"):
        with status(console) as say:
            planned = plan_study(loaded, out, used[0], say)
        print_plan(results(), planned, used)
        if plan:
            return
        with StudyProgress(console, planned, used) as progress:
            result = run_study(planned, used, progress)
    folder = out / "-".join([loaded.name, scale, *(set_ or ())]).replace("/", "_")
    make_folder(folder)
    write_json(result, folder / "study.json")
    write_csv(result, folder / "study.csv")
    write_page(result, folder / "study.html")
    print_result(results(), result)
    console.print(f"page: {folder / 'study.html'}")
