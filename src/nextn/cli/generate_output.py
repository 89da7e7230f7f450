"""What `nextn generate` prints: texts, as they grow or coloured by origin, and what drafting did."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from nextn.decoding import Decoder, GenerationResult, Request
from nextn.decoding.request import ADAPTIVE, DraftLength
from nextn.decoding.verify import Verifier
from nextn.evaluation.results import token_texts
from nextn.mtp import MTPModel

DEPTH_STYLES = ("", "black on #6ad4f5", "black on #7fe58a", "black on #f5dd8a", "black on #ff9a70", "black on #e88af5")
"""Colour of a token by its position in the draft (0: the trunk's own): five different ones even of sixteen."""


def print_stream(decoder: Decoder, prompts: Sequence[str], request: Request) -> None:
    """One text after the other, as they are decoded; the same characters as without streaming."""
    print(prompts[0], end="", flush=True)
    number = 0
    try:
        for piece in decoder.stream(prompts, request):
            if piece.number != number:
                number = piece.number
                print()
                Console().rule()
                print(prompts[number], end="")
            print(piece.text, end="", flush=True)
    finally:
        print()


def print_result(model: MTPModel, prompts: Sequence[str], result: GenerationResult, show_drafts: bool) -> None:
    """Each prompt and its continuation; coloured by origin if drafts are to be shown."""
    console = Console(soft_wrap=True, highlight=False)
    for index, text in enumerate(prompts):
        if index:
            console.rule()
        if show_drafts:
            console.print(Text(text, style="dim"), end="")
            console.print(_coloured(model, result, index))
        else:  # as it is, tabs included: what is piped into a file must be the model's text
            print(text + result.texts[index])


def _coloured(model: MTPModel, result: GenerationResult, index: int) -> Text:
    assert model.tokenizer is not None, "texts were decoded with it"
    tokens = (model.tokenizer.token_bytes(token_id) for token_id in result.token_ids[index])
    text = Text()
    for piece in token_texts(tokens, result.origins[index]):
        text.append(piece.text, style=DEPTH_STYLES[min(piece.depth, len(DEPTH_STYLES) - 1)])
    return text


def print_statistics(console: Console, result: GenerationResult, draft_length: DraftLength) -> None:
    """What the colours mean, tokens per second and acceptance."""
    stats, num_new = result.stats, sum(map(len, result.token_ids))
    legend = Text("\ntrunk ")
    for depth in range(1, stats.draft_length + 1):
        legend.append(f" draft {depth} ", style=DEPTH_STYLES[min(depth, len(DEPTH_STYLES) - 1)])
    console.print(legend)
    at_most = "adaptive, at most " if draft_length == ADAPTIVE else ""
    console.print(
        f"{num_new} tokens, {result.num_trunk_forwards} trunk forwards, {result.decode_tok_per_s:.0f} tokens/s; "
        f"N = {at_most}{stats.draft_length}: mean acceptance length {stats.mean_acceptance_length:.2f}, "
        f"accepted {stats.num_accepted_tokens} of {stats.num_draft_tokens} drafted"
    )


def print_changes(console: Console, result: GenerationResult, verifier: Verifier, is_greedy: bool) -> None:
    """How much a lossy verifier changed."""
    num_new, lossless = sum(map(len, result.token_ids)), "exact" if is_greedy else "rejection"
    console.print(
        f"verifier {verifier.name!r} is lossy: {result.num_changed_tokens} of {num_new} new tokens "
        f"({result.changed_share:.1%}) are drafts that {lossless!r} would have refused"
    )
