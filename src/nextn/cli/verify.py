"""`nextn verify`: the lossless suite on a checkpoint, with an exit code."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import nextn
from nextn.cli.console import interruptible, messages, status
from nextn.cli.output import VERDICTS, print_checks
from nextn.decoding.request import PROMPT_LOOKUP
from nextn.evaluation.prompts import CODE, HELD_OUT, PromptSet, check_prompt_set, prompt_set
from nextn.files import write_json
from nextn.lossless import Check, Subject, bfloat16_divergence, lossless_checks
from nextn.mtp import find_checkpoint
from nextn.provenance import collect
from nextn.wording import plural

USUAL_PROMPTS, USUAL_NEW_TOKENS = 8, 64


def verify(
    path: Annotated[Path, typer.Argument(help="A checkpoint, or a run folder (its last checkpoint is taken).")],
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="SET",
            help="held-out, code, story:PATH, humaneval, mtbench, or a JSON-lines file. Default: held-out where the "
            "checkpoint says what it was trained on, else code.",
        ),
    ] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Prompts decoded.")] = USUAL_PROMPTS,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=2, help="Tokens per prompt.")
    ] = USUAL_NEW_TOKENS,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    json: Annotated[Path | None, typer.Option(help="Also write checks, evidence and provenance to this file.")] = None,
) -> None:
    """Verify that decoding with drafts gives what decoding without them gives; the exit code says it.

    In float32: greedy texts for several N and batch sizes beside plain decoding, with and without a cache, with rows
    that end inside drafts, with drafts that are all right and all wrong; caches after rejected drafts; the distribution
    of sampled text, with a control that the test must reject. In bfloat16, where rounding tips near ties: how often
    texts differ.

    Exit codes: 0 lossless, 1 not lossless (or a test without power), 2 an error.

    Examples:

        nextn verify runs/demo

        nextn verify runs/demo --prompts humaneval --num-prompts 20 --json lossless.json
    """
    folder = find_checkpoint(path)
    name = prompts or (HELD_OUT if (folder / "recipe.json").exists() else CODE)
    check_prompt_set(name)
    model = nextn.load(folder, device=device, dtype="float32").eval()
    console = messages()
    checks = []
    with interruptible(console, "nothing was written"), status(console) as say:
        given = prompt_set(name, model, folder, num_prompts, max_new_tokens, say=say)
        subject = Subject(model, tuple(given.prompts), max_new_tokens)
        if subject.drafter == PROMPT_LOOKUP:
            console.print("this model has no MTP depths; its drafts come from prompt lookup")
        for check in lossless_checks(subject, say):
            checks.append(check)
            console.print(f"{check.name}: {VERDICTS[check.passed][0]}, {check.finding}")
        say("decoding in bfloat16")
        rounded = nextn.load(folder, device=device, dtype="bfloat16").eval()
        checks.append(bfloat16_divergence(Subject(rounded, subject.prompts, max_new_tokens)))
    title = f"{plural(len(given.prompts), 'prompt')} ({name}), {max_new_tokens} tokens each, drafts: {subject.drafter}"
    print_checks(Console(), title, checks)
    if json is not None:
        write_json(json, _figures(checks, subject, given, device))
    if any(check.passed is False for check in checks):
        raise typer.Exit(1)


def _figures(checks: list[Check], subject: Subject, given: PromptSet, device: str) -> dict[str, Any]:
    """All checks and how they were made, ready for JSON."""
    return {
        "is_lossless": all(check.passed is not False for check in checks),
        "checks": [vars(check) for check in checks],
        "settings": {
            "drafter": subject.drafter,
            "draft_lengths": list(subject.draft_lengths),
            "num_prompts": len(subject.prompts),
            "max_new_tokens": subject.max_new_tokens,
        },
        "provenance": collect(seed=0, device=device, corpus=given.source),
    }
