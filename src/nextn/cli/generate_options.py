"""Options of `nextn generate`: what they are, and how their words become settings."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

import nextn
from nextn.cli.console import messages
from nextn.decoding.request import ADAPTIVE, MTP, PROMPT_LOOKUP, DraftLength, DraftSettings
from nextn.decoding.sampling import SamplingConfig
from nextn.errors import GenerationError
from nextn.model.prepared import WEIGHT_FORMS
from nextn.mtp import MTPModel

SAMPLING, DRAFTING, MACHINE = "Sampling", "Drafting and verification", "Machine"

Model = Annotated[Path, typer.Argument(help="A checkpoint, or a run folder (its last checkpoint is taken).")]
Prompts = Annotated[
    list[str] | None,
    typer.Option("--prompt", "-p", metavar="TEXT", help="Text to continue; may be repeated. '-': standard input."),
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", help="Maximum number of new tokens.")]
Stop = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End a text before this string; may be repeated.")]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Continue after an end-of-text token.")]
Stream = Annotated[
    bool, typer.Option("--stream", help="Print while decoding; the default for one prompt on a terminal.")
]
ShowDrafts = Annotated[
    bool, typer.Option("--show-drafts", help="Colour each token by where it came from, and count acceptance.")
]
Temperature = Annotated[float, typer.Option(help="0 is greedy.", rich_help_panel=SAMPLING)]
TopK = Annotated[int | None, typer.Option(help="Sample among the k most likely tokens.", rich_help_panel=SAMPLING)]
TopP = Annotated[
    float | None,
    typer.Option(help="Sample among the likeliest tokens of this total share.", rich_help_panel=SAMPLING),
]
MinP = Annotated[
    float | None,
    typer.Option(
        help="Sample among tokens at least this many times as likely as the likeliest.", rich_help_panel=SAMPLING
    ),
]
RepetitionPenalty = Annotated[
    float, typer.Option(help="Above 1: tokens seen before are less likely.", rich_help_panel=SAMPLING)
]
Seed = Annotated[int, typer.Option(help="Seed of sampling.", rich_help_panel=SAMPLING)]
DraftLengthText = Annotated[
    str | None,
    typer.Option(
        metavar="N|adaptive",
        help="Tokens drafted per cycle; 0 is plain decoding; adaptive finds the fastest number while decoding. "
        "Default: 3, or what the scheme can do.",
        rich_help_panel=DRAFTING,
    ),
]
Drafter = Annotated[
    str,
    typer.Option(
        metavar="mtp|prompt_lookup|PATH",
        help="The drafter: the MTP depths, the text itself, or another model of the same vocabulary.",
        rich_help_panel=DRAFTING,
    ),
]
MinConfidence = Annotated[
    float | None,
    typer.Option(help="End a draft when the product of its probabilities falls below this.", rich_help_panel=DRAFTING),
]
DraftVocabularyFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE.json", help="The only tokens that the depths draft.", rich_help_panel=DRAFTING),
]
Verifier = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="auto: lossless (exact, or rejection with a temperature). Lossy: threshold:T, typical:EPSILON,DELTA.",
        rich_help_panel=DRAFTING,
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Prompts decoded at a time.", rich_help_panel=MACHINE)]
Weights = Annotated[
    str,
    typer.Option(
        metavar="|".join(WEIGHT_FORMS),
        help="packed: the same numbers, read faster. int8: rounded, another model.",
        rich_help_panel=MACHINE,
    ),
]
Compiled = Annotated[
    bool, typer.Option("--compile", help="Compile the steps first: seconds to minutes.", rich_help_panel=MACHINE)
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...", rich_help_panel=MACHINE)]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.", rich_help_panel=MACHINE)]


def given_prompts(prompts: Sequence[str] | None) -> list[str]:
    """The texts of --prompt, "-" replaced by standard input. Raises GenerationError: there is none."""
    texts = [_standard_input() if text == "-" else text for text in prompts or ()]
    if not texts:
        raise GenerationError('no prompt; give one with -p "TEXT", or -p - to read standard input')
    return texts


def with_effect(sampling: SamplingConfig) -> SamplingConfig:
    """The same without filters that have no effect, which is said."""
    filters = (sampling.top_k, sampling.top_p, sampling.min_p)
    if not sampling.is_greedy or filters == (None, None, None):
        return sampling
    messages().print(
        "--top-k, --top-p and --min-p have no effect at temperature 0 (greedy); add --temperature to sample"
    )
    return replace(sampling, top_k=None, top_p=None, min_p=None)


def draft_length_of(text: str | None) -> DraftLength:
    """The value of --draft-length. Raises GenerationError: it is no whole number and not "adaptive"."""
    if text is None:
        return None
    if text == ADAPTIVE:
        return ADAPTIVE
    try:
        return int(text)
    except ValueError:
        raise GenerationError(f"--draft-length takes a whole number or {ADAPTIVE!r}, got {text!r}") from None


def check_drafter(draft: DraftSettings) -> None:
    """Raise GenerationError for options about MTP drafts with another drafter, or a drafter that is not there."""
    name = draft.drafter
    if name == MTP:
        return
    if (draft.min_confidence, draft.vocabulary) != (None, None):
        raise GenerationError(
            f"--min-confidence and --draft-vocabulary are about drafts of the MTP depths; with --drafter {name} "
            "leave them out"
        )
    if name != PROMPT_LOOKUP and not Path(str(name)).exists():
        raise GenerationError(f"--drafter takes mtp, {PROMPT_LOOKUP} or the path of a model; there is no {name!r} here")


def with_model(draft: DraftSettings, device: str, dtype: str) -> DraftSettings:
    """The same with the model that drafts, if --drafter is a path, loaded."""
    if draft.drafter in (MTP, PROMPT_LOOKUP):
        return draft
    return replace(draft, drafter=nextn.load(str(draft.drafter), device=device, dtype=dtype))


def say_what_is_unexpected(model: MTPModel, draft: DraftSettings, weights: str) -> None:
    """Say before decoding what a user may not expect of this model."""
    if model.scheme is None and draft.drafter == MTP and draft.length in (None, ADAPTIVE):
        messages().print("this model has no MTP depths: decoding plainly; --drafter prompt_lookup drafts without them")
    if weights == "int8":
        messages().print("int8: weights rounded to 8 bits are another model; its text is not the checkpoint's")


def check_stream(show_drafts: bool, is_lossy: bool, interleaves: bool) -> None:
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
