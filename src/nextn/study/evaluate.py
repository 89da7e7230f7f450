"""Evaluates one trained model: losses, acceptance, speed, share of Python that parses, sizes, tasks."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nextn.config import EvaluationConfig, Recipe
from nextn.data import Batch, validation_rows
from nextn.decoding import AcceptanceStatistics, GenerationResult, generate
from nextn.decoding.resolve import USUAL_DRAFT_LENGTH
from nextn.errors import ConfigError
from nextn.evaluation.free_running import ARM_TEMPERATURES, held_out_prompts
from nextn.evaluation.interleaving import rotated
from nextn.evaluation.repetition import mean_repeated_share
from nextn.evaluation.results import Speedup
from nextn.mtp import MTPModel
from nextn.mtp.cost import model_cost
from nextn.study.code_quality import function_prompts, parses
from nextn.study.definition import ModelEvaluationConfig
from nextn.training import PreparedData, evaluate_teacher_forced, loss_by_position
from nextn.wording import plural

TIMED = ("decode_tok_per_s_plain", "decode_tok_per_s", "decode_speedup_greedy", "decode_speedup_sampled")
"""Measures by wall clock; all others are the same whenever they are measured on one machine."""

DECODING_BATCH_SIZE = 32
"""Prompts decoded at a time where nothing is timed."""

NUM_BUCKETS = 8
"""Parts of a row that the loss by position tells apart."""


@dataclass(frozen=True)
class RunMetrics:
    """What was measured of one model.

    Attributes:
        values: by full name (`nextn.study.metrics`); a metric without a case is left out, so all are finite.
        loss_by_position: loss where 0, 1, ... eighths of a row are before the token, nats, [8].
        num_by_position: labels counted in them, [8].
    """

    values: dict[str, float]
    loss_by_position: tuple[float, ...]
    num_by_position: tuple[int, ...]


def _silent(text: str) -> None:
    pass


def evaluate_model(
    model: MTPModel,
    data: PreparedData,
    recipe: Recipe,
    evaluation: ModelEvaluationConfig,
    *,
    draft_model: MTPModel | None = None,
    say: Callable[[str], None] = _silent,
) -> RunMetrics:
    """Measure a trained model on held-out text. All but `TIMED` is the same for the same weights and settings.

    Each depth drafts one token: N = K. A model without MTP has no acceptance and no speedup, unless a draft model
    drafts for it (N = 3).

    Args:
        model: with the tokenizer of `data`.
        data: its corpus; the part held out is read.
        recipe: as it was trained: the length of rows, documents isolated or not, rows per forward.
        evaluation: how much of everything.
        draft_model: drafts in place of the MTP depths; its parameters count as the model's.
        say: told what begins.

    Raises:
        ConfigError: no function's beginning and completion fit into a row; tasks are asked for and the harness is not
            installed.
        DataError: the held-out text is too short for the rows or prompts wanted; a task is unknown.
        GenerationError: prompts and new tokens exceed the model's context.
    """
    sequence_length = recipe.data.sequence_length
    rows = validation_rows(data.validation, sequence_length, evaluation.num_rows)
    values = _sizes(model, draft_model, sequence_length)
    say(f"reading {len(rows.input_ids)} x {sequence_length} held-out tokens")
    values |= _losses(model, data, recipe, rows)
    losses, counts = loss_by_position(
        model,
        rows,
        num_buckets=NUM_BUCKETS,
        rows_per_forward=_rows_per_forward(recipe),
        isolate_documents=recipe.data.isolate_documents,
    )
    values |= _near_and_far(losses, counts)
    if evaluation.num_prompts:
        values |= _decoding(model, data, evaluation, _Drafting.of(model, draft_model), say)
    if evaluation.num_completions:
        values |= _parse_share(model, data, sequence_length, evaluation, say)
    if evaluation.tasks:
        say(f"asking {', '.join(evaluation.tasks)}")
        values |= _task_scores(model, evaluation)
    return RunMetrics(values, tuple(losses), tuple(counts))


def _sizes(model: MTPModel, draft_model: MTPModel | None, sequence_length: int) -> dict[str, float]:
    cost = model_cost(model, sequence_length)
    num_drafting = 0 if draft_model is None else model_cost(draft_model, sequence_length).num_parameters
    return {
        "num_parameters": float(cost.num_parameters + num_drafting),
        "num_mtp_parameters": float(cost.num_mtp_parameters),
    }


# -------------------------------------------------------------------------------------------------------------- losses


def _losses(model: MTPModel, data: PreparedData, recipe: Recipe, rows: Batch) -> dict[str, float]:
    forced = evaluate_teacher_forced(
        model,
        rows,
        data.validation.bytes_per_token,
        rows_per_forward=_rows_per_forward(recipe),
        isolate_documents=recipe.data.isolate_documents,
    )
    main, *of_depths = forced.loss_per_depth
    values = {"loss": main, "bits_per_byte": forced.bits_per_byte_per_depth[0]}
    return values | {f"loss_of_depth_{depth}": loss for depth, loss in enumerate(of_depths, start=1)}


def _rows_per_forward(recipe: Recipe) -> int:
    return recipe.training.micro_batch_size or recipe.training.batch_size


def _near_and_far(losses: Sequence[float], counts: Sequence[int]) -> dict[str, float]:
    """Losses of the first and the last quarter of a row, each label counting the same.

    >>> _near_and_far([4.0, 3.0, 0.0, 0.0, 0.0, 0.0, 2.0, 1.0], [1, 3, 9, 9, 9, 9, 1, 1])
    {'loss_near': 3.25, 'loss_far': 1.5}
    """
    quarter = NUM_BUCKETS // 4
    parts = {"loss_near": slice(None, quarter), "loss_far": slice(-quarter, None)}
    values = {}
    for name, part in parts.items():
        if total := sum(counts[part]):
            nats = (loss * count for loss, count in zip(losses[part], counts[part], strict=True))
            values[name] = sum(nats) / total
    return values


# ------------------------------------------------------------------------------------------------------------ decoding


@dataclass(frozen=True)
class _Drafting:
    """How a model is decoded: N, and what drafts. N = 0 is plain decoding."""

    draft_length: int
    drafter: MTPModel | Literal["mtp"] = "mtp"

    @classmethod
    def of(cls, model: MTPModel, draft_model: MTPModel | None) -> _Drafting:
        return cls(model.num_depths) if draft_model is None else cls(USUAL_DRAFT_LENGTH, draft_model)

    def decode(self, model: MTPModel, prompts: Sequence[str | list[int]], **options: Any) -> GenerationResult:
        return generate(model, prompts, draft_length=self.draft_length, drafter=self.drafter, **options)


PLAIN = _Drafting(0)


def _decoding(
    model: MTPModel,
    data: PreparedData,
    evaluation: ModelEvaluationConfig,
    drafting: _Drafting,
    say: Callable[[str], None],
) -> dict[str, float]:
    """Acceptance and repetition on all prompts, speed on some; text is not ended at EOS, so that all is equal work."""
    wanted = EvaluationConfig(
        num_prompts=evaluation.num_prompts,
        prompt_length=evaluation.prompt_length,
        max_new_tokens=evaluation.max_new_tokens,
    )
    prompts = held_out_prompts(data.validation, wanted).prompts
    values: dict[str, float] = {}
    say(f"decoding {plural(len(prompts), 'held-out prompt')}")
    for arm, temperature in ARM_TEMPERATURES.items():
        is_sampled = temperature > 0
        if not (drafting.draft_length or is_sampled):
            continue  # plain greedy text is asked nothing
        result = drafting.decode(
            model,
            prompts,
            max_new_tokens=evaluation.max_new_tokens,
            temperature=temperature,
            batch_size=DECODING_BATCH_SIZE,
            eos_token_id=None,
        )
        values |= _acceptance(arm, result.stats)
        values["repeated_share" if is_sampled else "repeated_share_greedy"] = mean_repeated_share(result.token_ids)
    if evaluation.num_timed_prompts and evaluation.max_new_tokens > 1:  # a prompt's first token is not timed
        say(f"timing {plural(evaluation.num_timed_prompts, 'held-out prompt')}")
        values |= _speed(model, prompts[: evaluation.num_timed_prompts], evaluation, drafting)
    return values


def _acceptance(arm: str, stats: AcceptanceStatistics) -> dict[str, float]:
    """Acceptance by metric; what had no case is left out.

    >>> _acceptance("greedy", AcceptanceStatistics(2, {2: (1, 0, 1)}))  # doctest: +NORMALIZE_WHITESPACE
    {'al_greedy': 2.0, 'acceptance_greedy_1': 0.5, 'acceptance_greedy_2': 1.0,
     'acceptance_greedy_unconditional_1': 0.5, 'acceptance_greedy_unconditional_2': 0.5}
    >>> _acceptance("greedy", AcceptanceStatistics(2))
    {}
    """
    if not stats.num_drafts:
        return {}
    table = stats.to_table()  # there a ratio without cases is None
    kinds = {"": table["acceptance_conditional"], "_unconditional": table["acceptance_unconditional"]}
    return {f"al_{arm}": stats.mean_acceptance_length} | {
        f"acceptance_{arm}{kind}_{depth}": share
        for kind, shares in kinds.items()
        for depth, share in enumerate(shares, start=1)
        if share is not None
    }


def _speed(
    model: MTPModel, prompts: Sequence[list[int]], evaluation: ModelEvaluationConfig, drafting: _Drafting
) -> dict[str, float]:
    """Tokens per second, one prompt at a time, and speedups: medians over repeats, plain and with drafts in turn."""
    values: dict[str, float] = {}
    for arm, temperature in ARM_TEMPERATURES.items():
        if not drafting.draft_length and temperature:
            continue  # there is nothing to compare plain sampling with
        ways = [PLAIN, drafting] if drafting.draft_length else [PLAIN]
        rates = _decoding_rates(model, prompts, ways, evaluation, temperature)
        plain, fast = rates[0], rates[-1]
        if not temperature:
            values["decode_tok_per_s_plain"] = statistics.median(plain)
        if drafting.draft_length:
            values[f"decode_speedup_{arm}"] = Speedup.of_repeats(plain, fast).median
            if not temperature:
                values["decode_tok_per_s"] = statistics.median(fast)
    return values


def _decoding_rates(
    model: MTPModel,
    prompts: Sequence[list[int]],
    ways: Sequence[_Drafting],
    evaluation: ModelEvaluationConfig,
    temperature: float,
) -> list[list[float]]:
    """New tokens per second of each way, one entry per repeat, after a warm-up."""
    usual = {"max_new_tokens": evaluation.max_new_tokens, "temperature": temperature, "eos_token_id": None}
    rates: list[list[float]] = [[] for _ in ways]
    for way in ways:
        way.decode(model, prompts[:1], **usual)
    for repeat in range(evaluation.num_repeats):
        for index in rotated(range(len(ways)), repeat):
            rates[index].append(ways[index].decode(model, prompts, seed=repeat, **usual).decode_tok_per_s)
    return rates


# ------------------------------------------------------------------------------------------------------------- quality


def _parse_share(
    model: MTPModel,
    data: PreparedData,
    sequence_length: int,
    evaluation: ModelEvaluationConfig,
    say: Callable[[str], None],
) -> dict[str, float]:
    """Share of sampled completions that parse, of those of which it can be said; empty for text that is not Python."""
    documents, length = data.corpus.validation, evaluation.completion_length

    def fits(prompt: str) -> bool:
        return len(data.tokenizer.encode(prompt)) + length <= sequence_length

    prompts = function_prompts(documents, evaluation.num_completions, fits)
    if not prompts and function_prompts(documents, 1):
        raise ConfigError(
            f"evaluation.completion_length = {length}, but a row has data.sequence_length = {sequence_length} tokens, "
            "and no function's beginning fits in beside it; lower completion_length, or set num_completions = 0"
        )
    if not prompts:
        return {}
    prompts = tuple(prompts[index % len(prompts)] for index in range(evaluation.num_completions))
    say(f"completing {plural(len(prompts), 'function')}")
    result = PLAIN.decode(model, prompts, max_new_tokens=length, temperature=1.0, batch_size=DECODING_BATCH_SIZE)
    found = [
        parses(prompt, text, is_ended=reason == "eos")
        for prompt, text, reason in zip(prompts, result.texts, result.finish_reasons, strict=True)
    ]
    decided = [parsed for parsed in found if parsed is not None]
    return {"parse_share": sum(decided) / len(decided)} if decided else {}


def _task_scores(model: MTPModel, evaluation: ModelEvaluationConfig) -> dict[str, float]:
    """Scores of lm-evaluation-harness, `task/NAME/METRIC`; a filter of the answers follows the metric's name."""
    from nextn.evaluation.tasks import TaskSelection, evaluate_tasks

    assert model.tokenizer is not None, "tasks need a tokenizer"
    selection = TaskSelection.find(evaluation.tasks)
    with tempfile.TemporaryDirectory() as folder:
        model.tokenizer.save(Path(folder))
        results = evaluate_tasks(model, Path(folder), selection, limit=evaluation.task_limit)
    return {
        f"task/{score.task}/{score.metric}" + ("" if score.filter == "none" else f",{score.filter}"): score.value
        for score in results.scores
        if score.value is not None
    }
