"""What a training step costs: tokens per second, memory, and share of the machine's peak, ours beside transformers'.

    python benchmarks/train_step.py                                  # the demo's shape; K = 0..4; V = 256, 8k, 50k
    python benchmarks/train_step.py --vocab 8192 --depths 0 1 --turns 9 --device cuda
    python benchmarks/train_step.py --experts --profile              # ours alone, and where its time goes

One step is forward, backward and fused AdamW, without balancing of experts, on 4096 tokens, bfloat16 autocast, float32
weights. Both sides have the same weights and read the same tokens (random, with Zipf's frequencies); all variants of
one vocabulary take turns in one process, two timed steps at a turn. Overheads are relative to the same code at K = 0
and stand beside what floating-point operations predict. Peak memory is what a forward and backward allocate beyond
weights and optimizer state. Prints tables, then one JSON line.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from nextn.alignment import align
from nextn.config import ModelConfig, MTPConfig, ObjectiveConfig, load_recipe
from nextn.demo import DEMO_RECIPE
from nextn.model.device import resolve_device
from nextn.mtp import MTPModel
from nextn.mtp.cost import model_cost
from nextn.objective import HeadInput, StepObjective, chunked_losses, depth_weights, summed_cross_entropy, total_loss
from nextn.provenance import collect

CHUNK_SIZE = ObjectiveConfig().loss_chunk_size
GROUPS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "softmax and loss": ("softmax", "logsumexp", "nll_loss", "aten::exp"),
    "copies, casts, concatenation": ("aten::copy_", "aten::cat", "aten::index_select", "aten::index", "aten::clone"),
    "sorting and routing": ("aten::sort", "aten::topk", "aten::bincount", "aten::scatter", "aten::gather"),
}
"""Operators by what they do; the rest is elementwise work and overhead."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="+", default=[256, 8192, 50257], help="vocabulary sizes (V)")
    parser.add_argument("--depths", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="values of K")
    parser.add_argument("--rows", type=int, default=16, help="rows of a step (B)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row (T)")
    parser.add_argument("--turns", type=int, default=4, help="turns of each variant, two timed steps in each")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--experts",
        nargs="*",
        default=["grouped_mm"],
        help="transformers' implementations of experts; none: ours alone",
    )
    parser.add_argument("--no-memory", action="store_true", help="leave out the measurement of peak memory")
    parser.add_argument("--profile", action="store_true", help="also show where our step at the second K goes")
    parser.add_argument("--set", dest="assignments", nargs="*", default=[], metavar="model.KEY=VALUE")
    arguments = parser.parse_args()

    device = resolve_device(arguments.device)
    console = Console(width=None if Console().is_terminal else 140)
    peak = matmul_flops_per_s(device)
    console.print(
        f"{device}, {torch.get_num_threads()} threads, bfloat16 product of 2048 x 2048: {peak / 1e12:.2f} TFLOP/s"
    )
    rows: list[dict[str, Any]] = []
    for vocab_size in arguments.vocab:
        config = load_recipe(DEMO_RECIPE, [*arguments.assignments, f"model.vocab_size={vocab_size}"]).model
        shape = (arguments.rows, arguments.length)
        variants = build(config, arguments.depths, device, arguments.experts)
        measured = measure(variants, shape, arguments.turns, device, peak, not arguments.no_memory)
        print_steps(console, vocab_size, shape, measured)
        rows += measured
        if arguments.profile:
            print_profile(
                console, variants[min(1, len(arguments.depths) - 1)], zipf_tokens(config.vocab_size, shape, device)
            )
        del variants
        gc.collect()
    memory = loss_memory(max(arguments.vocab), arguments.depths, (arguments.rows, arguments.length), device)
    print_loss_memory(console, max(arguments.vocab), memory)
    machine = collect(seed=0, device=device)
    print(
        json.dumps(
            {
                "steps": rows,
                "loss_memory": memory,
                "matmul_flops_per_s": peak,
                "machine": machine["machine"],
                "libraries": machine["libraries"],
            }
        )
    )


# ------------------------------------------------------------------------------------------------------------ variants


class Variant:
    """One implementation at one K: `run` is forward and backward, `step` a whole optimizer step."""

    def __init__(
        self, name: str, model: nn.Module, loss: Callable[[Tensor], Tensor], ours: MTPModel, device: torch.device
    ):
        self.name, self.model, self.loss, self.num_depths = name, model, loss, ours.num_depths
        self.cost = lambda length: model_cost(ours, length)
        self.vocab_size = ours.config.vocab_size
        self.device = device
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def run(self, input_ids: Tensor) -> Tensor:
        self.model.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            loss = self.loss(input_ids)
        loss.backward()
        return loss.detach()

    def step(self, input_ids: Tensor) -> float:
        loss = self.run(input_ids)
        self.optimizer.step()
        return loss.item()


def build(config: ModelConfig, depths: list[int], device: torch.device, experts: list[str]) -> list[Variant]:
    """Ours at every K, then transformers' with the same weights."""
    variants, peers = [], []
    for num_depths in depths:
        ours = MTPModel(config, MTPConfig(num_depths=num_depths)).initialize(seed=0).train().to(device)
        weights = depth_weights(ObjectiveConfig(), num_depths)
        objective = StepObjective(weights, chunk_size=CHUNK_SIZE)

        def our_loss(input_ids: Tensor, ours: MTPModel = ours, objective: StepObjective = objective) -> Tensor:
            return ours(input_ids, objective=objective).loss

        variants.append(Variant("ours", ours, our_loss, ours, device))
        for implementation in experts:
            from transformers_mtp import TransformersMTP

            theirs = TransformersMTP(ours, implementation).to(device)

            def their_loss(
                input_ids: Tensor, theirs: TransformersMTP = theirs, weights: tuple[float, ...] = weights
            ) -> Tensor:
                return theirs(input_ids, weights)

            peers.append(Variant(f"transformers, {implementation}", theirs, their_loss, ours, device))
    return variants + sorted(peers, key=lambda peer: peer.name)


def zipf_tokens(vocab_size: int, shape: tuple[int, int], device: torch.device, seed: int = 0) -> Tensor:
    """Random ids int64 [B, T]; id v has frequency proportional to 1 / (v + 1), about as words have."""
    frequencies = 1.0 / torch.arange(1, vocab_size + 1)
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.multinomial(frequencies, shape[0] * shape[1], replacement=True, generator=generator)
        .view(shape)
        .to(device)
    )


# --------------------------------------------------------------------------------------------------------- measurement


def measure(
    variants: list[Variant],
    shape: tuple[int, int],
    num_turns: int,
    device: torch.device,
    peak: float,
    with_memory: bool,
) -> list[dict[str, Any]]:
    """All variants in turn; the first loss of all must agree.

    A turn is four steps on new tokens, of which the first two are not timed: the step before was another variant's,
    which has filled caches with its own (that of the CPU's matrix library above all). Every other turn goes backwards.
    """
    seconds: list[list[float]] = [[] for _ in variants]
    losses: list[float] = [0.0] * len(variants)
    for turn in range(num_turns + 1):
        batches = [zipf_tokens(variants[0].vocab_size, shape, device, seed=4 * turn + index) for index in range(4)]
        order = list(enumerate(variants))
        for place, variant in order if turn % 2 else reversed(order):
            for index, input_ids in enumerate(batches):
                started = now(device)
                loss = variant.step(input_ids)
                if turn == index == 0:
                    losses[place] = loss
                if turn and index >= 2:
                    seconds[place].append(now(device) - started)
    by_depth = {
        variant.num_depths: loss for variant, loss in zip(variants, losses, strict=True) if variant.name == "ours"
    }
    rows = []
    for variant, times, loss in zip(variants, seconds, losses, strict=True):
        variant.model.zero_grad(set_to_none=True)
        if abs(loss - by_depth[variant.num_depths]) > 1e-3 * loss:
            raise RuntimeError(
                f"{variant.name} computes {loss}, ours {by_depth[variant.num_depths]}: not the same loss"
            )
        cost = variant.cost(shape[1])
        flops = 3 * (cost.trunk_flops_per_token + cost.mtp_flops_per_token) * shape[0] * shape[1]
        step_s = statistics.median(times)
        rows.append(
            {
                "name": variant.name,
                "vocab_size": variant.vocab_size,
                "num_depths": variant.num_depths,
                "first_loss": loss,
                "step_s": step_s,
                "step_s_range": [min(times), max(times)],
                "tok_per_s": shape[0] * shape[1] / step_s,
                "flops_utilisation": flops / step_s / peak,
                "overhead_by_flops": cost.mtp_flops_overhead,
                "peak_bytes": peak_bytes(functools.partial(variant.run, input_ids), device) if with_memory else None,
            }
        )
    plain = {row["name"]: row["step_s"] for row in rows if row["num_depths"] == 0}
    ours = {row["num_depths"]: row["step_s"] for row in rows if row["name"] == "ours"}
    for row in rows:
        row["overhead"] = row["step_s"] / plain[row["name"]] - 1 if row["name"] in plain else None
        row["times_faster_ours"] = row["step_s"] / ours[row["num_depths"]]
    return rows


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def matmul_flops_per_s(device: torch.device, size: int = 2048) -> float:
    """Best of ten bfloat16 products: what the machine can do."""
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    times = []
    for _ in range(10):
        started = now(device)
        a @ b
        times.append(now(device) - started)
    return 2 * size**3 / min(times)


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Most memory that `run` holds at once beyond what is there when it starts."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None
    results = profiler.profiler.kineto_results
    assert results is not None
    held = most = 0
    for event in sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def loss_memory(
    vocab_size: int, depths: list[int], shape: tuple[int, int], device: torch.device, hidden_size: int = 192
) -> dict[str, dict[int, int]]:
    """Peak bytes of head and loss alone, forward and backward, given the states of all depths."""
    input_ids = zipf_tokens(vocab_size, shape, device)
    weight = torch.randn(vocab_size, hidden_size, device=device, requires_grad=True)
    result: dict[str, dict[int, int]] = {"chunked": {}, "plain": {}}
    for num_depths in depths:
        aligned = [align(input_ids, depth) for depth in range(num_depths + 1)]
        states = [
            torch.randn(shape[0], part.num_positions, hidden_size, device=device, requires_grad=True)
            for part in aligned
        ]
        weights = (1.0, *depth_weights(ObjectiveConfig(), num_depths))

        def chunked(aligned: Any = aligned, states: Any = states, weights: Any = weights) -> None:
            coefficients = [part.valid.float() / part.valid.sum() for part in aligned]
            inputs = [HeadInput(state, weight) for state in states]
            labels = [part.labels for part in aligned]
            with torch.autocast(device.type, dtype=torch.bfloat16):
                total, _ = chunked_losses(inputs, labels, coefficients, weights, CHUNK_SIZE)
            total.backward()

        def plain(aligned: Any = aligned, states: Any = states, weights: Any = weights) -> None:
            with torch.autocast(device.type, dtype=torch.bfloat16):
                losses = [
                    summed_cross_entropy(HeadInput(state, weight).logits(), part.labels) / part.valid.sum()
                    for state, part in zip(states, aligned, strict=True)
                ]
                total_loss(losses[0], losses[1:], weights[1:]).backward()

        for name, run in (("chunked", chunked), ("plain", plain)):
            for tensor in (weight, *states):
                tensor.grad = None
            result[name][num_depths] = peak_bytes(run, device)
    return result


# -------------------------------------------------------------------------------------------------------------- tables


def print_steps(console: Console, vocab_size: int, shape: tuple[int, int], rows: list[dict[str, Any]]) -> None:
    table = Table(
        title=f"V = {vocab_size}, {shape[0]} x {shape[1]} tokens a step, median of interleaved steps", box=box.SIMPLE
    )
    for heading in ("", "K", "step (s)", "range", "tok/s", "of peak", "overhead", "by FLOPs", "peak MB", "ours faster"):
        table.add_column(heading, justify="right")
    for row in rows:
        low, high = row["step_s_range"]
        table.add_row(
            row["name"],
            str(row["num_depths"]),
            f"{row['step_s']:.3f}",
            f"{low:.3f}-{high:.3f}",
            f"{row['tok_per_s']:,.0f}",
            f"{row['flops_utilisation']:.0%}",
            "" if row["overhead"] is None else f"{row['overhead']:+.1%}",
            f"{row['overhead_by_flops']:+.1%}",
            "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:,.0f}",
            "" if row["name"] == "ours" else f"{row['times_faster_ours']:.2f}x",
        )
    console.print(table)


def print_loss_memory(console: Console, vocab_size: int, memory: dict[str, dict[int, int]]) -> None:
    table = Table(title=f"peak memory of head and loss alone, V = {vocab_size} (MB)", box=box.SIMPLE)
    table.add_column("K", justify="right")
    for name in memory:
        table.add_column(name, justify="right")
    for num_depths in memory["chunked"]:
        table.add_row(str(num_depths), *(f"{memory[name][num_depths] / 1e6:,.0f}" for name in memory))
    console.print(table)


def print_profile(console: Console, variant: Variant, input_ids: Tensor) -> None:
    """Share of processor time by group of operators in one step."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        variant.step(input_ids)
    events = profiler.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    shares = dict.fromkeys(GROUPS, 0.0)
    for event in events:
        for group, names in GROUPS.items():
            if any(name in event.key for name in names):
                shares[group] += event.self_cpu_time_total / total
                break
    shares["elementwise, norms, overhead"] = 1 - sum(shares.values())
    table = Table(title=f"where our step goes, K = {variant.num_depths}, V = {variant.vocab_size}", box=box.SIMPLE)
    table.add_column("operators")
    table.add_column("share of CPU time", justify="right")
    for name, share in shares.items():
        table.add_row(name, f"{share:.1%}")
    console.print(table)


if __name__ == "__main__":
    main()
