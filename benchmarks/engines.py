"""One checkpoint, four engines: the same tokens? whose acceptance, and is it what our emulation predicts?

    python benchmarks/engines.py runs/demo --engines .engines --out benchmarks/engines.json

Speed beside these engines is also what `nextn bench PATH --peers transformers,vllm,llamacpp` measures, with the same
arms (`nextn.bench.peers`). Here nextn runs eagerly as a fifth engine at every N, and acceptance is predicted.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import nextn
from nextn.bench.peer_engines import peer_arms
from nextn.bench.peers import (
    PEERS,
    PeerArm,
    difference_before_end,
    mean_acceptance_length,
    measure_peers,
    our_arm,
)
from nextn.decoding import Decoder
from nextn.evaluation.free_running import held_out_prompts
from nextn.files import write_json
from nextn.mtp import MTPModel, find_checkpoint
from nextn.provenance import collect
from nextn.training import prepare_held_out, read_recipe

NUM_THREADS = 2

DRAFT_LENGTHS = (0, 1, 2, 3)


def eager_arm(model: MTPModel, draft_length: int, drafting: str = "as_trained") -> PeerArm:
    decoder = Decoder(model, draft_length=draft_length, drafting=drafting, weights="as_stored")
    return our_arm(draft_length, decoder.generate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--engines", type=Path, default=Path(".engines"))
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--num-prompts", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(NUM_THREADS)
    console = Console(stderr=True)

    folder = find_checkpoint(arguments.path)
    model, recipe = nextn.load(folder), read_recipe(folder / "recipe.json")
    settings = replace(recipe.evaluation, num_prompts=arguments.num_prompts, max_new_tokens=arguments.max_new_tokens)
    data = prepare_held_out(recipe.data, model.tokenizer, None, console.print)
    prompts = held_out_prompts(data.validation, settings).prompts
    with (
        tempfile.TemporaryDirectory() as work,
        peer_arms(
            arguments.peers.split(","),
            folder,
            model,
            DRAFT_LENGTHS,
            Path(work),
            engines=arguments.engines,
            dtype="float32",
            say=console.print,
        ) as theirs,
    ):
        arms = [*(eager_arm(model, length) for length in DRAFT_LENGTHS), *theirs]
        console.print(f"{len(prompts)} prompts, {len(arms)} arms, {arguments.repeats} repeats")
        measure_peers(arms, prompts, arguments.max_new_tokens, arguments.repeats)

    reference = {arm.draft_length: arm for arm in arms if arm.engine == "nextn"}
    medians = {(arm.engine, arm.draft_length): statistics.median(arm.tok_per_s) for arm in arms}
    rows = []
    for arm in arms:
        differences = [
            difference_before_end(answer.token_ids, ours.token_ids, model.tokenizer.eos_token_id)
            for answer, ours in zip(arm.answers, reference[0].answers, strict=True)
        ]
        predicted = None
        if arm.draft_length and arm.engine != "nextn":
            emulated = eager_arm(model, arm.draft_length, arm.engine)
            predicted = mean_acceptance_length(
                [emulated.complete(prompt, arguments.max_new_tokens) for prompt in prompts]
            )
        rows.append(
            {
                "engine": arm.engine,
                "draft_length": arm.draft_length,
                "num_identical_outputs": differences.count(None),
                "first_differences": differences,
                "mean_acceptance_length": arm.mean_acceptance_length,
                "mean_acceptance_length_predicted": predicted,
                "mean_acceptance_length_as_trained": reference[arm.draft_length].mean_acceptance_length,
                "tok_per_s": arm.tok_per_s,
                "speedup": medians[arm.engine, arm.draft_length] / medians[arm.engine, 0],
            }
        )
    print_table(rows, len(prompts))
    if arguments.out is not None:
        provenance = collect(seed=0, corpus=data.provenance())
        write_json(arguments.out, {"rows": rows, "num_prompts": len(prompts), "provenance": provenance})


def print_table(rows: list[dict], num_prompts: int) -> None:
    table = Table(title="greedy, float32, batch 1", title_justify="left")
    for heading in ("engine", "N", "same", "first difference", "AL", "predicted", "ours", "tok/s", "range", "speedup"):
        table.add_column(heading, justify="right")
    for row in rows:
        rates, predicted = row["tok_per_s"], row["mean_acceptance_length_predicted"]
        differing = [place for place in row["first_differences"] if place is not None]
        table.add_row(
            row["engine"],
            str(row["draft_length"]),
            f"{row['num_identical_outputs']}/{num_prompts}",
            str(min(differing)) if differing else "-",
            f"{row['mean_acceptance_length']:.3f}",
            "-" if predicted is None else f"{predicted:.3f}",
            f"{row['mean_acceptance_length_as_trained']:.3f}",
            f"{statistics.median(rates):.0f}",
            f"{min(rates):.0f}-{max(rates):.0f}",
            f"{row['speedup']:.2f}x",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
