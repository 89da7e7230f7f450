"""Holds the report of a run, as frozen dataclasses that go to JSON and come back equal.

Every figure on the page is a field here or follows from one (a median of repeats, a share of a histogram). Shares lie
in 0..1, overheads are relative to doing without; depth k and drafted token k are 1-based, K is the number of trained
depths and N the number of drafted tokens per cycle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nextn import tables
from nextn.errors import ConfigError
from nextn.evaluation.results import DecodingArm, Sample
from nextn.training import TeacherForcedEvaluation

TRAIN_KEYS = ("step", "num_tokens", "loss_per_depth")
EVALUATION_KEYS = (*TRAIN_KEYS, "bits_per_byte_per_depth", "teacher_forced_accuracy", "main_agreement")


@dataclass(frozen=True)
class DataFacts:
    """The text trained on and the text held out from it, which every figure of the report is measured on."""

    corpus: str
    tokenizer: str
    num_train_files: int
    num_train_tokens: int
    num_validation_files: int
    num_validation_tokens: int
    bytes_per_token: float  # of the held-out text


@dataclass(frozen=True)
class ModelFacts:
    """Size of the model; a parameter shared by several modules counts once."""

    num_parameters: int  # trunk and MTP modules
    num_active_parameters: int  # of the trunk, those that one token passes through
    num_mtp_parameters: int  # of the MTP modules alone: shared embedding and output head not counted
    num_trunk_layers: int
    num_depths: int  # K
    hidden_size: int
    vocab_size: int
    num_routed_experts: int  # per layer; 0 for a dense model
    num_experts_per_tok: int


@dataclass(frozen=True)
class TrainingFacts:
    """Length, rate and cost of training, and the lines of `metrics.jsonl` as they were written.

    The cost of MTP is stated relative to training the same trunk without it (K = 0): 0.25 is a quarter more per token.
    """

    num_steps: int
    num_tokens: int
    training_s: float
    tok_per_s: float
    mtp_flops_overhead: float  # predicted from floating-point operations
    mtp_time_overhead: float | None  # measured; None when K = 0 was not timed beside it
    history: tuple[dict, ...]  # objects with kind = "train" or "evaluation"

    def __post_init__(self) -> None:
        for index, line in enumerate(self.history):
            wanted = {"train": TRAIN_KEYS, "evaluation": EVALUATION_KEYS}.get(line.get("kind", ""))
            if wanted is None:
                raise ConfigError(f"history[{index}].kind must be train or evaluation, got {line.get('kind')!r}")
            if missing := [key for key in wanted if key not in line]:
                raise ConfigError(
                    f"history[{index}] ({line['kind']}) lacks {', '.join(missing)}; it has {sorted(line)}"
                )


@dataclass(frozen=True)
class RunReport:
    """Everything `html.render` shows of one run."""

    title: str
    data: DataFacts
    model: ModelFacts
    training: TrainingFacts
    teacher_forced: TeacherForcedEvaluation
    arms: tuple[DecodingArm, ...]
    repeated_text_share_held_out: float | None  # of the true continuations of the prompts, as long as the outputs
    samples: tuple[Sample, ...]
    notes: tuple[str, ...]  # what a reader must know to judge the figures, in plain sentences
    settings: dict  # the resolved recipe, as `tables.to_table` gives it
    provenance: dict  # as `provenance.collect` gives it

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        if len(set(names)) < len(names):
            raise ValueError(f"arms need names of their own, got {names}")
        if unknown := sorted({sample.arm for sample in self.samples} - set(names)):
            raise ValueError(f"samples name arms {unknown}, but the arms are {names}")


def to_table(report: RunReport) -> dict[str, Any]:
    """The report as nested dictionaries ready for JSON; `from_table` gives back an equal report.

    JSON has no tuples: inside `settings`, `provenance` and `history`, which are taken as they are, they become lists.
    """
    return tables.to_table(report)


def from_table(table: Mapping[str, Any]) -> RunReport:
    """Read what `to_table` wrote. Raises ConfigError naming the key that is unknown, missing or of the wrong type."""
    return tables.from_table(RunReport, table, "report")
