"""Check that a checkpoint of nextn's own family fits its settings, by the invariants of `nextn.mtp.load_model`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nextn.config import ModelConfig, MTPConfig
from nextn.errors import CheckpointError, ConfigError
from nextn.interop.doctor.finding import Finding, Severity, counted, some
from nextn.interop.doctor.invariants import PACKED_TAILS, SCALE_TAILS, Shapes, shape_text
from nextn.interop.doctor.stored import Declaration, TensorSource
from nextn.mtp import MTPModel
from nextn.mtp.config_file import fp8_block, read_config
from nextn.mtp.layout import copy_of, mtp_module, to_released_names
from nextn.mtp.store import CONFIG_FILE

_SCALE = "_scale_inv"
_NOT_LOADED = "nextn cannot load or export it; engines might run it"


@dataclass(frozen=True)
class Wanted:
    """The model that config.json describes.

    Attributes:
        config, mtp_config: as nextn reads them.
        shapes: of every tensor of such a model, by released name.
        table: config.json, parsed.
    """

    config: ModelConfig
    mtp_config: MTPConfig
    shapes: Shapes
    table: Mapping[str, Any]


def wanted_in_folder(folder: Path, declaration: Declaration) -> tuple[Wanted | None, list[Finding]]:
    """What the settings mean, where the family is nextn's own; or why nextn cannot read them."""
    if declaration.model_type != "deepseek_v3":
        return None, []
    try:
        config, mtp_config = read_config(declaration.table, folder / CONFIG_FILE)
        with torch.device("meta"):  # shapes alone: nothing is allocated
            state = MTPModel(config, mtp_config).state_dict()
    except (CheckpointError, ConfigError) as error:
        severity: Severity = "warning" if declaration.is_released_layout else "problem"  # no engine runs another scheme
        return None, [Finding(severity, "settings unread", str(error), _NOT_LOADED)]
    released = to_released_names(state, config, mtp_config)
    shapes = {name: tuple(tensor.shape) for name, tensor in released.items() if copy_of(name, config) is None}
    return Wanted(config, mtp_config, shapes, declaration.table), []


def unread_weights(folder: Path, wanted: Wanted, names: Sequence[str]) -> list[Finding]:
    """A quantisation that nextn does not undo, by config.json or by the tensors' names."""
    packed = [name for name in names if name.rpartition(".")[2] in PACKED_TAILS + SCALE_TAILS]
    foreign = [name for name in packed if not name.endswith(_SCALE)]
    try:
        fp8_block(wanted.table, folder / CONFIG_FILE)
    except CheckpointError as error:
        return [Finding("warning", "weights unread", str(error), _NOT_LOADED)]
    if not foreign:
        return []
    detail = f"nextn reads float and block-quantised FP8 weights, and these are of another kind: {some(foreign)}"
    return [Finding("warning", "weights unread", detail, _NOT_LOADED)]


def unlike_settings(source: TensorSource, wanted: Wanted, with_modules: bool = True) -> list[Finding]:
    """Tensors that are missing, unexpected or misshapen by the settings: of the trunk, and of the MTP modules.

    Args:
        source: the checkpoint's tensors.
        wanted: what its settings mean.
        with_modules: False leaves the modules' out, where something else is known to be wrong with them.
    """
    config = wanted.config
    stored = {name for name in source.names if not name.endswith(_SCALE) and copy_of(name, config) is None}
    misshapen = {
        name: f"{name} is {shape_text(source.shape(name))} and should be {shape_text(wanted.shapes[name])}"
        for name in stored & wanted.shapes.keys()
        if source.shape(name) != wanted.shapes[name]
    }
    lists: dict[str, Mapping[str, str]] = {
        "missing": {name: name for name in wanted.shapes.keys() - stored},
        "unexpected": {name: name for name in stored - wanted.shapes.keys()},
        "misshapen": misshapen,
    }
    findings = []
    for side, is_of_modules in (("trunk", False), ("MTP", True))[: 1 + with_modules]:
        parts, of = [], "MTP modules" if is_of_modules else side
        for kind, texts in lists.items():
            here = [text for name, text in texts.items() if _is_mtp(name, config) is is_of_modules]
            if here:
                parts.append(f"{len(here)} {kind} ({some(here)})")
        if parts:
            detail = f"config.json means other tensors of the {of}: {'; '.join(parts)}"
            fix = "take the tensors from the original checkpoint, or correct config.json; nextn refuses to load it"
            findings.append(Finding("problem", f"{side} unlike settings", detail, fix))
    return findings


def layers_miscounted(marked: int | None, num_layers: int | None) -> list[Finding]:
    """The first layer with tensors that only MTP modules have, against where the trunk should end.

    >>> layers_miscounted(61, 62)[0].detail
    'num_hidden_layers in config.json is 62, and the first layer with tensors that only MTP modules have is 61'

    Args:
        marked: that layer (0-based), None without.
        num_layers: `num_hidden_layers`, None where nothing says.
    """
    if marked is None or num_layers is None or marked == num_layers:
        return []
    detail = f"num_hidden_layers in config.json is {num_layers}, and the first layer with tensors that only MTP modules"
    fix = f"set num_hidden_layers to {marked}: it counts the trunk's layers, not the MTP modules"
    if marked > num_layers:
        fix = f"restore the modules before that one, or set num_hidden_layers to {marked} if those layers are trunk"
    return [Finding("problem", "layers miscounted", f"{detail} have is {marked}", fix)]


def copies_unlike_the_trunk(source: TensorSource, config: ModelConfig) -> list[Finding]:
    """Repetitions of the embedding or the head whose values are not those of the trunk's, or whose original is lost."""
    names = set(source.names)
    differing = []
    for name in source.names:
        original = copy_of(name, config)
        if original is None:
            continue
        if original not in names or not torch.equal(source.read(name), source.read(original)):
            differing.append(f"{name} is not {original}")
    if not differing:
        return []
    detail = f"{counted(len(differing), 'tensor')} should repeat the trunk's: {some(differing)}"
    fix = "engines that share the trunk's embedding and head draft otherwise than those that read these; nextn refuses"
    return [Finding("problem", "copies differ", detail, fix)]


def _is_mtp(name: str, config: ModelConfig) -> bool:
    return name.startswith("mtp.") or mtp_module(name, config) is not None
