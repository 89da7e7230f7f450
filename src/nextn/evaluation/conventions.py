"""Which convention do a checkpoint's MTP modules compute? Their accuracy on true tokens under each tells.

Implementations differ in the order of eh_proj's inputs, in what h[0] is and in what is carried on; no name and no shape
shows it. Under the wrong one a trained module predicts worse, from a few points to nothing at all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from nextn.config import MTPConfig
from nextn.data import Batch
from nextn.errors import ConfigError
from nextn.interop.doctor import Finding
from nextn.model import Trunk
from nextn.mtp import MTPModel
from nextn.mtp.registry import scheme_class
from nextn.training import evaluate_teacher_forced

CHOICES = {
    "concat": ("embed_first", "hidden_first"),
    "trunk_hidden": ("post_norm", "pre_norm"),
    "carry": ("post_norm", "pre_norm"),
}
"""Fields of `MTPConfig` that are tried, and their values."""

ROWS_PER_FORWARD = 8

SMALLEST_GAIN = 0.01
"""A share of labels below which no convention is said to beat another, however long the text."""

NUM_ERRORS = 2.0
"""Standard errors by which shares must differ to be told apart."""


@dataclass(frozen=True)
class ConventionAccuracy:
    """What the modules predict under one convention.

    Attributes:
        conventions: value by field of `CHOICES`, those that have an effect.
        is_declared: whether it is the one that the checkpoint states.
        teacher_forced_accuracy: share of labels that are the most likely token, depths 0..K, [K+1].
        loss_per_depth: nats per label, [K+1].
        num_labels: labels counted, [K+1].
    """

    conventions: dict[str, str]
    is_declared: bool
    teacher_forced_accuracy: tuple[float, ...]
    loss_per_depth: tuple[float, ...]
    num_labels: tuple[int, ...]

    @property
    def accuracy(self) -> float:
        """Mean over depths 1..K."""
        return sum(self.teacher_forced_accuracy[1:]) / (len(self.teacher_forced_accuracy) - 1)

    def to_table(self) -> dict[str, Any]:
        """For JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}


def conventions_to_try(config: MTPConfig) -> list[dict[str, str]]:
    """Every combination of the conventions that have an effect; what is carried has none with one depth.

    >>> len(conventions_to_try(MTPConfig(num_depths=1))), len(conventions_to_try(MTPConfig(num_depths=2)))
    (4, 8)
    """
    scheme = scheme_class(config)
    read = [name for name in CHOICES if name in scheme.settings_read(config)]
    if config.num_depths < 2 and "carry" in read:
        read.remove("carry")
    return [dict(zip(read, values, strict=True)) for values in itertools.product(*(CHOICES[name] for name in read))]


def measure_conventions(
    model: MTPModel,
    batch: Batch,
    bytes_per_token: float,
    isolate_documents: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> list[ConventionAccuracy]:
    """Evaluate the model's depths on rows of text under each convention, the declared one first.

    Args:
        model: with K >= 1, in evaluation mode. It is left as it is: each convention has a scheme that shares weights.
        batch: rows, [B, T].
        bytes_per_token: of the text.
        isolate_documents: documents of a row do not see each other.
        say: told what is evaluated.

    Raises:
        ConfigError: the model has no depth to measure.
        DataError: some depth has no label in these rows.
    """
    if model.scheme is None:
        raise ConfigError("the model has no MTP depths (mtp.num_depths = 0), so there is no convention to measure")
    measured, trunk = [], cast(Trunk, _ReadOnce(model.trunk))
    for conventions in conventions_to_try(model.mtp_config):
        is_declared = all(getattr(model.mtp_config, name) == value for name, value in conventions.items())
        say(f"reading the text with {_stated(conventions) or model.mtp_config.scheme}")
        forced = evaluate_teacher_forced(
            computing(model, trunk, **conventions),
            batch,
            bytes_per_token,
            rows_per_forward=ROWS_PER_FORWARD,
            isolate_documents=isolate_documents,
        )
        measured.append(
            ConventionAccuracy(
                conventions, is_declared, forced.teacher_forced_accuracy, forced.loss_per_depth, forced.num_labels
            )
        )
    return sorted(measured, key=lambda one: (not one.is_declared, -one.accuracy))


def computing(model: MTPModel, trunk: Trunk, **conventions: str) -> MTPModel:
    """A model on this trunk with other conventions, whose modules share the storage of `model`'s."""
    mtp_config = replace(model.mtp_config, **conventions)  # type: ignore[arg-type]
    other = MTPModel(None, mtp_config, trunk=trunk)
    assert other.scheme is not None
    assert model.scheme is not None
    other.scheme.load_state_dict(model.scheme.state_dict(), assign=True)
    return other.eval()


class _ReadOnce:
    """A trunk that keeps the states of the rows it has read, since no convention changes them; else the trunk's own."""

    def __init__(self, trunk: Trunk) -> None:
        self._trunk = trunk
        self._states: dict[bytes, Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trunk, name)

    def hidden_states(self, token_ids: Tensor, context: Any = None, cache: Any = None) -> Tensor:
        """See `Trunk.hidden_states`; int64 [B, M] -> [B, M, C]. The same rows must come with the same documents."""
        key = token_ids.cpu().numpy().tobytes()
        if key not in self._states:
            self._states[key] = self._trunk.hidden_states(token_ids, context, cache)
        return self._states[key]


def most_frequent_share(batch: Batch) -> float:
    """Share of the text's tokens that are its most frequent one: what a constant guess gets right."""
    counts = torch.bincount(batch.input_ids.flatten())
    return float(counts.max() / counts.sum())


def convention_findings(measured: Sequence[ConventionAccuracy], guessing: float) -> list[Finding]:
    """What the measured accuracies say of the declared convention.

    Args:
        measured: from `measure_conventions`.
        guessing: what a constant guess gets right (`most_frequent_share`).
    """
    declared = next(one for one in measured if one.is_declared)
    best = max(measured, key=lambda one: one.accuracy)
    trunk, num_labels = declared.teacher_forced_accuracy[0], declared.num_labels[-1]
    if trunk <= guessing + NUM_ERRORS * _error(guessing, num_labels):
        return [
            Finding(
                "warning",
                "text unsuited",
                f"the trunk itself gets {trunk:.1%} of {num_labels:,} tokens right, and a constant guess "
                f"{guessing:.1%}: this text says nothing about the modules",
                "name a text of the kind that the model was trained on (--text, --corpus)",
            )
        ]
    findings = []
    gain = best.accuracy - declared.accuracy
    error = math.hypot(_error(best.accuracy, num_labels), _error(declared.accuracy, num_labels))
    where = f"depths 1..{len(best.num_labels) - 1}, n = {num_labels:,}"
    if gain > max(SMALLEST_GAIN, NUM_ERRORS * error):
        equals = [one for one in measured if best.accuracy - one.accuracy <= error]
        changes = min((_changes(declared, one) for one in equals), key=len)
        stated = {name: declared.conventions[name] for name in changes}
        findings.append(
            Finding(
                "problem",
                "wrong convention",
                f"{_stated(stated)} is declared, and {_stated(changes)} beats it by {100 * gain:.1f} points: "
                f"{best.accuracy:.1%} instead of {declared.accuracy:.1%} of labels, {where}",
                f"set {_stated(changes)} under nextn.mtp in config.json, or rewrite the weights for the declared one",
            )
        )
    elif declared.accuracy > guessing + NUM_ERRORS * _error(guessing, num_labels):
        findings.append(
            Finding(
                "ok",
                "convention measured",
                f"no convention beats the declared one ({_stated(declared.conventions) or 'the only one'}): "
                f"{declared.accuracy:.1%} of labels, {where}",
            )
        )
    if best.accuracy <= guessing + NUM_ERRORS * _error(guessing, num_labels):
        findings.append(
            Finding(
                "problem",
                "MTP predicts nothing",
                f"{best.accuracy:.1%} of labels under the best convention, and a constant guess gets {guessing:.1%}",
                "the modules are untrained or damaged: train them, or take them from the original checkpoint",
            )
        )
    return findings


def _error(share: float, count: int) -> float:
    """Standard error of a share of `count` independent labels."""
    return math.sqrt(max(share * (1 - share), 1 / (count + 1)) / max(count, 1))


def _changes(declared: ConventionAccuracy, other: ConventionAccuracy) -> dict[str, str]:
    return {name: value for name, value in other.conventions.items() if value != declared.conventions[name]}


def _stated(conventions: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in conventions.items())
