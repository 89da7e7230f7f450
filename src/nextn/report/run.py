"""Builds the report of a training run: facts from its folder, and decoding measured now."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nextn.config import Recipe
from nextn.evaluation.free_running import ARM_TEMPERATURES, held_out_prompts, measure_arm
from nextn.evaluation.repetition import mean_repeated_share
from nextn.evaluation.results import DecodingArm, Sample
from nextn.mtp import MTPModel
from nextn.mtp.cost import model_cost
from nextn.provenance import measuring_moment
from nextn.report.schema import DataFacts, ModelFacts, RunReport, TrainingFacts
from nextn.tables import to_table
from nextn.training import PreparedData, TeacherForcedEvaluation, read_metrics
from nextn.wording import plural

NUM_SAMPLES = 3
"""Texts shown per arm."""

LOOPING_SHARE = 0.3
"""Greedy text of which more than this repeats itself is called looping."""


def report_of_run(
    title: str,
    run_folder: Path,
    model: MTPModel,
    recipe: Recipe,
    data: PreparedData,
    provenance: dict[str, Any],
    *,
    num_repeats: int,
    progress: Callable[[], None] = lambda: None,
) -> RunReport:
    """Measure decoding and gather the facts of a finished run.

    Args:
        title: of the page.
        run_folder: the trainer's folder, with metrics.jsonl.
        model: the trained model, in evaluation mode, tokenizer attached.
        recipe: resolved settings of the run.
        data: what it was trained on and what was held out.
        provenance: of the training, as `provenance.collect` gives it; `training_cost` holds step times measured beside
            K = 0, if any. The report adds the moment of measuring as `measured`.
        num_repeats: timed pairs per arm.
        progress: called 2 * num_repeats times per arm.
    """
    measured = measuring_moment()
    history = tuple(read_metrics(run_folder / "metrics.jsonl"))
    last_train = [record for record in history if record["kind"] == "train"][-1]
    last_evaluation = [record for record in history if record["kind"] == "evaluation"][-1]
    held_out = held_out_prompts(data.validation, recipe.evaluation)
    arms: list[DecodingArm] = []
    samples: list[Sample] = []
    for name in ARM_TEMPERATURES if model.scheme is not None else ():
        arm, texts = measure_arm(model, held_out, recipe.evaluation, name, num_repeats, progress)
        arms.append(arm)
        samples += texts[:NUM_SAMPLES]
    return RunReport(
        title=title,
        data=_data_facts(recipe, data),
        model=_model_facts(model, recipe),
        training=TrainingFacts(
            num_steps=last_train["step"],
            num_tokens=last_train["num_tokens"],
            training_s=last_train["training_s"],
            tok_per_s=last_train["num_tokens"] / last_train["training_s"],
            mtp_flops_overhead=model_cost(model, recipe.data.sequence_length).mtp_flops_overhead,
            mtp_time_overhead=provenance.get("training_cost", {}).get("mtp_time_overhead"),
            history=history,
        ),
        teacher_forced=TeacherForcedEvaluation.of_record(last_evaluation),
        arms=tuple(arms),
        repeated_text_share_held_out=mean_repeated_share(held_out.continuations),
        samples=tuple(samples),
        notes=_notes(recipe, num_repeats, arms, last_evaluation["loss_per_depth"]),
        settings=to_table(recipe),
        provenance=_without_files(provenance) | {"measured": measured},
    )


def _notes(recipe: Recipe, num_repeats: int, arms: list[DecodingArm], loss_per_depth: list[float]) -> tuple[str, ...]:
    """What a reader must know to judge the figures."""
    evaluation = recipe.evaluation
    notes = []
    if arms:
        notes += [
            f"Decoding was measured on {plural(evaluation.num_prompts, 'prompt')} of "
            f"{plural(evaluation.prompt_length, 'token')} from files held out of training, "
            f"{plural(evaluation.max_new_tokens, 'new token')} each, {plural(num_repeats, 'repeat')}, in float32 on "
            f"{plural(torch.get_num_threads(), 'CPU thread')}.",
            "The baseline is this library's own plain cached decoding of the same weights in the same process, repeats "
            "in turn. Acceptance is not speed.",
        ]
    if any(arm.temperature == 0 and arm.repeated_text_share_plain > LOOPING_SHARE for arm in arms):
        notes.append(
            "The greedy text loops, as that of undertrained models does, and loops flatter acceptance. Judge by the "
            "sampled figures too."
        )
    if min(loss_per_depth) < loss_per_depth[0]:
        notes.append(
            "Here an MTP depth predicts its label better than depth 0 does. It is not a leak: both have read the same "
            "true tokens, and tests show that no later one has any effect. The depth has one layer more, and reads the "
            "newest token beside the trunk's finished summary of all before it."
        )
    return tuple(notes)


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
        bytes_per_token=data.validation.bytes_per_token,
    )


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
        num_experts_per_tok=config.num_experts_per_tok if config.has_experts else 0,
    )
