"""`nextn generate`: continue texts, and show which tokens were drafted."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, cast

import typer

import nextn
from nextn.cli.console import interruptible, messages
from nextn.cli.generate_output import print_changes, print_result, print_statistics, print_stream
from nextn.decoding import Decoder, DraftSettings, Request, SamplingConfig
from nextn.decoding.request import ADAPTIVE, PROMPT_LOOKUP, DraftLength
from nextn.decoding.resolve import resolve_verifier
from nextn.decoding.vocabulary import DraftVocabulary
from nextn.errors import GenerationError
from nextn.model.prepared import WEIGHT_FORMS, WeightForm
from nextn.mtp import MTPModel

SAMPLING, DRAFTING, MACHINE = "Sampling", "Drafting and verification", "Machine"


def generate(
    path: Annotated[Path, typer.Argument(help="A checkpoint, or a run folder (its last checkpoint is taken).")],
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", metavar="TEXT", help="Text to continue; may be repeated. '-' reads it in."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Most tokens to add.")] = 128,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End a text before this string; may be repeated.")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after an end-of-text token.")] = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="Print as it is decoded; on a terminal one prompt always is.")
    ] = False,
    show_drafts: Annotated[
        bool, typer.Option("--show-drafts", help="Colour each token by where it came from, and count acceptance.")
    ] = False,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", rich_help_panel=SAMPLING)] = 0.0,
    top_k: Annotated[
        int | None, typer.Option(help="Sample among the k most likely tokens.", rich_help_panel=SAMPLING)
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Sample among the likeliest tokens of this total share.", rich_help_panel=SAMPLING),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            help="Sample among tokens at least this many times as likely as the likeliest.", rich_help_panel=SAMPLING
        ),
    ] = None,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: tokens seen before are less likely.", rich_help_panel=SAMPLING)
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.", rich_help_panel=SAMPLING)] = 0,
    draft_length: Annotated[
        str | None,
        typer.Option(
            metavar="N|adaptive",
            help="Tokens drafted per cycle; 0 is plain decoding; adaptive: what is fastest, as measured on the way. "
            "Default: 3, or what the scheme can do.",
            rich_help_panel=DRAFTING,
        ),
    ] = None,
    drafter: Annotated[
        str,
        typer.Option(
            metavar="mtp|prompt_lookup|PATH",
            help="What drafts: the MTP depths, the text itself, or another model of the same vocabulary.",
            rich_help_panel=DRAFTING,
        ),
    ] = "mtp",
    min_confidence: Annotated[
        float | None,
        typer.Option(
            help="End a draft when the product of its probabilities falls below this.", rich_help_panel=DRAFTING
        ),
    ] = None,
    draft_vocabulary: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help="The only tokens that the depths draft.", rich_help_panel=DRAFTING),
    ] = None,
    verifier: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="auto: lossless (exact, or rejection with a temperature). Lossy: threshold:T, typical:EPSILON,DELTA.",
            rich_help_panel=DRAFTING,
        ),
    ] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts decoded at a time.", rich_help_panel=MACHINE)] = 1,
    weights: Annotated[
        str,
        typer.Option(
            metavar="|".join(WEIGHT_FORMS),
            help="packed: the same numbers, read faster. int8: rounded, another model.",
            rich_help_panel=MACHINE,
        ),
    ] = "packed",
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the steps first: seconds to minutes.", rich_help_panel=MACHINE)
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...", rich_help_panel=MACHINE)] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.", rich_help_panel=MACHINE)] = "float32",
) -> None:
    """Continue texts, losslessly: the output does not depend on what is drafted, unless a lossy verifier is asked for.

    Examples:

        nextn generate runs/demo -p "def read_file(path):" --show-drafts

        nextn generate runs/demo -p "import os" --temperature 0.8 --top-p 0.95 --seed 1

        nextn generate runs/demo -p "import os" -p "class A" --batch-size 2 --draft-length adaptive --stop "return"

        nextn generate runs/demo -p "def main(" --verifier typical:0.1,0.3 --draft-length 5
    """
    prompts = [_standard_input() if text == "-" else text for text in prompt or ()]
    if not prompts:
        raise GenerationError('no prompt; give one with -p "TEXT", or -p - to read standard input')
    if temperature == 0 and (top_k, top_p, min_p) != (None, None, None):
        messages().print(
            "--top-k, --top-p and --min-p have no effect at temperature 0 (greedy); add --temperature to sample"
        )
        top_k = top_p = min_p = None
    sampling = SamplingConfig(temperature, top_k, top_p, min_p, repetition_penalty=repetition_penalty)
    rule, length = resolve_verifier(verifier, sampling), _draft_length(draft_length)
    if stream:
        _refuse_to_stream(show_drafts, not rule.is_lossless, batch_size > 1 and len(prompts) > 1)
    if drafter != "mtp" and (min_confidence, draft_vocabulary) != (None, None):
        raise GenerationError(
            f"--min-confidence and --draft-vocabulary are about drafts of the MTP depths; with --drafter {drafter} "
            "leave them out"
        )
    model = nextn.load(path, device=device, dtype=dtype)
    if model.scheme is None and drafter == "mtp" and length in (None, ADAPTIVE):
        messages().print("this model has no MTP depths: decoding plainly; --drafter prompt_lookup drafts without them")
    if weights == "int8":
        messages().print("int8: weights rounded to 8 bits are another model; its text is not the checkpoint's")
    draft = DraftSettings(
        drafter=_drafter(drafter, device, dtype),
        length=length,
        min_confidence=min_confidence,
        vocabulary=None if draft_vocabulary is None else DraftVocabulary.load(draft_vocabulary),
        verifier=rule,
    )
    decoder = Decoder(
        model,
        draft=draft,
        batch_size=batch_size,
        weights=cast(WeightForm, weights),
        compiled=compiled,
        say=messages().print,
    )
    request = Request(max_new_tokens, sampling, seed, None if ignore_eos else "auto", stop or ())
    if stream or (sys.stdout.isatty() and len(prompts) == 1 and rule.is_lossless and not show_drafts):
        with interruptible(messages(), "the text ends here"):
            print_stream(decoder, prompts, request)
        return
    with interruptible(messages(), "nothing was printed; --stream prints what is decoded at once"):
        result = decoder.generate(prompts, request)
    print_result(model, prompts, result, show_drafts)
    if show_drafts:
        print_statistics(messages(), result, length)
    if not rule.is_lossless:
        print_changes(messages(), result, rule, sampling.is_greedy)


def _draft_length(text: str | None) -> DraftLength:
    if text is None:
        return None
    if text == ADAPTIVE:
        return ADAPTIVE
    try:
        return int(text)
    except ValueError:
        raise GenerationError(f"--draft-length takes a whole number or {ADAPTIVE!r}, got {text!r}") from None


def _drafter(name: str, device: str, dtype: str) -> str | MTPModel:
    if name in ("mtp", PROMPT_LOOKUP):
        return name
    if not Path(name).exists():
        raise GenerationError(f"--drafter takes mtp, {PROMPT_LOOKUP} or the path of a model; there is no {name!r} here")
    return nextn.load(name, device=device, dtype=dtype)


def _refuse_to_stream(show_drafts: bool, is_lossy: bool, interleaves: bool) -> None:
    """Raise GenerationError for what is known, or can be shown, at the end only."""
    reasons = {
        "--show-drafts colours whole texts": show_drafts,
        "what a lossy verifier changed is counted at the end": is_lossy,
        "with --batch-size several texts grow at once": interleaves,
    }
    for reason, holds in reasons.items():
        if holds:
            raise GenerationError(f"--stream prints one text as it grows, but {reason}; leave one of them out")


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise GenerationError(
            f"standard input is not UTF-8 text (byte 0x{error.object[error.start]:02x} at offset {error.start}); "
            "-p - reads a text to continue"
        ) from None
