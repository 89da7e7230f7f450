"""What MTP costs in training: tokens per second with K = 0 and K > 0, beside what FLOPs predict, and a profile.

    python benchmarks/mtp_training_cost.py                       # the demo's shape, K = 0, 1 and the demo's own K
    python benchmarks/mtp_training_cost.py --depths 1 2 3 --steps 20 --set model.num_hidden_layers=8

Whole optimizer steps on real text, steps of all variants in turn in one process; prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from nextn.cli.demo import DEMO_RECIPE
from nextn.config import Recipe, load_recipe
from nextn.mtp.cost import model_cost
from nextn.report.provenance import collect
from nextn.training import PreparedData, Trainer, fit_vocabulary, new_model, prepare_data, time_steps

GROUPS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "softmax and loss": ("softmax", "nll_loss"),
    "copies, casts, concatenation": ("aten::copy_", "aten::cat", "aten::index_select", "aten::index", "aten::clone"),
    "sorting and routing": ("aten::sort", "aten::topk", "aten::bincount", "aten::scatter", "aten::gather"),
}
"""Operators by what they do; the rest is elementwise work and overhead."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2], help="values of K beside 0")
    parser.add_argument("--steps", type=int, default=12, help="timed steps per variant")
    parser.add_argument("--set", dest="assignments", nargs="*", default=[], metavar="TABLE.KEY=VALUE")
    arguments = parser.parse_args()

    recipe = load_recipe(DEMO_RECIPE, arguments.assignments)
    data = prepare_data(recipe.data)
    recipe = fit_vocabulary(recipe, data.tokenizer)
    num_tokens = recipe.training.batch_size * recipe.data.sequence_length
    seconds = time_steps(recipe, data, [0, *arguments.depths], num_timed=arguments.steps)

    rows = []
    plain = statistics.median(seconds[0])
    for num_depths, times in seconds.items():
        cost = model_cost(new_model(with_depths(recipe, num_depths), data.tokenizer), recipe.data.sequence_length)
        quartiles = statistics.quantiles(times, n=4)
        rows.append(
            {
                "num_depths": num_depths,
                "step_s": statistics.median(times),
                "step_s_quartiles": [quartiles[0], quartiles[2]],
                "tok_per_s": num_tokens / statistics.median(times),
                "overhead_measured": statistics.median(times) / plain - 1,
                "overhead_by_flops": cost.mtp_flops_overhead,
                "num_parameters": cost.num_parameters,
            }
        )
    console = Console()
    table = Table(title=f"training, {num_tokens} tokens per step, median of {arguments.steps} interleaved steps")
    for heading in ("K", "step (s)", "quartiles", "tokens/s", "overhead", "by FLOPs", "parameters"):
        table.add_column(heading, justify="right")
    for row in rows:
        low, high = row["step_s_quartiles"]
        table.add_row(
            str(row["num_depths"]),
            f"{row['step_s']:.3f}",
            f"{low:.3f}-{high:.3f}",
            f"{row['tok_per_s']:,.0f}",
            f"{row['overhead_measured']:+.1%}",
            f"{row['overhead_by_flops']:+.1%}",
            f"{row['num_parameters']:,}",
        )
    console.print(table)
    shares = profile_step(with_depths(recipe, arguments.depths[0]), data)
    profile_table = Table(title=f"where a step goes, K = {arguments.depths[0]}")
    profile_table.add_column("operators")
    profile_table.add_column("share of CPU time", justify="right")
    for name, share in shares.items():
        profile_table.add_row(name, f"{share:.1%}")
    console.print(profile_table)
    machine = collect(seed=recipe.training.seed)
    print(
        json.dumps({"rows": rows, "profile": shares, "machine": machine["machine"], "libraries": machine["libraries"]})
    )


def with_depths(recipe: Recipe, num_depths: int) -> Recipe:
    return replace(recipe, mtp=replace(recipe.mtp, num_depths=num_depths))


def profile_step(recipe: Recipe, data: PreparedData) -> dict[str, float]:
    """Share of CPU time by group of operators, in one optimizer step after two others."""
    with tempfile.TemporaryDirectory() as folder:
        model = new_model(recipe, data.tokenizer).train()
        trainer = Trainer(recipe, model, data.train, data.validation, Path(folder), evaluate=None, provenance={})
        for _ in range(2):
            trainer.step()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            trainer.step()
    events = profiler.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    shares = dict.fromkeys(GROUPS, 0.0)
    for event in events:
        for group, names in GROUPS.items():
            if any(name in event.key for name in names):
                shares[group] += event.self_cpu_time_total / total
                break
    return shares | {"elementwise, norms, overhead": 1 - sum(shares.values())}


if __name__ == "__main__":
    main()
