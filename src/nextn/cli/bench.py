"""`nextn bench`: decoding speed and acceptance of one checkpoint at several draft lengths, beside plain decoding."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

import nextn
from nextn.checkpoint import write_json
from nextn.cli.output import figures_table, interruptible, messages, status
from nextn.decoding.engine_drafts import AS_TRAINED, DRAFTING
from nextn.decoding.request import resolve_draft_length
from nextn.errors import GenerationError
from nextn.mtp import MTPModel, find_checkpoint
from nextn.report.html import plural
from nextn.report.measurement import TimedDecodings, mean_repeated_share, time_decodings
from nextn.report.prompts import HELD_OUT, PromptSet, check_prompt_set, prompt_set
from nextn.report.provenance import collect
from nextn.report.schema import DecodingArm
from nextn.tables import to_table


def bench(
    path: Annotated[Path, typer.Argument(help="A checkpoint, or a run folder (its last checkpoint is taken).")],
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            help='Prompts, one object {"prompt": "..."} a line. Default: the text held out of the run\'s training.',
        ),
    ] = None,
    num_prompts: Annotated[
        int | None, typer.Option(min=1, help="Held-out prompts decoded. Default: as trained.")
    ] = None,
    draft_lengths: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="Numbers of drafted tokens to try; 0, plain decoding, is always measured. Default: 0 to 3, or as many "
            "as the scheme can draft.",
        ),
    ] = None,
    as_: Annotated[
        str, typer.Option("--as", metavar="ENGINE", help=f"Draft as that engine does: {', '.join(DRAFTING)}.")
    ] = AS_TRAINED,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", "-n", min=2, help="Tokens per prompt. Default: as trained; 128."),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed repeats of each draft length.")] = 3,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    json: Annotated[Path | None, typer.Option(help="Also write the figures and their provenance to this file.")] = None,
) -> None:
    """Measure decoding, plain and with drafts, in turn in one process: tokens per second, speedup, acceptance.

    AL is the mean acceptance length, "acceptance" the share of cycles that accept the first, second, ... draft, "same"
    the outputs equal to plain decoding. Greedy text that repeats itself flatters acceptance: look at the column
    "repeated", and at --temperature 1 too.

    `--as` changes which tokens are drafted, so AL and acceptance are that engine's; tokens per second stay nextn's.

    Examples:

        nextn bench runs/demo

        nextn bench runs/demo --temperature 1 --draft-lengths 1,2,4 --repeats 5 --json bench.json

        nextn bench runs/demo --prompts prompts.jsonl --as vllm
    """
    if prompts is not None and num_prompts is not None:
        raise GenerationError("--num-prompts is about held-out prompts; with --prompts all of the file's are decoded")
    folder = find_checkpoint(path)
    name = HELD_OUT if prompts is None else str(prompts)
    check_prompt_set(name)
    model = nextn.load(folder, device=device, dtype=dtype)
    lengths = _draft_lengths(model, draft_lengths, as_)
    console = messages()
    with status(console) as say:
        given = prompt_set(name, model, folder, num_prompts, max_new_tokens, say=say)
    with (
        interruptible(console, "nothing was written"),
        Progress(console=console, disable=not console.is_terminal) as bar,
    ):
        task = bar.add_task("decoding", total=len(lengths) * repeats)
        if not console.is_terminal:
            console.print(f"decoding {plural(len(given.prompts), 'prompt')}, each draft length in turn")
        timed = time_decodings(
            model,
            given.prompts,
            lengths,
            max_new_tokens=given.max_new_tokens,
            temperature=temperature,
            num_repeats=repeats,
            drafting=as_,
            progress=lambda: bar.advance(task),
        )
    arm_name = "greedy" if temperature == 0 else "sampled"
    arms = [timed.arm(arm_name, length) for length in lengths if length]
    title = (
        f"{arm_name}, {plural(len(given.prompts), 'prompt')}, {given.max_new_tokens} tokens each, "
        f"{plural(repeats, 'repeat')}, {dtype}" + ("" if as_ == AS_TRAINED else f", drafted as {as_} does")
    )
    _print_table(Console(), title, timed, arms)
    if as_ != AS_TRAINED:
        console.print(f"AL and acceptance are those of {as_}'s drafts; tokens per second are nextn's, not {as_}'s")
    if json is not None:
        write_json(json, _figures(timed, arms, given, as_, dtype, device))


def _draft_lengths(model: MTPModel, wanted: str | None, drafting: str) -> list[int]:
    """Each N once, in growing order, 0 among them. Raises GenerationError for one that this model cannot draft."""
    if wanted is None:
        longest = resolve_draft_length(model, None, drafting)
        return [0, longest] if drafting == "transformers" and longest else list(range(longest + 1))
    try:
        lengths = {int(length) for length in wanted.split(",")}
    except ValueError:
        raise GenerationError(
            f"--draft-lengths takes whole numbers separated by commas, such as 0,1,2,3; got {wanted!r}"
        ) from None
    return sorted({0} | {resolve_draft_length(model, length, drafting) for length in lengths})


def _print_table(console: Console, title: str, timed: TimedDecodings, arms: list[DecodingArm]) -> None:
    """One row per N.

    Rates and speedups are medians with their range; acceptance is unconditional, one share per drafted token; `same`
    counts outputs equal to plain decoding.
    """
    headings = ("N", "AL", "acceptance", "tok/s", "range", "speedup", "range", "same", "repeated")
    table = figures_table(title, headings)
    repeated = mean_repeated_share(timed.results[0].token_ids)
    table.add_row("0", "1.00", "-", *_rates(timed.tok_per_s[0]), "1.00x", "-", "-", f"{repeated:.0%}")
    for arm in arms:
        compared = arm.num_compared_outputs
        table.add_row(
            str(arm.draft_length),
            f"{arm.mean_acceptance_length:.2f}",
            "/".join("-" if share is None else f"{share:.2f}" for share in arm.acceptance_unconditional),
            *_rates(arm.speculative_tok_per_s),
            f"{arm.speedup.median:.2f}x",
            f"{arm.speedup.lowest:.2f}-{arm.speedup.highest:.2f}",
            "-" if compared is None else f"{arm.num_identical_outputs}/{compared}",
            f"{arm.repeated_text_share_speculative:.0%}",
        )
    console.print(table)


def _rates(tok_per_s: tuple[float, ...]) -> tuple[str, str]:
    return f"{statistics.median(tok_per_s):.0f}", f"{min(tok_per_s):.0f}-{max(tok_per_s):.0f}"


def _figures(
    timed: TimedDecodings, arms: list[DecodingArm], given: PromptSet, drafting: str, dtype: str, device: str
) -> dict[str, Any]:
    """What was measured and how, ready for JSON."""
    return {
        "plain_tok_per_s": list(timed.tok_per_s[0]),
        "arms": [to_table(arm) for arm in arms],
        "settings": {
            "drafting": drafting,
            "temperature": timed.temperature,
            "num_prompts": len(given.prompts),
            "max_new_tokens": given.max_new_tokens,
            "num_repeats": len(timed.tok_per_s[0]),
            "dtype": dtype,
        },
        "provenance": collect(seed=0, device=device, corpus=given.source),
    }
