"""The examination of a checkpoint: headers, then the MTP tensors one at a time, then which engines serve it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from nextn.checkpoint import TensorFiles
from nextn.config import ModelConfig, MTPConfig
from nextn.errors import CheckpointError
from nextn.interop.doctor import laws, values
from nextn.interop.doctor.diagnosis import CONVENTIONS, Diagnosis
from nextn.interop.doctor.finding import Finding, counted, some
from nextn.interop.doctor.stored import (
    Declaration,
    Kind,
    Stored,
    declared_in_folder,
    declared_in_gguf,
    is_shard,
    locate,
    sort_tensors,
)
from nextn.interop.doctor.values import TensorStatistics
from nextn.interop.gguf import GgufFile
from nextn.mtp import MTPModel
from nextn.mtp.config_file import num_released_modules, read_config
from nextn.mtp.layout import to_released_names
from nextn.mtp.registry import scheme_class

_INTEGERS = ("I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64", "BOOL")
_ORDERS = {
    "embed_first": ("embedding", "hidden state"),
    "hidden_first": ("hidden state", "embedding"),
    None: ("first input", "second input"),
}
_MAKE_AGAIN = "copy or download it again"


def _silent(text: str) -> None:
    pass


def examine(path: Path, say: Callable[[str], None] = _silent) -> Diagnosis:
    """Examine a checkpoint's folder, a safetensors file or a GGUF file for its MTP modules.

    Headers are read whole; of the tensors only those of the MTP modules, one at a time, and one matrix of the trunk's
    last layer. What is wrong with a checkpoint is a finding, never an error.

    Args:
        path: the folder of a checkpoint or a run, a `.safetensors` or a `.gguf` file.
        say: told what is read.

    Raises:
        CheckpointError: there is no checkpoint at the path, or the package `gguf` is missing.
    """
    place, kind = locate(path)
    if kind == "gguf" and importlib.util.find_spec("gguf") is None:
        raise CheckpointError("GGUF files need the package gguf: pip install 'nextn[gguf]'")
    declaration = Declaration()
    try:
        if kind == "folder":
            declaration = declared_in_folder(place)
        source: TensorFiles | GgufFile = GgufFile(place) if kind == "gguf" else TensorFiles.open(place)
        if isinstance(source, GgufFile):
            declaration = declared_in_gguf(source.metadata)
    except CheckpointError as error:
        unreadable = Finding("problem", "unreadable", str(error), _MAKE_AGAIN)
        return Diagnosis(place, kind, declaration.model_type, declaration.count, findings=(unreadable,))
    stored = sort_tensors(source, declaration)
    settings, findings = _settings(place, kind, declaration)
    conventions = _conventions(declaration, settings) if stored.modules else {}
    findings += _findings_of_names(place, stored, declaration, settings)
    if stored.modules:
        findings += _convention_findings(declaration, conventions)
        findings += _findings_of_values(stored, declaration, conventions, say)
    return Diagnosis(
        place,
        kind,
        declaration.model_type,
        declaration.count,
        len(stored.modules),
        len(stored.mtp_names),
        tuple(conventions.items()),
        tuple(findings),
        declaration.context,
        settings,
    )


def _settings(
    place: Path, kind: Kind, declaration: Declaration
) -> tuple[tuple[ModelConfig, MTPConfig] | None, list[Finding]]:
    """What nextn reads from config.json, where the family is its own."""
    if kind != "folder" or declaration.model_type != "deepseek_v3":
        return None, []
    try:
        return read_config(place), []
    except CheckpointError as error:
        return None, [Finding("warning", "settings unread", str(error), "nextn cannot load it; engines might")]


def _findings_of_names(
    place: Path, stored: Stored, declaration: Declaration, settings: tuple[ModelConfig, MTPConfig] | None
) -> list[Finding]:
    """Laws on what is declared and on names, shapes and dtypes."""
    findings: list[Finding] = []
    if not declaration.is_released_layout:
        if settings:
            config, mtp_config = settings
            found = stored.shapes(stored.modules.get(0, {}))
            wanted = _shapes_of_other_scheme(config, mtp_config)
            findings += laws.other_scheme(mtp_config.scheme, mtp_config.num_depths, wanted, found)
    else:
        findings.append(laws.declared_and_stored(declaration.count, declaration.count_key, len(stored.modules)))
        own_count = num_released_modules(settings[1]) if settings and declaration.own is not None else None
        findings += laws.own_settings(own_count, declaration.count, declaration.count_key)
        findings += laws.unplaced(stored.unplaced, declaration.model_type)
        has_head_norm = _conventions(declaration, settings).get("head_norm", "own") == "own"
        layers = {layer: stored.shapes(roles) for layer, roles in stored.layers.items()}
        for module, roles in stored.modules.items():
            shapes = stored.shapes(roles)
            if is_shard(place):
                findings.append(Finding("info", "one shard", "tensors of other shards were not looked for"))
            else:
                findings += laws.completeness(module, shapes, layers, declaration.width, has_head_norm)
            findings += laws.repeated(module, shapes)
    if stored.modules:
        dtypes = {name: stored.source.dtype(name) for name in stored.mtp_names}
        trunk = [stored.source.dtype(name) for roles in stored.layers.values() for name in roles.values()]
        findings += [*laws.scales(dtypes), laws.dtype_mix(list(dtypes.values()), trunk)]
    return findings


def _shapes_of_other_scheme(config: ModelConfig, mtp_config: MTPConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        state = MTPModel(config, mtp_config).state_dict()
    released = to_released_names(state, config, mtp_config)
    return {name.removeprefix("mtp."): tuple(t.shape) for name, t in released.items() if name.startswith("mtp.")}


# ------------------------------------------------------------------------------------------------------- conventions


def _conventions(declaration: Declaration, settings: tuple[ModelConfig, MTPConfig] | None) -> dict[str, str]:
    """By name, those that have an effect and are known: from nextn's settings, else from the table of families."""
    if settings is not None:
        read = scheme_class(settings[1]).settings_read(settings[1])
        return {name: getattr(settings[1], name) for name in CONVENTIONS if name in read}
    stated = declaration.own or vars(declaration.family or object)
    return {name: stated[name] for name in CONVENTIONS if stated.get(name)}


def _convention_findings(declaration: Declaration, conventions: Mapping[str, str]) -> list[Finding]:
    family = declaration.family
    if not conventions:
        detail = (
            f"nextn does not know what {declaration.model_type or 'this model'} computes ({', '.join(CONVENTIONS)})"
        )
        return [
            Finding("info", "convention unknown", detail, "ask those who trained it; engines must compute the same")
        ]
    stated = ", ".join(f"{name} {value}" for name, value in conventions.items())
    if declaration.own is not None or family is None:
        return [Finding("info", "convention", f"{stated} (by nextn.mtp in config.json)")]
    found = [Finding("info", "convention", f"{stated} (as engines compute {family.name})")]
    if family.disputed:
        found.append(Finding("info", "convention disputed", family.disputed, "`nextn doctor --measure` compares them"))
    return found


# ------------------------------------------------------------------------------------------------------------ values


def _findings_of_values(
    stored: Stored, declaration: Declaration, conventions: Mapping[str, str], say: Callable[[str], None]
) -> list[Finding]:
    """Laws on the MTP tensors' values, and the look for copies of the trunk."""
    say(f"reading {counted(len(stored.mtp_names), 'MTP tensor')}")
    statistics: dict[str, TensorStatistics] = {}
    halves: list[Finding] = []
    unread = []
    for roles in stored.modules.values():
        for role, name in roles.items():
            tensor = _read(stored, name)
            if tensor is None:
                unread.append(name)
                continue
            statistics[name] = TensorStatistics.of(tensor)
            if role == "eh_proj.weight" and tensor.dim() == 2:
                first, second = (TensorStatistics.of(half) for half in tensor.tensor_split(2, dim=1))
                halves += values.fusion_halves(name, first, second, _ORDERS[conventions.get("concat")])
    zero_centred = (declaration.model_type or "").startswith(values.ZERO_CENTRED_NORMS)
    findings = [
        *values.not_finite(statistics),
        *values.uninitialised(statistics),
        *values.zeroed(statistics, zero_centred),
        *values.constant(statistics),
        *halves,
        *values.norms(statistics, zero_centred),
    ]
    for module, roles in stored.modules.items():
        layer = max(stored.layers, default=None)
        if layer is not None:
            findings += values.copy_of_trunk(_is_copy(stored, roles, stored.layers[layer]), module, layer)
    if unread:
        findings.append(Finding("info", "values unread", f"packed integers, which were not decoded: {some(unread)}"))
    if statistics and not any(finding.severity == "problem" for finding in findings):
        findings.append(
            Finding("ok", "values plausible", f"{counted(len(statistics), 'tensor')} finite and not constant")
        )
    return findings


def _read(stored: Stored, name: str) -> Tensor | None:
    """The tensor, None for packed integers, which mean nothing by themselves."""
    if stored.source.dtype(name) in _INTEGERS:
        return None
    try:
        return stored.source.read(name)
    except CheckpointError:  # a GGUF type that cannot be decoded
        return None


def _is_copy(stored: Stored, module: Mapping[str, str], layer: Mapping[str, str]) -> bool:
    """Whether the smallest matrix that both have is the same, bit for bit, and not merely zeros."""
    source = stored.source
    both = [
        role
        for role in module.keys() & layer.keys()
        if len(source.shape(module[role])) == 2
        and source.shape(module[role]) == source.shape(layer[role])
        and source.dtype(module[role]) == source.dtype(layer[role])
    ]
    if not both:
        return False
    role = min(both, key=lambda role: (source.shape(module[role])[0] * source.shape(module[role])[1], role))
    matrix = source.read(module[role])
    return bool(matrix.any()) and torch.equal(matrix, source.read(layer[role]))
