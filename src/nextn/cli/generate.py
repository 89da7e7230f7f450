"""`nextn generate`: continue a text, and show which tokens were drafted."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

import nextn
from nextn.cli.output import messages
from nextn.decoding import GenerationResult
from nextn.errors import GenerationError
from nextn.mtp import MTPModel
from nextn.report.schema import pieces_of

DEPTH_STYLES = ("", "black on #6ad4f5", "black on #7fe58a", "black on #f5dd8a", "black on #ff9a70", "black on #e88af5")
"""Colour of a token by its depth: none for the trunk's own; depths beyond the last take the last.

Strong enough to stay five different colours where a terminal has sixteen.
"""


def generate(
    path: Annotated[Path, typer.Argument(help="A checkpoint, or a run folder (its last checkpoint is taken).")],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="Text to continue; may be repeated. '-' reads it in.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Most tokens to add.")] = 128,
    draft_length: Annotated[
        int | None,
        typer.Option(help="N, tokens drafted per cycle; 0 is plain decoding. Default: 3, or what the scheme can do."),
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k most likely tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample among the likeliest tokens of this total share.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    show_drafts: Annotated[
        bool, typer.Option("--show-drafts", help="Colour each token by where it came from, and count acceptance.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Continue a text, losslessly: the output does not depend on the draft length.

    Examples:

        nextn generate runs/demo -p "def read_file(path):" --show-drafts

        nextn generate runs/demo -p "import os" --temperature 0.8 --top-p 0.95 --seed 1
    """
    prompts = [_standard_input() if text == "-" else text for text in prompt or ()]
    if not prompts:
        raise GenerationError('no prompt; give one with -p "TEXT", or -p - to read standard input')
    model = nextn.load(path, device=device, dtype=dtype)
    if model.scheme is None and draft_length is None:
        messages().print("this model has no MTP depths: decoding plainly")
    if temperature == 0 and (top_k, top_p) != (None, None):
        messages().print("--top-k and --top-p have no effect at temperature 0 (greedy); add --temperature to sample")
        top_k = top_p = None
    result = nextn.generate(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        draft_length=draft_length,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    console = Console(soft_wrap=True, highlight=False)
    for index, text in enumerate(prompts):
        if index:
            console.rule()
        if show_drafts:
            console.print(Text(text, style="dim"), end="")
            console.print(_coloured(model, result, index))
        else:  # as it is, tabs included: what is piped into a file must be the model's text
            print(text + result.texts[index])
    if show_drafts:
        _print_statistics(messages(), result)


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise GenerationError(
            f"standard input is not UTF-8 text (byte 0x{error.object[error.start]:02x} at offset {error.start}); "
            "-p - reads a text to continue"
        ) from None


def _coloured(model: MTPModel, result: GenerationResult, index: int) -> Text:
    assert model.tokenizer is not None, "texts were decoded with it"
    tokens = (model.tokenizer.token_bytes(token_id) for token_id in result.token_ids[index])
    text = Text()
    for piece in pieces_of(tokens, result.origins[index]):
        text.append(piece.text, style=DEPTH_STYLES[min(piece.depth, len(DEPTH_STYLES) - 1)])
    return text


def _print_statistics(console: Console, result: GenerationResult) -> None:
    draft_length = result.stats.draft_length
    legend = Text("\ntrunk ")
    for depth in range(1, draft_length + 1):
        legend.append(f" depth {depth} ", style=DEPTH_STYLES[min(depth, len(DEPTH_STYLES) - 1)])
    console.print(legend)
    stats, num_new = result.stats, sum(len(ids) for ids in result.token_ids)
    console.print(
        f"{num_new} tokens, {result.num_trunk_forwards} trunk forwards, {result.decode_tok_per_s:.0f} tokens/s; "
        f"N = {draft_length}: mean acceptance length {stats.mean_acceptance_length:.2f}, "
        f"accepted {stats.num_accepted_tokens} of {stats.num_draft_tokens} drafted"
    )
