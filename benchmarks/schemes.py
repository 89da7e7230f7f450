"""The four schemes at equal tokens: loss and acceptance by depth, speed of training and of decoding.

    python benchmarks/schemes.py                              # trains what is not trained yet, then measures and prints
    python benchmarks/schemes.py --schemes parallel --train-only
    python benchmarks/schemes.py --set training.num_steps=40 --out runs/schemes-tiny

Every run has the same recipe, seed, data order and number of steps; `none` is the same trunk without MTP. An
interrupted run is resumed. Training rates come from whole optimizer steps of all variants in turn in one process,
decoding rates from plain and speculative decoding in turn. Prints tables, then one JSON line.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

import nextn
from nextn.config import MTPConfig, Recipe, load_recipe
from nextn.evaluation.free_running import ARM_TEMPERATURES, held_out_prompts, measure_arm
from nextn.evaluation.results import DecodingArm
from nextn.files import list_checkpoints, read_json, write_json
from nextn.mtp import SCHEMES
from nextn.mtp.cost import model_cost
from nextn.provenance import collect
from nextn.training import PreparedData, Trainer, fit_vocabulary, new_model, prepare_data, read_metrics

RECIPE = Path(__file__).parents[1] / "recipes" / "schemes.toml"
PLAIN = "none"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="+", default=[PLAIN, *SCHEMES], choices=[PLAIN, *SCHEMES])
    parser.add_argument("--out", type=Path, default=Path("runs/schemes"), help="one run folder per scheme in here")
    parser.add_argument("--train-only", action="store_true")
    parser.add_argument("--steps", type=int, default=12, help="timed training steps per scheme")
    parser.add_argument("--repeats", type=int, default=3, help="timed repeats of each decoding arm")
    parser.add_argument("--set", dest="assignments", nargs="*", default=[], metavar="TABLE.KEY=VALUE")
    arguments = parser.parse_args()

    recipe = load_recipe(RECIPE, arguments.assignments)
    data = prepare_data(recipe.data)
    recipe = fit_vocabulary(recipe, data.tokenizer)
    recipes = {scheme: with_scheme(recipe, scheme) for scheme in arguments.schemes}
    for scheme, variant in recipes.items():
        train(variant, data, arguments.out / scheme)
    if arguments.train_only:
        return
    rates = training_rates(recipes, data, arguments.steps)
    results = {
        scheme: measure(variant, data, arguments.out / scheme, rates[scheme], arguments.repeats)
        for scheme, variant in recipes.items()
    }
    print_tables(results)
    machine = collect(seed=recipe.training.seed)
    table = {"results": results, "machine": machine["machine"], "libraries": machine["libraries"]}
    write_json(arguments.out / "schemes.json", table)
    print(json.dumps(table))


def with_scheme(recipe: Recipe, scheme: str) -> Recipe:
    """The recipe with another scheme and nothing else changed; `none` has no depths."""
    if scheme == PLAIN:
        return replace(recipe, mtp=MTPConfig(num_depths=0))
    return replace(recipe, mtp=replace(recipe.mtp, scheme=scheme))


def train(recipe: Recipe, data: PreparedData, folder: Path) -> None:
    """Train to the end, from where the folder's run stands."""
    resume = (folder / "recipe.json").exists()
    provenance = collect(seed=recipe.training.seed, corpus=data.provenance())
    trainer = Trainer(
        recipe,
        new_model(recipe, data.tokenizer),
        data.train,
        data.validation,
        folder,
        evaluate=None,
        provenance=provenance,
    )
    trainer.train(resume=resume)


def training_rates(recipes: dict[str, Recipe], data: PreparedData, num_timed: int) -> dict[str, list[float]]:
    """Tokens per second of single optimizer steps, all schemes in turn, after three steps of warm-up."""
    seconds: dict[str, list[float]] = {scheme: [] for scheme in recipes}
    with tempfile.TemporaryDirectory() as folder:
        trainers = {}
        for scheme, recipe in recipes.items():
            model = new_model(recipe, data.tokenizer).train()
            where = Path(folder) / scheme
            trainers[scheme] = Trainer(recipe, model, data.train, data.validation, where, evaluate=None, provenance={})
        for index in range(num_timed + 3):
            for scheme, trainer in trainers.items():
                started = time.perf_counter()
                trainer.step()
                if index >= 3:
                    seconds[scheme].append(time.perf_counter() - started)
    gc.collect()
    num_tokens = next(iter(recipes.values())).training.batch_size * next(iter(recipes.values())).data.sequence_length
    return {scheme: [num_tokens / value for value in values] for scheme, values in seconds.items()}


def measure(recipe: Recipe, data: PreparedData, folder: Path, rates: list[float], repeats: int) -> dict[str, Any]:
    """Everything the tables show of one run."""
    model = nextn.load(list_checkpoints(folder)[-1])
    records = read_metrics(folder / "metrics.jsonl")
    evaluation = [record for record in records if record["kind"] == "evaluation"][-1]
    cost = model_cost(model, recipe.data.sequence_length)
    held_out = held_out_prompts(data.validation, recipe.evaluation)
    arms: dict[str, DecodingArm] = {}
    if model.scheme is not None:
        for name in ARM_TEMPERATURES:
            arms[name], _ = measure_arm(model, held_out, recipe.evaluation, name, repeats)
    return {
        "num_tokens": evaluation["num_tokens"],
        "loss_per_depth": evaluation["loss_per_depth"],
        "bits_per_byte": evaluation["bits_per_byte_per_depth"][0],
        "teacher_forced_accuracy": evaluation["teacher_forced_accuracy"],
        "num_mtp_parameters": cost.num_mtp_parameters,
        "flops_overhead": cost.mtp_flops_overhead,
        "train_tok_per_s": statistics.median(rates),
        "train_tok_per_s_range": [min(rates), max(rates)],
        "training_s": evaluation["training_s"],
        "date": read_json(folder / "provenance.json").get("date"),
        "arms": {
            name: {
                "mean_acceptance_length": arm.mean_acceptance_length,
                "acceptance_unconditional": arm.acceptance_unconditional,
                "acceptance_conditional": arm.acceptance_conditional,
                "plain_tok_per_s": statistics.median(arm.plain_tok_per_s),
                "mtp_tok_per_s": statistics.median(arm.speculative_tok_per_s),
                "speedup": [arm.speedup.median, arm.speedup.lowest, arm.speedup.highest],
                "identical": [arm.num_identical_outputs, arm.num_compared_outputs],
                "repeated_text_share": arm.repeated_text_share_speculative,
            }
            for name, arm in arms.items()
        },
    }


def print_tables(results: dict[str, dict[str, Any]]) -> None:
    console = Console(width=None if Console().is_terminal else 140)
    first = next(iter(results.values()))
    training = Table(
        title=f"held-out loss by depth (nats) after {first['num_tokens']:,} tokens, and cost of training",
        box=box.SIMPLE,
    )
    for heading in ("scheme", "depth 0", "1", "2", "3", "MTP parameters", "FLOPs", "tokens/s", "range"):
        training.add_column(heading, justify="right")
    for scheme, row in results.items():
        losses = [f"{loss:.3f}" for loss in row["loss_per_depth"]]
        low, high = row["train_tok_per_s_range"]
        training.add_row(
            scheme,
            *losses,
            *[""] * (4 - len(losses)),
            f"{row['num_mtp_parameters']:,}",
            f"{row['flops_overhead']:+.1%}",
            f"{row['train_tok_per_s']:,.0f}",
            f"{low:,.0f}-{high:,.0f}",
        )
    console.print(training)
    decoding = Table(title="decoding held-out prompts, N = K, speculative beside plain in turn", box=box.SIMPLE)
    for heading in (
        "scheme",
        "arm",
        "AL",
        "acceptance by depth",
        "plain tok/s",
        "MTP tok/s",
        "speedup",
        "same",
        "loops",
    ):
        decoding.add_column(heading, justify="right")
    for scheme, row in results.items():
        for name, arm in row["arms"].items():
            same, compared = arm["identical"]
            decoding.add_row(
                scheme,
                name,
                f"{arm['mean_acceptance_length']:.2f}",
                "  ".join("-" if share is None else f"{share:.2f}" for share in arm["acceptance_unconditional"]),
                f"{arm['plain_tok_per_s']:.0f}",
                f"{arm['mtp_tok_per_s']:.0f}",
                f"{arm['speedup'][0]:.2f}x ({arm['speedup'][1]:.2f}-{arm['speedup'][2]:.2f})",
                "-" if compared is None else f"{same}/{compared}",
                f"{arm['repeated_text_share']:.0%}",
            )
    console.print(decoding)


if __name__ == "__main__":
    main()
