"""Checkpoints of a run: everything that determines its next step, written atomically, and read back exactly.

    RUN/trunk/                                              the trunk, where it is not trained: written once
    RUN/checkpoints/step-00000200/
        config.json, model.safetensors, tokenizer files     the model, as `nextn.load` and transformers read it; without
                                                            the trunk where RUN/trunk holds it
        recipe.json, provenance.json                        where it comes from
        training_state/tensors.safetensors                  optimizer moments, states of the random generators
        training_state/state.json                           step, tokens, times, place in the data

The training state has a folder of its own because engines take every safetensors file beside config.json for weights.
A folder called `step-...` is complete: it is written under another name and renamed. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import random
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from nextn.config import Recipe
from nextn.data import PackedTokens, RowSampler
from nextn.errors import CheckpointError, ConfigError, DataError
from nextn.files import (
    atomic_folder,
    checkpoint_folder,
    list_checkpoints,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from nextn.mtp import MTPModel, save_model
from nextn.mtp.store import TRUNK_BESIDE_CHECKPOINTS, TRUNK_FOLDER, ModelFolder, load_state, read_state, save_trunk
from nextn.tables import flattened, from_table, to_table
from nextn.training.optimizer import TrainingOptimizer

STATE_FILE, TENSORS_FILE = "training_state/state.json", "training_state/tensors.safetensors"

STATE_FORMAT = 2
"""Version of `STATE_FILE`."""

STATE_KEYS = {"tensors", "clock", "sampler", "random", "train_tokens_sha256"}
"""What `STATE_FILE` holds beside its version."""


class Stateful(Protocol):
    """What a checkpoint holds of an object: nested tables whose leaves are tensors or JSON values."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that determines the next step."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Take over what `state_dict` gave."""
        ...


@dataclass
class TrainingClock:
    """How far a run is.

    Attributes:
        step: optimizer steps done.
        num_tokens: tokens read by them.
        training_s: seconds spent in steps.
        elapsed_s: seconds since the start, evaluations and checkpoints included, interruptions not.
    """

    step: int = 0
    num_tokens: int = 0
    training_s: float = 0.0
    elapsed_s: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        for name, value in state.items():
            setattr(self, name, value)


class RandomGenerators:
    """The global random generators of torch (all devices), numpy and Python."""

    @staticmethod
    def seed(seed: int) -> None:
        """Begin all of them anew."""
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)

    def state_dict(self) -> dict[str, Any]:
        """Where each of them is."""
        name, key, position, has_gauss, cached_gaussian = np.random.get_state(legacy=True)
        version, internal, gauss_next = random.getstate()
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return {
            "torch": torch.get_rng_state(),
            "cuda": {str(index): state for index, state in enumerate(cuda)},
            "numpy": {
                "key": torch.from_numpy(np.asarray(key).astype(np.int64)),
                "rest": [name, position, has_gauss, cached_gaussian],
            },
            "python": {"internal": torch.tensor(internal, dtype=torch.int64), "rest": [version, gauss_next]},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        torch.set_rng_state(state["torch"])
        name, position, has_gauss, cached_gaussian = state["numpy"]["rest"]
        key = state["numpy"]["key"].numpy().astype(np.uint32)
        np.random.set_state((name, key, position, has_gauss, cached_gaussian))
        version, gauss_next = state["python"]["rest"]
        random.setstate((version, tuple(state["python"]["internal"].tolist()), gauss_next))
        for index, cuda_state in state.get("cuda", {}).items():
            if int(index) < torch.cuda.device_count():
                torch.cuda.set_rng_state(cuda_state, int(index))


@dataclass(frozen=True)
class RunState:
    """Everything that determines the next step of a run: all objects change while training.

    Whoever writes a checkpoint, one process or many, takes the same tables from `parts`.
    """

    model: MTPModel
    optimizer: TrainingOptimizer
    sampler: RowSampler
    clock: TrainingClock
    random: RandomGenerators = field(default_factory=RandomGenerators)

    @property
    def parts(self) -> dict[str, Stateful]:
        """The objects by name."""
        return {name: getattr(self, name) for name in ("model", "optimizer", "sampler", "clock", "random")}

    @property
    def trains_trunk(self) -> bool:
        """Some of the trunk's own weights change, so that a checkpoint must hold them all."""
        is_factor = ".lora_"
        named = cast(nn.Module, self.model.trunk).named_parameters()
        return any(parameter.requires_grad and is_factor not in name for name, parameter in named)


def save_checkpoint(
    run_folder: Path, state: RunState, *, train_tokens_sha256: str, recipe: dict[str, Any], provenance: dict[str, Any]
) -> Path:
    """Write a checkpoint of the current step and return its folder. Older ones stay: see `remove_old_checkpoints`."""
    path = checkpoint_folder(run_folder, state.clock.step)
    tables = {name: part.state_dict() for name, part in state.parts.items() if name != "model"}
    leaves = dict(_leaves(tables))
    tensors = {name: value for name, value in leaves.items() if isinstance(value, Tensor)}
    with atomic_folder(path) as folder:
        save_model(state.model, folder, trunk=None if state.trains_trunk else TRUNK_BESIDE_CHECKPOINTS)
        write_json(folder / "recipe.json", recipe)
        write_json(folder / "provenance.json", provenance)
        (folder / STATE_FILE).parent.mkdir()
        write_tensors(folder / TENSORS_FILE, tensors)
        table = {
            "format": STATE_FORMAT,
            "tensors": sorted(tensors),
            "train_tokens_sha256": train_tokens_sha256,
            **_nested({name: value for name, value in leaves.items() if name not in tensors}),
        }
        write_json(folder / STATE_FILE, table)
    return path


def save_frozen_trunk(run_folder: Path, state: RunState) -> None:
    """Write the trunk of a run that does not train it, once, where its checkpoints look for it."""
    if not state.trains_trunk:
        with atomic_folder(run_folder / TRUNK_FOLDER) as folder:
            save_trunk(state.model, folder)


def _leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of every leaf of nested tables, the keys on the way joined by `//`; an empty table has none.

    >>> list(_leaves({"clock": {"step": 3}, "sampler": {}}))
    [('clock//step', 3)]
    """
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}//")
        else:
            yield f"{prefix}{key}", value


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The tables that `_leaves` took apart.

    >>> _nested({"clock//step": 3})
    {'clock': {'step': 3}}
    """
    tables: dict[str, Any] = {}
    for path, value in leaves.items():
        *way, key = path.split("//")
        table = tables
        for part in way:
            table = table.setdefault(part, {})
        table[key] = value
    return tables


def remove_old_checkpoints(run_folder: Path, keep: int) -> None:
    """Remove all but the `keep` latest checkpoints, and what a killed run left half-written or half-removed."""
    for path in list_checkpoints(run_folder)[:-keep]:
        _remove(path)
    _remove_leftovers(run_folder / "checkpoints")


def remove_run(run_folder: Path) -> None:
    """Remove what training wrote into a run folder and nothing else: files that a user put there stay.

    The recipe goes last, so that a removal cut short can be called again.
    """
    for path in list_checkpoints(run_folder):
        _remove(path)
    _remove_leftovers(run_folder / "checkpoints")
    events = run_folder / "tensorboard"
    for path in events.glob("events.out.tfevents.*"):
        path.unlink()
    if (run_folder / TRUNK_FOLDER).exists():
        shutil.rmtree(run_folder / TRUNK_FOLDER)
    for folder in (run_folder / "checkpoints", events):
        if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
            folder.rmdir()
    for name in ("metrics.jsonl", "provenance.json", "recipe.json"):
        (run_folder / name).unlink(missing_ok=True)


def _remove_leftovers(folder: Path) -> None:
    """Remove folders under the names that only nextn gives: checkpoints half-written or half-removed."""
    for path in list(folder.iterdir()) if folder.is_dir() else ():
        if path.is_dir() and re.match(r"\.(removed-)?step-\d{8}", path.name):
            shutil.rmtree(path)


def _remove(path: Path) -> None:
    """Remove a checkpoint so that no moment shows an incomplete one under its name."""
    doomed = path.with_name(f".removed-{path.name}")
    if doomed.exists():
        shutil.rmtree(doomed)
    path.rename(doomed)
    shutil.rmtree(doomed)


def restore(path: Path, state: RunState, train_tokens_sha256: str) -> None:
    """Set model, optimizer, sampler, clock and the random generators to what they were at a checkpoint.

    Raises:
        CheckpointError: a file is missing, damaged or of another format or model.
        DataError: the training tokens are not those of the checkpoint.
    """
    with _way_out_of_damage(path):
        table = read_json(path / STATE_FILE)
    if not isinstance(table, dict) or table.get("format") != STATE_FORMAT:
        raise CheckpointError(
            f"{path / STATE_FILE} has format {table.get('format') if isinstance(table, dict) else None}, "
            f"this version of nextn reads {STATE_FORMAT}; resume with the version that wrote it (see provenance.json)"
        )
    with _way_out_of_damage(path):
        if missing := sorted(STATE_KEYS - table.keys()):
            raise CheckpointError(f"{path / STATE_FILE} lacks {', '.join(missing)}")
        tensors = read_tensors(path / TENSORS_FILE)
        if sorted(tensors) != table["tensors"]:
            raise CheckpointError(f"{path / TENSORS_FILE} does not hold the tensors that {STATE_FILE} names")
        folder = ModelFolder.open(path)
        saved = read_state(folder, state.model, with_trunk=state.trains_trunk)
    if table["train_tokens_sha256"] != train_tokens_sha256:
        raise DataError(
            f"the training tokens differ from those {path} was trained on: the corpus or the tokenizer has changed; "
            "resume with the same data, or start a new run folder"
        )
    load_state(state.model, saved, folder, with_trunk=state.trains_trunk)
    parts = {name: value for name, value in table.items() if name in state.parts}
    tables = _nested(dict(_leaves(parts)) | tensors)
    for name, part in state.parts.items():
        if name != "model":
            part.load_state_dict(tables.get(name, {}))


@contextmanager
def _way_out_of_damage(path: Path) -> Iterator[None]:
    """Adds to an error about a file of the checkpoint at `path` how to go on without that checkpoint."""
    try:
        yield
    except (CheckpointError, DataError) as error:
        raise CheckpointError(
            f"{error}. To go on from the checkpoint before it (from the start, if it is the first), delete or rename "
            f"the folder {path}"
        ) from None


def tokens_sha256(tokens: PackedTokens) -> str:
    """Identity of packed tokens: sha256 over ids and documents, hexadecimal."""
    digest = hashlib.sha256(np.ascontiguousarray(tokens.token_ids).data)
    digest.update(np.ascontiguousarray(tokens.document_ids).data)
    return digest.hexdigest()


def read_recipe(path: Path) -> Recipe:
    """The recipe.json of a run or checkpoint. Raises CheckpointError when it is missing or does not hold a recipe."""
    table = read_json(path)
    if not isinstance(table, dict):
        raise CheckpointError(f"{path} does not hold a recipe")
    try:
        return from_table(Recipe, table)
    except ConfigError as error:
        raise CheckpointError(f"{path} does not hold a recipe that this version of nextn reads: {error}") from None


def check_run_folder(run_folder: Path, recipe: Recipe, *, resume: bool) -> None:
    """Refuse what `Trainer.train` would refuse about its folder, before any data is read.

    Args:
        run_folder: where the run is to be.
        recipe: its settings; a `model.vocab_size` of 0, which only the tokenizer can tell, is not compared, nor `[mtp]`
            where the folder of a loaded trunk decides about it.
        resume: as in `Trainer.train`.

    Raises:
        ConfigError: not resuming and the folder holds a run, or resuming with other settings.
        CheckpointError: resuming and the folder holds no run.
    """
    path = run_folder / "recipe.json"
    if not resume:
        if path.exists() or list_checkpoints(run_folder):
            raise ConfigError(
                f"{run_folder} already holds a run; resume it, or choose another folder (nothing is overwritten)"
            )
        return
    if not path.exists():
        raise CheckpointError(f"nothing to resume: {run_folder} holds no recipe.json; start the run without resume")
    found = read_recipe(path)
    if recipe.trunk.from_ is not None:
        recipe = replace(recipe, mtp=found.mtp)
    elif recipe.model.vocab_size == 0:
        recipe = replace(recipe, model=replace(recipe.model, vocab_size=found.model.vocab_size))
    check_same_recipe(found, recipe, path)


def check_same_recipe(found: Recipe, wanted: Recipe, path: Path) -> None:
    """Raise ConfigError listing the settings that differ between a run's recipe and the one to resume it with."""
    old, new = dict(flattened(to_table(found))), dict(flattened(to_table(wanted)))
    differing = [
        f"  {name}: the run has {value!r}, the recipe now has {new[name]!r}"
        for name, value in old.items()
        if value != new[name]
    ]
    if differing:
        raise ConfigError(
            f"cannot resume: these settings differ from those in {path}:\n" + "\n".join(differing) + "\n"
            "A resumed run repeats an uninterrupted one bit for bit, so every setting must stay, num_steps too: the "
            "learning-rate schedule depends on it. Restore the settings, or start a new run folder."
        )
