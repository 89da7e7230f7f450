"""Four ways to decode, each with a model of its own, side by side: what training took, what decoding gives.

Standard decoding; MTP; speculative decoding with a separate draft model (its training comes on top of its target's);
parallel decoding, whose drafts do not depend on each other. Quality is the trunk's on held-out text, since all of them
are lossless: draft modules change how fast a text comes, and only through training what it says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from nextn.mtp import MTPModel
from nextn.training import read_metrics

N = TypeVar("N", int, float)

NAMES = {
    "standard": "standard decoding",
    "mtp": "MTP",
    "draft_model": "speculative decoding, draft model",
    "parallel": "parallel decoding",
}

MISSING = {
    "standard": "train the same recipe with mtp.num_depths = 0 and name it with --standard",
    "mtp": "train with mtp.num_depths above 0",
    "draft_model": "train a smaller model with the same tokenizer and name it with --draft-model",
    "parallel": 'train the same recipe with mtp.scheme = "parallel" and name it with --parallel',
}
"""What to do where there is no such model."""


@dataclass(frozen=True)
class TrainedModel:
    """What a model's training took and gave; None: its run does not say.

    Attributes:
        num_training_tokens: read in training.
        training_s: seconds in training steps.
        bits_per_byte: of the next token on the run's held-out text, at its last evaluation.
        num_trunk_parameters: without MTP modules.
        num_mtp_parameters: of the MTP modules alone.
    """

    num_training_tokens: int | None
    training_s: float | None
    bits_per_byte: float | None
    num_trunk_parameters: int
    num_mtp_parameters: int


@dataclass(frozen=True)
class Approach:
    """One row of the comparison; None: not known.

    Attributes:
        name: of the approach.
        arm: what decoded, or what to do where there is no such model.
        num_training_tokens, training_s: of all its models together.
        bits_per_byte: of the trunk that verifies, on its run's held-out text.
        num_parameters: of all its models together.
        num_extra_parameters: beyond the trunk that verifies.
        decode_tok_per_s: median of the repeats.
        speedup: against plain decoding of the standard model, or of the checkpoint where there is no standard one.
    """

    name: str
    arm: str
    num_training_tokens: int | None = None
    training_s: float | None = None
    bits_per_byte: float | None = None
    num_parameters: int | None = None
    num_extra_parameters: int | None = None
    decode_tok_per_s: float | None = None
    speedup: float | None = None


def trained_model(checkpoint: Path, model: MTPModel) -> TrainedModel:
    """Sizes from the model, the rest from its run's metrics.jsonl up to the checkpoint's step, where there is one."""
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    num_mtp = 0 if model.scheme is None else sum(parameter.numel() for parameter in model.scheme.parameters())
    metrics = checkpoint.resolve().parent.parent / "metrics.jsonl"
    _, _, step = checkpoint.resolve().name.partition("step-")
    records = read_metrics(metrics) if step.isdigit() and metrics.exists() else []
    last = {record["kind"]: record for record in records if record["step"] <= int(step)}
    train, evaluation = last.get("train", {}), last.get("evaluation", {})
    bits = evaluation.get("bits_per_byte_per_depth") or [None]
    return TrainedModel(train.get("num_tokens"), train.get("training_s"), bits[0], num_parameters - num_mtp, num_mtp)


def approaches(
    models: Mapping[str, TrainedModel], rates: Mapping[str, tuple[str, float]], plain_tok_per_s: float
) -> tuple[Approach, ...]:
    """The four rows.

    Args:
        models: by key of `NAMES`; a missing key is a model that was not named. `draft_model` is the one that
            drafts; its target is `standard`, or `mtp` without one.
        rates: by key, the arm that decoded and its tokens per second.
        plain_tok_per_s: what speedups are against.

    The draft model is trained besides its target, and the target's quality is what one gets:

    >>> target, draft = TrainedModel(1000, 60.0, 1.8, 500, 0), TrainedModel(1000, 20.0, 2.4, 100, 0)
    >>> rows = approaches({"standard": target, "draft_model": draft}, {"draft_model": ("N = 3", 150.0)}, 100.0)
    >>> row = rows[2]
    >>> row.training_s, row.bits_per_byte, row.num_parameters, row.num_extra_parameters, row.speedup
    (80.0, 1.8, 600, 100, 1.5)
    >>> rows[3].arm
    'train the same recipe with mtp.scheme = "parallel" and name it with --parallel'
    """
    rows = []
    for key, name in NAMES.items():
        if key not in models:
            rows.append(Approach(name, MISSING[key]))
            continue
        trained = models[key]
        arm, rate = rates.get(key, ("not measured", None))
        if key == "draft_model":
            target = models.get("standard", models.get("mtp"))
            trained = _with_draft_model(target, trained) if target is not None else trained
        rows.append(
            Approach(
                name=name,
                arm=arm,
                num_training_tokens=trained.num_training_tokens,
                training_s=trained.training_s,
                bits_per_byte=trained.bits_per_byte,
                num_parameters=trained.num_trunk_parameters + trained.num_mtp_parameters,
                num_extra_parameters=trained.num_mtp_parameters,
                decode_tok_per_s=rate,
                speedup=None if rate is None else rate / plain_tok_per_s,
            )
        )
    return tuple(rows)


def _with_draft_model(target: TrainedModel, draft: TrainedModel) -> TrainedModel:
    """Both together; the draft model's parameters are the extra ones, MTP modules of the target are not used."""
    return TrainedModel(
        _sum(target.num_training_tokens, draft.num_training_tokens),
        _sum(target.training_s, draft.training_s),
        target.bits_per_byte,
        target.num_trunk_parameters,
        draft.num_trunk_parameters,
    )


def _sum(a: N | None, b: N | None) -> N | None:
    return None if a is None or b is None else a + b
