"""metrics.jsonl: what happened in a run, one JSON object a line, written as it happens.

    {"kind": "train", "step", "num_tokens", "loss", "loss_per_depth": [K+1], "depth_weights": [K], "balance_loss",
     "learning_rate", "grad_norm", "tok_per_s", "training_s", "elapsed_s", "expert_load_max_over_mean": {layer: ratio}}
    {"kind": "evaluation", "step", "num_tokens", "loss_per_depth": [K+1], "bits_per_byte_per_depth": [K+1],
     "teacher_forced_accuracy": [K+1], "main_agreement": [K], "num_labels": [K+1], "training_s", "elapsed_s",
     "expert_load": {layer: [E]}, "decoding": {...}}

`step` counts finished optimizer steps and `num_tokens` the tokens they read; losses are in nats per label, numbers keep
all their digits. `loss` is the total that was minimised. The loss of a depth that weighed 0 and was not computed is
null. `training_s` are the seconds in steps so far, `elapsed_s` those since the start, evaluations and checkpoints
included; `tok_per_s` is the rate of the steps since the previous train line. `balance_loss` is the sequence-wise one
before its factor alpha, summed over layers. `expert_load` is each expert's share of the last step's tokens, and
`expert_load_max_over_mean` the busiest expert's load relative to the mean, by name of the layer (those of the trunk
begin with `trunk.`, those of MTP modules with `scheme.`). `decoding` is there when decoding was asked for.
"""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

from nextn.errors import CheckpointError, ConfigError

TIMING_FIELDS = ("tok_per_s", "training_s", "elapsed_s")
"""Fields of a line that differ between two runs of one recipe; all others repeat bit for bit on one machine."""


class MetricsWriter:
    """Appends lines to metrics.jsonl, flushed one by one, and to TensorBoard event files if asked.

    Args:
        run_folder: where metrics.jsonl lies (and `tensorboard/`).
        last_step: keep existing lines up to this step; later and half-written ones are cut off.
        tensorboard: also write event files.
    """

    def __init__(self, run_folder: Path, last_step: int, tensorboard: bool = False) -> None:
        self.path = run_folder / "metrics.jsonl"
        self._events = _open_events(run_folder / "tensorboard", last_step) if tensorboard else None
        keep_lines(self.path, last_step)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Append one object. Raises CheckpointError for a full disk, ValueError for NaN and infinity (not JSON)."""
        line = json.dumps(record, allow_nan=False) + "\n"
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise CheckpointError(f"cannot write {self.path}: {error.strerror}") from error
        if self._events is not None:
            for name, value in _scalars(record):
                self._events.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._events is not None:
            self._events.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics.jsonl; a line that was being written when the run was killed is left out."""
    return [record for record, _ in _whole_lines(path)]


def keep_lines(path: Path, last_step: int) -> None:
    """Cut metrics.jsonl before the first line that is half-written or of a step after `last_step`."""
    size = 0
    for record, end in _whole_lines(path):
        if record["step"] > last_step:
            break
        size = end
    if path.exists():
        os.truncate(path, size)


def _whole_lines(path: Path) -> list[tuple[dict[str, Any], int]]:
    """Each whole line's object and where the line ends, in bytes."""
    if not path.exists():
        return []
    lines, end = [], 0
    for line in path.read_bytes().splitlines(keepends=True):
        end += len(line)
        if line.endswith(b"\n"):
            try:
                lines.append((json.loads(line), end))
            except ValueError as error:
                raise CheckpointError(f"{path}, line {len(lines) + 1}, is not JSON: {error}") from None
    return lines


def _scalars(record: dict[str, Any]) -> list[tuple[str, float]]:
    scalars = []
    for key, value in record.items():
        name = f"{record['kind']}/{key}"
        if isinstance(value, int | float) and key != "step":
            scalars.append((name, float(value)))
        elif isinstance(value, list):
            scalars += [(f"{name}/{index}", float(item)) for index, item in enumerate(value) if item is not None]
        elif key == "expert_load_max_over_mean":
            scalars += [(f"{name}/{layer}", ratio) for layer, ratio in value.items()]
    return scalars


def require_tensorboard() -> None:
    """Raise ConfigError unless TensorBoard can be written."""
    try:
        importlib.import_module("torch.utils.tensorboard")
    except ImportError:
        raise ConfigError(
            "training.tensorboard = true, but TensorBoard is not installed: pip install tensorboard, "
            "or set training.tensorboard = false (metrics.jsonl is written in any case)"
        ) from None


def _open_events(folder: Path, last_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=last_step + 1)
