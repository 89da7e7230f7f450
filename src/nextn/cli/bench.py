"""`nextn bench`: what drafting brings with one checkpoint, beside plain decoding, and whether to use it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

import nextn
from nextn.bench.arms import DraftLength, arms_of
from nextn.bench.figures import BenchReport, Setting
from nextn.bench.page import write_page
from nextn.bench.peer_engines import check_peers
from nextn.bench.peers import PEERS, TRANSFORMERS
from nextn.bench.run import Plan, approaches_of, measure, prompt_sets
from nextn.cli.bench_output import BenchProgress, print_report
from nextn.cli.output import interruptible, messages, status
from nextn.decoding.engine_drafts import AS_TRAINED, DRAFTING, RECYCLED, usual_drafting
from nextn.decoding.policy import policy_of
from nextn.decoding.request import longest_draft, resolve_draft_length, resolve_verifier
from nextn.decoding.sampling import SamplingConfig
from nextn.decoding.verify import VERIFIERS
from nextn.errors import GenerationError
from nextn.evaluation.prompts import CODE, HELD_OUT, check_prompt_set
from nextn.files import write_json
from nextn.mtp import MTPModel, find_checkpoint
from nextn.provenance import collect
from nextn.tables import to_table

USUAL = {"batch_sizes": "1", "temperatures": "0,1", "context": ""}
FULL = {"batch_sizes": "1,4,16", "temperatures": "0,1", "context": "128,768"}
"""What is measured, without and with `--full`, where an option does not say otherwise."""

FULL_DRAFT_LENGTH = 5

LOSSY = tuple(name for name, verifier in VERIFIERS.items() if not verifier.is_lossless)


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
    engines: Annotated[Path, typer.Option(help="Where make engines has installed them.")] = Path(".engines"),
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
    defaults = FULL if full else USUAL
    sizes = _numbers("--batch-sizes", batch_sizes or defaults["batch_sizes"], int)
    warmths = _numbers("--temperatures", temperatures or defaults["temperatures"], float)
    lengths = _numbers("--context", context or defaults["context"], int) or [None]
    for temperature in warmths:
        SamplingConfig(temperature)
    if min(sizes) < 1 or min(length or 1 for length in lengths) < 1:
        raise GenerationError(f"--batch-sizes and --context take numbers above 0, got {sizes} and {lengths}")
    if verifier is not None:
        if verifier.partition(":")[0] not in LOSSY:
            raise GenerationError(f"--verifier adds a lossy arm: {', '.join(LOSSY)}; got {verifier!r}")
        resolve_verifier(verifier, SamplingConfig())
    wanted_peers = _peers(peers, engines)
    folder = find_checkpoint(path)
    names = prompts or [HELD_OUT if (folder / "recipe.json").exists() else CODE]
    for name in names:
        check_prompt_set(name)
    console = messages()
    models = {"mtp": nextn.load(folder, device=device, dtype=dtype)}
    folders = {"mtp": folder}
    for key, other in {"standard": standard, "draft_model": draft_model, "parallel": parallel}.items():
        if other is not None:
            folders[key] = find_checkpoint(other)
            models[key] = nextn.load(folders[key], device=device, dtype=dtype)
    model = models["mtp"]
    if parallel is not None and models["parallel"].scheme is None:
        raise GenerationError(
            f"--parallel {parallel} has no MTP depths, so it cannot draft; name one that was trained with them"
        )
    drafting = as_ or usual_drafting(model.scheme)
    emulates = _emulates_an_engine(drafting)
    arms = arms_of(
        model,
        _draft_lengths(model, draft_lengths, drafting, FULL_DRAFT_LENGTH if full else None),
        compiled=not eager and not emulates,
        drafting=drafting,
        verifier=verifier,
        **{key: models[key] for key in ("draft_model", "standard", "parallel") if key in models},
    )
    with status(console) as say:
        sets = prompt_sets(names, lengths, model, folder, num_prompts, max_new_tokens, max(sizes), say)
    plan = Plan(
        settings=tuple(
            (Setting(name, given.source.get("prompt_length"), size, temperature), given)
            for size in sizes
            for name, given in sets
            for temperature in warmths
        ),
        arms=tuple(arms),
        num_repeats=repeats,
        peers=tuple(wanted_peers),
        peers_are_wanted=peers is not None,
        engines=engines,
        dtype=dtype,
        folder=folder,
        model=model,
    )
    with interruptible(console, "nothing was written"), BenchProgress(console, plan.num_runs) as progress:
        measured, peers_found, notes = measure(plan, progress)
    if emulates:
        notes.append(f"AL and acceptance are those of {as_}'s drafts; tokens per second are nextn's, not {as_}'s")
    if repeats == 1:
        notes.append("one repeat has no range, so whether a gain is more than noise is not known")
    report = BenchReport.of_settings(
        str(path),
        measured,
        peers=peers_found,
        approaches=approaches_of(folders, models, measured[0]) if len(models) > 1 else (),
        notes=tuple(notes),
        options={
            "drafting": drafting,
            "compiled": not eager and not emulates,
            "num_repeats": repeats,
            "dtype": dtype,
            "peers": wanted_peers,
        },
        provenance=collect(seed=0, device=device, corpus={"prompt_sets": [given.source for _, given in sets]}),
    )
    print_report(report)
    if json is not None:
        write_json(json, to_table(report))
    if html is not None:
        write_page(report, html)
        console.print(f"report: {html}")


# ------------------------------------------------------------------------------------------------------ what was asked


def _numbers(option: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    """Numbers separated by commas, each once, in their order. Raises GenerationError."""
    try:
        return list(dict.fromkeys(kind(part) for part in text.split(","))) if text else []
    except ValueError:
        raise GenerationError(f"{option} takes numbers separated by commas, such as 1,4; got {text!r}") from None


def _emulates_an_engine(drafting: str) -> bool:
    return drafting not in (AS_TRAINED, RECYCLED)


def _draft_lengths(model: MTPModel, wanted: str | None, drafting: str, usual: int | None) -> list[DraftLength]:
    """Each N once, in growing order, adaptive last; 1 to `usual` where no N is wanted, as far as the scheme can draft.

    Raises GenerationError for an N that this model cannot draft.
    """
    if wanted is None:
        longest = resolve_draft_length(model, None, drafting)
        if _emulates_an_engine(drafting):
            return [longest] if drafting == "transformers" else list(range(1, longest + 1))
        if usual is not None and longest:
            most = longest_draft(model)
            longest = usual if most is None else min(usual, most)
        return [*range(1, longest + 1), "adaptive"] if longest else []
    parts = [part.strip() for part in wanted.split(",")]
    try:
        fixed = {int(part) for part in parts if part != "adaptive"}
    except ValueError:
        raise GenerationError(
            f"--draft-lengths takes whole numbers and adaptive, separated by commas, such as 1,2,3,adaptive; "
            f"got {wanted!r}"
        ) from None
    lengths: list[DraftLength] = sorted({resolve_draft_length(model, length, drafting) for length in fixed} - {0})
    if "adaptive" in parts:
        if _emulates_an_engine(drafting) or policy_of("adaptive", longest_draft(model)).longest == 0:
            raise GenerationError(
                "adaptive needs MTP depths, drafting as no engine does; leave it out of --draft-lengths"
            )
        lengths.append("adaptive")
    return lengths


def _peers(wanted: str | None, engines: Path) -> list[str]:
    """Names of peers. Raises ConfigError for an unknown one, or one that is not installed."""
    if wanted is None:
        return [TRANSFORMERS]
    names = [name for name in dict.fromkeys(part.strip() for part in wanted.split(",")) if name not in ("", "none")]
    check_peers(names, engines)
    return names
