"""`nextn bench`: what drafting brings with one checkpoint, beside plain decoding, and whether to use it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nextn.bench.page import write_page
from nextn.bench.peers import PEERS, TRANSFORMERS
from nextn.bench.plan import plan_bench
from nextn.bench.request import (
    FULL,
    FULL_DRAFT_LENGTH,
    LOSSY,
    USUAL,
    BenchRequest,
    draft_lengths_of,
    numbers,
    peers_of,
)
from nextn.bench.run import run_bench
from nextn.cli.bench_output import BenchProgress, print_report
from nextn.cli.console import interruptible, messages, status
from nextn.decoding.drafters.engine_drafts import DRAFTING
from nextn.files import write_json
from nextn.tables import to_table


def bench(
    path: Annotated[Path, typer.Argument(help="A checkpoint, or a run folder (its last checkpoint is taken).")],
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SET",
            help='A file with one {"prompt": "..."} a line, held-out, code, story:PATH, humaneval or mtbench; may be '
            "repeated. Default: text held out of the run's training, or code.",
        ),
    ] = None,
    num_prompts: Annotated[
        int | None, typer.Option(min=1, help="Prompts decoded. Default: as trained; all of a file.")
    ] = None,
    draft_lengths: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="Drafted tokens to try, and adaptive; plain decoding is always measured. Default: 1 to 3, or as many "
            "as the scheme can draft, and adaptive.",
        ),
    ] = None,
    batch_sizes: Annotated[str | None, typer.Option(metavar="B,B,...", help="Rows at a time. Default: 1.")] = None,
    temperatures: Annotated[
        str | None,
        typer.Option("--temperatures", "--temperature", metavar="T,T,...", help="0 is greedy. Default: 0,1."),
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(
            metavar="T,T,...",
            help="Prompt lengths in tokens, at most what the model has room for. Default: as trained.",
        ),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Batch 1, 4, 16; temperature 0, 1; prompts of 128, 768 tokens; N up to 5.")
    ] = False,
    eager: Annotated[bool, typer.Option("--eager", help="Do not compile: starts at once, and is slower.")] = False,
    as_: Annotated[
        str | None,
        typer.Option(
            "--as",
            metavar="ENGINE",
            help=f"How to draft: {', '.join(DRAFTING)}; as engines do, eagerly. Default: recycled where one module "
            "serves all depths, else as trained.",
        ),
    ] = None,
    verifier: Annotated[
        str | None,
        typer.Option(help=f"Also one lossy arm, with the share it changes: {', '.join(LOSSY)}, or typical:0.1,0.3."),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", "-n", min=2, help="Tokens per prompt. Default: as trained; 128."),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed repeats of each arm.")] = 3,
    draft_model: Annotated[
        Path | None, typer.Option(help="A smaller model with the same tokenizer: also measure drafting with it.")
    ] = None,
    standard: Annotated[
        Path | None, typer.Option(help="The same recipe trained without MTP: also measure it, and compare approaches.")
    ] = None,
    parallel: Annotated[
        Path | None, typer.Option(help="A model whose drafts are independent: also measure it, and compare approaches.")
    ] = None,
    peers: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help=f"Other engines: {', '.join(PEERS)}, or none. Default: transformers."),
    ] = None,
    engines: Annotated[Path, typer.Option(help="The folder that make engines fills.")] = Path(".engines"),
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    json: Annotated[Path | None, typer.Option(help="Also write the figures and their provenance to this file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write them as a page.")] = None,
) -> None:
    """Measure decoding with drafts beside plain decoding, all arms in turn, and say whether to use it.

    Speedup is the wall clock of the fastest plain decoding over the arm's, median and range. AL is the mean acceptance
    length, "accepted" the share of cycles that accept the first, second, ... draft, "same" the greedy outputs equal
    to eager plain decoding; v and c are the cost of a verifying forward and of a drafted token in plain steps, from
    which the predicted speedup follows. Greedy text that repeats itself flatters acceptance: look at temperature 1 too.

    Examples:

        nextn bench runs/demo

        nextn bench runs/demo --eager --draft-lengths 2 --temperature 0 --num-prompts 4

        nextn bench runs/demo --full --html bench.html --json bench.json

        nextn bench runs/demo --prompts code --prompts my.jsonl --peers transformers,vllm,llamacpp

        nextn bench runs/mtp --standard runs/plain --draft-model runs/small --parallel runs/parallel
    """
    usual = FULL if full else USUAL
    request = BenchRequest(
        path=path,
        prompts=tuple(prompts or ()),
        num_prompts=num_prompts,
        prompt_lengths=numbers("--context", context or usual["context"], int) or (None,),
        max_new_tokens=max_new_tokens,
        batch_sizes=numbers("--batch-sizes", batch_sizes or usual["batch_sizes"], int),
        temperatures=numbers("--temperatures", temperatures or usual["temperatures"], float),
        num_repeats=repeats,
        draft_lengths=None if draft_lengths is None else draft_lengths_of(draft_lengths),
        usual_draft_length=FULL_DRAFT_LENGTH if full else None,
        drafting=as_,
        compiled=not eager,
        verifier=verifier,
        draft_model=draft_model,
        standard=standard,
        parallel=parallel,
        peers=(TRANSFORMERS,) if peers is None else peers_of(peers),
        peers_are_wanted=peers is not None,
        engines=engines,
        device=device,
        dtype=dtype,
    )
    console = messages()
    with status(console) as say:
        plan = plan_bench(request, say)
    with interruptible(console, "nothing was written"), BenchProgress(console, plan.num_runs) as progress:
        report = run_bench(plan, progress)
    print_report(report)
    if json is not None:
        write_json(json, to_table(report))
    if html is not None:
        write_page(report, html)
        console.print(f"report: {html}")
