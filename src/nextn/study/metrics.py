"""Defines the metrics of a study: of a run alone, and of a run against the baseline's of the same seed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """How a figure is called, shown and judged.

    Attributes:
        title: heading of its column.
        meaning: one sentence with the unit.
        better: which way is an improvement; None: it is shown, and not compared (the timed steps of a variant are the
            same for all its seeds).
        form: how it is shown: `number` (three digits after the point), `share` (percent), `count` (1.2M) or `ratio`
            (1.05x).
        per_depth: the name takes a suffix `_1`, `_2`, ... for the depth.
        pair: it compares with the baseline of the same seed by itself, so no difference from the baseline is formed.
    """

    title: str
    meaning: str
    better: Literal["lower", "higher"] | None = None
    form: Literal["number", "share", "count", "ratio"] = "number"
    per_depth: bool = False
    pair: bool = False


METRICS = {
    "loss": Metric("loss", "next-token loss on held-out text, nats per token", "lower"),
    "bits_per_byte": Metric("bits per byte", "the same, in bits per byte of text", "lower"),
    "loss_near": Metric(
        "loss near", "next-token loss where its document gives less than a quarter of a row as context", "lower"
    ),
    "loss_far": Metric("loss far", "next-token loss where it gives more than three quarters of a row", "lower"),
    "loss_of_depth": Metric("loss of depth", "loss of MTP depth k with true tokens, nats", "lower", per_depth=True),
    "al_greedy": Metric("AL greedy", "tokens per trunk forward, greedy, bonus included", "higher"),
    "al_sampled": Metric("AL sampled", "tokens per trunk forward at temperature 1, bonus included", "higher"),
    "acceptance_greedy": Metric(
        "accepted, greedy", "share of drafts k that are accepted, given that those before were, greedy", "higher",
        "share", per_depth=True,
    ),
    "acceptance_sampled": Metric(
        "accepted, sampled", "the same at temperature 1", "higher", "share", per_depth=True
    ),
    "acceptance_greedy_unconditional": Metric(
        "accepted in all, greedy", "share of cycles in which draft k is accepted, greedy", "higher", "share",
        per_depth=True,
    ),
    "acceptance_sampled_unconditional": Metric(
        "accepted in all, sampled", "the same at temperature 1", "higher", "share", per_depth=True
    ),
    "decode_tok_per_s_plain": Metric("plain tok/s", "plain greedy decoding, one row, eager", "higher", "count"),
    "decode_tok_per_s": Metric("MTP tok/s", "greedy decoding with drafts, one row, eager", "higher", "count"),
    "decode_speedup_greedy": Metric("speedup greedy", "greedy decoding against plain, interleaved", "higher", "ratio"),
    "decode_speedup_sampled": Metric("speedup sampled", "the same at temperature 1", "higher", "ratio"),
    "parse_share": Metric(
        "parses", "share of sampled completions of Python functions that parse, of those that can be judged", "higher",
        "share",
    ),
    "repeated_share": Metric("repeats", "share of the sampled text that repeats itself (16 tokens)", "lower", "share"),
    "repeated_share_greedy": Metric("repeats, greedy", "the same of greedy text: loops flatter AL", "lower", "share"),
    "training_tok_per_s": Metric("training tok/s", "tokens trained per second, steps interleaved", None, "count"),
    "training_flops": Metric("training FLOPs", "floating-point operations of the whole training", "lower", "count"),
    "peak_memory_bytes": Metric("peak memory", "largest memory of the training process, bytes", "lower", "count"),
    "expert_load_trunk": Metric(
        "expert load, trunk", "load of the busiest expert relative to the mean, at the end, mean over layers", "lower"
    ),
    "expert_load_mtp": Metric("expert load, MTP", "the same in the MTP blocks", "lower"),
    "num_parameters": Metric("parameters", "of trunk and MTP modules", "lower", "count"),
    "num_mtp_parameters": Metric("MTP parameters", "of the MTP modules alone", "lower", "count"),
    "time_overhead": Metric(
        "time overhead", "seconds of a training step beside the baseline's, less 1", "lower", "share", pair=True
    ),
    "flops_overhead": Metric(
        "FLOPs overhead", "FLOPs of a training step beside the baseline's, less 1", "lower", "share", pair=True
    ),
    "steps_ratio": Metric(
        "steps", "steps taken, relative to those the baseline needs to the same loss", "lower", "ratio", pair=True
    ),
    "flops_ratio": Metric(
        "FLOPs", "FLOPs spent, relative to those the baseline needs to the same loss", "lower", "ratio", pair=True
    ),
    "effective_speedup": Metric(
        "effective speedup", "time the baseline needs to the same loss, relative to the time taken", "higher", "ratio",
        pair=True,
    ),
    "loss_at_equal_flops": Metric(
        "loss, equal FLOPs", "loss less that of the baseline trained with as many FLOPs", "lower", pair=True
    ),
    "loss_at_equal_time": Metric(
        "loss, equal time", "loss less that of the baseline trained for as long", "lower", pair=True
    ),
}  # fmt: skip
"""By name. Beside them, `task/NAME/METRIC` is a score of lm-evaluation-harness (higher is better, but for perplexities
and the like)."""

_TASK = Metric("task", "score of lm-evaluation-harness", "higher")
_TASK_LOSS = Metric("task", "score of lm-evaluation-harness", "lower")
_TASK_LOSSES = ("perplexity", "bits_per_byte", "brier_score")


def metric_of(name: str) -> Metric | None:
    """The metric that a full name stands for, depth's suffix and tasks included; None: there is none.

    >>> metric_of("acceptance_greedy_2").title
    'accepted, greedy'
    >>> metric_of("acceptance_greedy"), metric_of("loss_2")
    (None, None)
    """
    if name.startswith("task/") and name.count("/") == 2:
        return _TASK_LOSS if any(metric in name.rpartition("/")[2] for metric in _TASK_LOSSES) else _TASK
    stem, _, depth = name.rpartition("_")
    if re.fullmatch(r"[1-9]\d*", depth) and stem in METRICS and METRICS[stem].per_depth:
        return METRICS[stem]
    found = METRICS.get(name)
    return None if found is None or found.per_depth else found


def metrics_in(names: Iterable[str]) -> list[str]:
    """Names without repeats in the order of `METRICS`: depths one after the other, tasks at the end, by name.

    >>> metrics_in(["task/x/acc", "acceptance_greedy_2", "loss", "acceptance_greedy_1", "loss"])
    ['loss', 'acceptance_greedy_1', 'acceptance_greedy_2', 'task/x/acc']
    """
    places = {stem: place for place, stem in enumerate(METRICS)}

    def place(name: str) -> tuple[int, int, str]:
        stem, _, depth = name.rpartition("_")
        has_depth = stem in METRICS and METRICS[stem].per_depth
        return places.get(stem if has_depth else name, len(places)), int(depth) if has_depth else 0, name

    return sorted(dict.fromkeys(names), key=place)
