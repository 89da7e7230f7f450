"""`nextn doctor`: are a checkpoint's MTP modules there, whole and right, and which engine runs them?"""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import nextn
from nextn.cli.console import messages, status
from nextn.cli.doctor_output import print_diagnosis
from nextn.errors import ConfigError
from nextn.evaluation.diagnosed import ConventionMeasurement, measure_diagnosed
from nextn.files import write_json
from nextn.interop.doctor import Finding, examine, services


def doctor(
    path: Annotated[Path, typer.Argument(help="A checkpoint's or run's folder, a .safetensors or a .gguf file.")],
    measure: Annotated[
        bool, typer.Option("--measure", help="Also load the model and measure each convention's accuracy on a text.")
    ] = False,
    text: Annotated[Path | None, typer.Option(help="--measure: a UTF-8 text file to read.")] = None,
    corpus: Annotated[
        str | None,
        typer.Option(help="--measure: a corpus to read. Default: the part held out of the one it was trained on."),
    ] = None,
    num_rows: Annotated[int, typer.Option(min=1, help="--measure: rows of text read.")] = 32,
    device: Annotated[str, typer.Option(help="--measure: cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="--measure: float32, bfloat16 or float16.")] = "float32",
    json: Annotated[
        str | None, typer.Option(help="Also write everything as JSON to this file; `-` prints JSON and no tables.")
    ] = None,
) -> None:
    """Say whether a checkpoint's MTP modules are declared, stored, complete and plausible, and which engines run them.

    Exit code: 0 MTP is healthy, or plainly absent; 1 something is wrong; 2 there is no checkpoint, or a wrong option.

    Examples:

        nextn doctor runs/demo

        nextn doctor model.gguf --json -

        nextn doctor runs/demo --measure --text novel.txt
    """
    if not measure and (text is not None or corpus is not None):
        raise ConfigError("--text and --corpus name what --measure reads; add --measure")
    wanted = ConventionMeasurement(text, corpus, num_rows, device, dtype)
    console = messages()
    measured: dict[str, Any] | None = None
    with status(console) as say:
        diagnosis = examine(path, say)
        if measure and diagnosis.has_mtp:
            measured, findings = measure_diagnosed(diagnosis, wanted, say)
            diagnosis = diagnosis.adding(*findings)
        elif measure:
            why = "there is no MTP" if diagnosis.is_healthy else "the problems found come first"
            diagnosis = diagnosis.adding(Finding("info", "not measured", why))
    exit_code = 0 if diagnosis.is_healthy else 1
    table = diagnosis.to_table() | {
        "exit_code": exit_code,
        "engines": [service.to_table() for service in services(diagnosis)],
        "measured": measured,
        "nextn_version": nextn.__version__,
    }
    if json == "-":
        print(json_format.dumps(table, indent=2, allow_nan=False))
    else:
        print_diagnosis(Console(), diagnosis, measured)
        if json is not None:
            write_json(Path(json), table)
    if exit_code:
        raise typer.Exit(exit_code)
