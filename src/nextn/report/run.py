"""The report of one training run: facts from its folder, decoding measured now."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nextn.config import Recipe, to_table
from nextn.data import PackedTokens
from nextn.mtp import MTPModel
from nextn.mtp.cost import model_cost
from nextn.report.measurement import ARMS, held_out_prompts, mean_repeated_share, measure_arm
from nextn.report.schema import (
    DataFacts,
    DecodingArm,
    ModelFacts,
    RunReport,
    Sample,
    TeacherForcedFacts,
    TrainingFacts,
)
from nextn.training import PreparedData, read_metrics


def report_of_run(
    title: str,
    run_folder: Path,
    model: MTPModel,
    recipe: Recipe,
    data: PreparedData,
    provenance: dict[str, Any],
    *,
    num_repeats: int,
    num_samples: int = 3,
    notes: tuple[str, ...] = (),
    progress: Callable[[], None] = lambda: None,
) -> RunReport:
    """Measure decoding and gather the facts of a finished run.

    Args:
        title: of the page.
        run_folder: the trainer's folder, with metrics.jsonl.
        model: the trained model, in evaluation mode, tokenizer attached.
        recipe: resolved settings of the run.
        data: what it was trained on and what was held out.
        provenance: as `provenance.collect` gives it; `training_cost` holds step times measured beside K = 0, if any.
        num_repeats: timed pairs per arm.
        num_samples: texts shown per arm.
        notes: what a reader must know to judge the figures.
        progress: called 2 * num_repeats times per arm.
    """
    history = tuple(read_metrics(run_folder / "metrics.jsonl"))
    last_train = [record for record in history if record["kind"] == "train"][-1]
    last_evaluation = [record for record in history if record["kind"] == "evaluation"][-1]
    held_out = held_out_prompts(data.validation, recipe.evaluation)
    arms: list[DecodingArm] = []
    samples: list[Sample] = []
    for name in ARMS if model.scheme is not None else ():
        arm, texts = measure_arm(model, held_out, recipe.evaluation, name, num_repeats, progress)
        arms.append(arm)
        samples += texts[:num_samples]
    return RunReport(
        title=title,
        data=_data_facts(recipe, data),
        model=_model_facts(model, recipe),
        training=TrainingFacts(
            num_steps=last_train["step"],
            num_tokens=last_train["num_tokens"],
            duration_s=last_train["elapsed_s"],
            tok_per_s=last_train["num_tokens"] / last_train["elapsed_s"],
            mtp_flops_share=model_cost(model, recipe.data.sequence_length).mtp_flops_share,
            mtp_time_share=provenance.get("training_cost", {}).get("mtp_time_share"),
            history=history,
        ),
        teacher_forced=TeacherForcedFacts(
            **{key: tuple(last_evaluation[key]) for key in TeacherForcedFacts.__dataclass_fields__}
        ),
        arms=tuple(arms),
        repeated_text_share_held_out=mean_repeated_share(held_out.continuations),
        samples=tuple(samples),
        notes=notes,
        settings=to_table(recipe),
        provenance=_without_files(provenance),
    )


def _without_files(provenance: dict[str, Any]) -> dict[str, Any]:
    """Provenance for a page: the corpus by its hash; the list of its files stays in provenance.json."""
    corpus = {key: value for key, value in provenance["corpus"].items() if key not in ("files", "dropped")}
    return provenance | {"corpus": corpus}


def _data_facts(recipe: Recipe, data: PreparedData) -> DataFacts:
    splits = [file.split for file in data.corpus.files]
    return DataFacts(
        corpus=data.corpus.name,
        tokenizer=recipe.data.tokenizer,
        num_train_files=splits.count("train"),
        num_train_tokens=len(data.train),
        num_validation_files=splits.count("validation"),
        num_validation_tokens=len(data.validation),
        bytes_per_token=bytes_per_token(data.validation),
    )


def bytes_per_token(packed: PackedTokens) -> float:
    """Bytes of text per token, ends of text counted as tokens of no bytes."""
    return packed.num_bytes / len(packed)


def _model_facts(model: MTPModel, recipe: Recipe) -> ModelFacts:
    cost, config = model_cost(model, recipe.data.sequence_length), model.config
    return ModelFacts(
        num_parameters=cost.num_parameters,
        num_active_parameters=cost.num_active_parameters,
        num_mtp_parameters=cost.num_mtp_parameters,
        num_trunk_layers=config.num_hidden_layers,
        num_depths=model.num_depths,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        num_routed_experts=config.n_routed_experts if config.has_experts else 0,
        num_experts_per_token=config.num_experts_per_tok if config.has_experts else 0,
    )
