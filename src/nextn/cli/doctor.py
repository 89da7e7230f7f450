"""`nextn doctor`: are a checkpoint's MTP modules there, whole and right, and which engine runs them?"""

from __future__ import annotations

import hashlib
import json as json_format
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import nextn
from nextn.cli.console import messages, status
from nextn.config import DataConfig
from nextn.data import Document, PackedTokens, Tokenizer, pack, validation_rows
from nextn.errors import CheckpointError, ConfigError, DataError
from nextn.evaluation.conventions import (
    convention_findings,
    measure_conventions,
    most_frequent_share,
)
from nextn.files import read_json, write_json
from nextn.interop.doctor import Diagnosis, Finding, Service, examine, services
from nextn.mtp import MTPModel
from nextn.provenance import collect
from nextn.training import prepare_held_out, read_recipe

STYLES = {"ok": "green", "info": "dim", "warning": "yellow", "problem": "bold red"}
ROW_LENGTH = 256


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
        str | None, typer.Option(help="Also write it all as JSON to this file; `-`: to standard output, in its place.")
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
    if text is not None and corpus is not None:
        raise ConfigError("--text and --corpus exclude each other; name one")
    console = messages()
    measured: dict[str, Any] | None = None
    with status(console) as say:
        diagnosis = examine(path, say)
        if measure and diagnosis.has_mtp:
            measured, findings = _measured(diagnosis, text, corpus, num_rows, device, dtype, say)
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
        _print(Console(), diagnosis, measured)
        if json is not None:
            write_json(Path(json), table)
    if exit_code:
        raise typer.Exit(exit_code)


def _measured(
    diagnosis: Diagnosis,
    text: Path | None,
    corpus: str | None,
    num_rows: int,
    device: str,
    dtype: str,
    say: Callable[[str], None],
) -> tuple[dict[str, Any] | None, list[Finding]]:
    """The accuracies as a table for JSON, and what they say. A model that does not load is a finding."""
    if diagnosis.kind != "folder":
        raise CheckpointError(f"--measure loads the model, which takes its folder; {diagnosis.path} is a file alone")
    say("loading the model")
    try:
        model = nextn.load(diagnosis.path, device=device, dtype=dtype)
    except CheckpointError as error:
        return None, [Finding("problem", "not loadable", str(error), "nextn must load a model to measure it")]
    if model.tokenizer is None:
        raise DataError(f"{diagnosis.path} has no tokenizer, so text cannot be read with it")
    if text is not None:
        packed, provenance, isolate = (
            _read_text(text, model.tokenizer),
            {"name": text.name, "sha256": _sha256(text)},
            True,
        )
    else:
        packed, provenance, isolate = _read_corpus(diagnosis.path, corpus, model, say)
    length = min(ROW_LENGTH, model.trunk.max_position_embeddings, len(packed))
    rows = validation_rows(packed, length, num_rows)
    measured = measure_conventions(model, rows, packed.bytes_per_token, isolate, say)
    guessing = most_frequent_share(rows)
    table = {
        "conventions": [one.to_table() for one in measured],
        "most_frequent_token_share": guessing,
        "num_rows": len(rows.input_ids),
        "sequence_length": length,
        "dtype": dtype,
        "provenance": collect(seed=0, device=device, corpus=provenance),
    }
    return table, convention_findings(measured, guessing)


def _read_text(file: Path, tokenizer: Tokenizer) -> PackedTokens:
    try:
        return pack([Document(file.name, file.read_text(encoding="utf-8"))], tokenizer)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as UTF-8 text: {error}") from None


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _read_corpus(
    folder: Path, corpus: str | None, model: MTPModel, say: Callable[[str], None]
) -> tuple[PackedTokens, dict[str, Any], bool]:
    """Tokens, their provenance, and whether documents of a row do not see each other."""
    assert model.tokenizer is not None
    if (folder / "recipe.json").exists():
        config, trained = read_recipe(folder / "recipe.json").data, None
        if corpus not in (None, config.corpus):
            trained = read_json(folder / "provenance.json").get("corpus", {})
    elif corpus is not None:
        config, trained = DataConfig(), {}
    else:
        raise DataError(f"{folder} does not say what it was trained on; name a text with --text or --corpus")
    data = prepare_held_out(config if corpus is None else replace(config, corpus=corpus), model.tokenizer, trained, say)
    named = {"name": data.corpus.name, "sha256": data.corpus.sha256, "num_validation_tokens": len(data.validation)}
    return data.validation, named, config.isolate_documents


def _print(console: Console, diagnosis: Diagnosis, measured: Mapping[str, Any] | None) -> None:
    """The verdict, then the findings, then accuracies and engines."""
    console.print(f"[{STYLES[diagnosis.severity]}]{escape(diagnosis.verdict)}[/]", soft_wrap=True, highlight=False)
    findings = _table("findings", "", "what", "detail")
    for finding in diagnosis.findings:
        fix = f"\n[italic]-> {escape(finding.how_to_fix)}[/]" if finding.how_to_fix else ""
        mark = f"[{STYLES[finding.severity]}]{finding.severity}[/]"
        findings.add_row(mark, escape(finding.what), escape(finding.detail) + fix)
    console.print(findings)
    if measured:
        rows = measured["conventions"]
        depths = [f"depth {depth}" for depth in range(len(rows[0]["num_labels"]))]
        title = f"teacher-forced accuracy, {rows[0]['num_labels'][-1]:,} labels at the last depth"
        accuracies = _table(title, "convention", "", *depths)
        for row in rows:
            name = ", ".join(f"{field} {value}" for field, value in row["conventions"].items())
            shares = [f"{share:.1%}" for share in row["teacher_forced_accuracy"]]
            accuracies.add_row(name, "declared" if row["is_declared"] else "", *shares)
        console.print(accuracies)
    if diagnosis.is_healthy:
        _print_services(console, services(diagnosis))


def _print_services(console: Console, found: Sequence[Service]) -> None:
    """Which engines run the modules; then the commands, unbroken, so that they can be copied."""
    if not found:
        return
    engines = _table("engines", "engine", "runs MTP", "why not")
    for service in found:
        answer = {True: "yes", False: "no", None: "unknown"}[service.runs_mtp]
        engines.add_row(service.engine, answer, escape("; ".join(service.reasons)))
    console.print(engines)
    for service in found:
        if service.launch_line:
            console.print(f"[bold]{service.engine}[/]", highlight=False)
            lines = "\n".join(filter(None, (service.export, service.launch_line)))
            console.print(lines, soft_wrap=True, markup=False, highlight=False)


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table
