"""One checkpoint, four engines: the same tokens? whose acceptance? how fast?

    python benchmarks/engines.py runs/demo --engines .engines --out benchmarks/engines.json

The checkpoint is exported for transformers, vLLM and llama.cpp, served on loopback, and asked to continue the same
held-out prompts greedily, float32, two threads each. All servers stay up, and every prompt goes to every arm in turn,
so a slow minute of the machine hits all alike. Before each request the machine rests, since engines wait for work by
spinning. A rate is new tokens over the time from request to answer, prompt included, HTTP included where there is a
server. Engines that are not installed are left out, and it says so.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import nextn
from nextn.checkpoint import write_json
from nextn.interop.engines import layer_patterns
from nextn.interop.export import export_model
from nextn.interop.serving import Completion, llamacpp_binary, llamacpp_server, vllm_python, vllm_server
from nextn.mtp import MTPModel, find_checkpoint
from nextn.report.measurement import held_out_prompts
from nextn.report.provenance import collect
from nextn.training import prepare_held_out, read_recipe

NUM_THREADS = 2
REST_S = {"vllm": 2.0}
"""Pause after a request, by engine, else 0.3 s: vLLM spins for a second, and the next engine would run at a tenth."""

DRAFT_LENGTHS = (0, 1, 2, 3)
Complete = Callable[[Sequence[int], int], Completion]


@dataclass
class Arm:
    """An engine at one N, and what it answered: per prompt, and the rates of every repeat."""

    engine: str
    draft_length: int
    complete: Complete
    answers: list[Completion] = field(default_factory=list)
    tok_per_s: list[float] = field(default_factory=list)

    @property
    def mean_acceptance_length(self) -> float:
        num_drafts = sum(answer.num_drafts for answer in self.answers)
        return 1 + sum(answer.num_accepted_tokens for answer in self.answers) / num_drafts if num_drafts else 1.0


def our_arm(model: MTPModel, draft_length: int, drafting: str = "as_trained") -> Complete:
    def complete(prompt_ids: Sequence[int], max_new_tokens: int) -> Completion:
        started = time.perf_counter()
        result = nextn.generate(
            model, [list(prompt_ids)], max_new_tokens=max_new_tokens, draft_length=draft_length, drafting=drafting
        )
        wall_s, stats = time.perf_counter() - started, result.stats
        return Completion(
            result.token_ids[0], stats.num_drafts, stats.num_draft_tokens, stats.num_accepted_tokens, wall_s
        )

    return complete


def transformers_arm(folder: Path, model: MTPModel, use_mtp: bool) -> Complete:
    """In this process. It tells no acceptance: trunk forwards after the prompt's are counted, which are its cycles."""
    from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM

    DeepseekV3ForCausalLM._keys_to_ignore_on_load_unexpected = layer_patterns(model.config, model.mtp_config)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    num_forwards = 0

    def count(*_: object) -> None:
        nonlocal num_forwards
        num_forwards += 1

    theirs.model.layers[0].register_forward_hook(count)

    def complete(prompt_ids: Sequence[int], max_new_tokens: int) -> Completion:
        nonlocal num_forwards
        num_forwards = 0
        ids = torch.tensor([list(prompt_ids)])
        options = {"use_mtp": True} if use_mtp else {}
        started = time.perf_counter()
        out = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False, **options
        )
        wall_s = time.perf_counter() - started
        tokens = tuple(out[0, ids.shape[1] :].tolist())
        num_drafts = num_forwards - 1 if use_mtp else 0
        accepted = len(tokens) - 1 - num_drafts if use_mtp else 0
        return Completion(tokens, num_drafts, num_drafts, accepted, wall_s)

    return complete


def all_arms(path: Path, model: MTPModel, engines: Path, work: Path, stack: ExitStack, say: Callable) -> list[Arm]:
    arms = [Arm("nextn", length, our_arm(model, length)) for length in DRAFT_LENGTHS]
    folder = export_model(path, "hf", work / "hf").path
    arms += [Arm("transformers", length, transformers_arm(folder, model, bool(length))) for length in (0, 1)]
    if vllm_python(engines).exists():
        for length in DRAFT_LENGTHS:
            say(f"starting vLLM, N = {length}")
            server = stack.enter_context(vllm_server(vllm_python(engines), folder, length))
            arms.append(Arm("vllm", length, server.complete))
    else:
        say(f"vLLM is not installed in {engines}: left out (make engines)")
    if binary := llamacpp_binary(engines):
        file = export_model(path, "gguf", work / "model.gguf").path
        for length in DRAFT_LENGTHS:
            server = stack.enter_context(llamacpp_server(binary, file, length, NUM_THREADS))
            arms.append(Arm("llamacpp", length, server.complete))
    else:
        say(f"llama.cpp is not installed in {engines}: left out (make engines)")
    return arms


def measure(arms: list[Arm], prompts: Sequence[Sequence[int]], max_new_tokens: int, num_repeats: int) -> None:
    for arm in arms:  # warm-up
        arm.complete(prompts[0], 8)
        time.sleep(REST_S.get(arm.engine, 0.3))
    for repeat in range(num_repeats):
        walls = {id(arm): 0.0 for arm in arms}
        num_tokens = dict.fromkeys(walls, 0)
        for number, prompt in enumerate(prompts):
            turn = (number + repeat) % len(arms)
            for arm in (*arms[turn:], *arms[:turn]):
                answer = arm.complete(prompt, max_new_tokens)
                time.sleep(REST_S.get(arm.engine, 0.3))
                walls[id(arm)] += answer.wall_s
                num_tokens[id(arm)] += len(answer.token_ids)
                if repeat == 0:
                    arm.answers.append(answer)
        for arm in arms:
            arm.tok_per_s.append(num_tokens[id(arm)] / walls[id(arm)])


def first_difference(a: Sequence[int], b: Sequence[int], end: int | None) -> int | None:
    """Index of the first token that differs, None if there is none; a final end of text may be left out."""
    a, b = [t for t in a if t != end], [t for t in b if t != end]
    if a == b:
        return None
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--engines", type=Path, default=Path(".engines"))
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
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        arms = all_arms(folder, model, arguments.engines, work, stack, console.print)
        console.print(f"{len(prompts)} prompts, {len(arms)} arms, {arguments.repeats} repeats")
        measure(arms, prompts, arguments.max_new_tokens, arguments.repeats)

    reference = {arm.draft_length: arm for arm in arms if arm.engine == "nextn"}
    medians = {(arm.engine, arm.draft_length): statistics.median(arm.tok_per_s) for arm in arms}
    rows = []
    for arm in arms:
        differences = [
            first_difference(answer.token_ids, ours.token_ids, model.tokenizer.eos_token_id)
            for answer, ours in zip(arm.answers, reference[0].answers, strict=True)
        ]
        predicted = None
        if arm.draft_length and arm.engine != "nextn":
            emulated = Arm(arm.engine, arm.draft_length, our_arm(model, arm.draft_length, arm.engine))
            emulated.answers = [emulated.complete(prompt, arguments.max_new_tokens) for prompt in prompts]
            predicted = emulated.mean_acceptance_length
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
