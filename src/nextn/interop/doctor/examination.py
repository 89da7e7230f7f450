"""The examination of a checkpoint: headers, then the MTP tensors one at a time, then which engines serve it."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from nextn.errors import CheckpointError
from nextn.files import TensorFiles
from nextn.interop.doctor import fit, invariants, values
from nextn.interop.doctor.diagnosis import CONVENTIONS, Diagnosis
from nextn.interop.doctor.finding import Finding, counted, some
from nextn.interop.doctor.fit import Wanted
from nextn.interop.doctor.stored import (
    Declaration,
    Stored,
    declared_in_folder,
    declared_in_gguf,
    first_marked,
    is_shard,
    locate,
    sort_tensors,
)
from nextn.interop.doctor.values import TensorStatistics
from nextn.interop.gguf import GgufFile
from nextn.mtp.config_file import num_released_modules
from nextn.mtp.registry import scheme_class
from nextn.mtp.store import ModelFolder

_INTEGERS = ("I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64", "BOOL")
_ORDERS = {
    "embed_first": ("embedding", "hidden state"),
    "hidden_first": ("hidden state", "embedding"),
}
_MAKE_AGAIN = "copy or download it again"


def _silent(text: str) -> None:
    pass


def examine(path: Path, say: Callable[[str], None] = _silent) -> Diagnosis:
    """Examine a checkpoint's folder, a safetensors file or a GGUF file for its MTP modules.

    Headers are read whole; of the tensors only those of the MTP modules, one at a time, matrices of the trunk's last
    layer until one differs from the module's, and what the modules repeat of the trunk. A fault of the checkpoint
    is a finding, never an error.

    Args:
        path: the folder of a checkpoint or a run, a `.safetensors` or a `.gguf` file.
        say: called with a progress message before the MTP tensors are read.

    Raises:
        CheckpointError: there is no checkpoint at the path, or the package `gguf` is missing.
    """
    place, kind = locate(path)
    if kind == "gguf" and importlib.util.find_spec("gguf") is None:
        raise CheckpointError("GGUF files need the package gguf: pip install gguf")
    declaration = Declaration()
    try:
        if kind == "folder":
            declaration = declared_in_folder(place)
        source: TensorFiles | GgufFile = GgufFile(place) if kind == "gguf" else _tensors(place, declaration)
        if isinstance(source, GgufFile):
            declaration = declared_in_gguf(source.metadata)
    except CheckpointError as error:
        unreadable = Finding("problem", "unreadable", str(error), _MAKE_AGAIN)
        return Diagnosis(place, kind, declaration.model_type, declaration.count, findings=(unreadable,))
    stored = sort_tensors(source, declaration)
    is_compared = kind == "folder" and not declaration.has_own_modules
    wanted, findings = fit.wanted_in_folder(place, declaration) if is_compared else (None, [])
    conventions = _conventions(declaration, wanted) if stored.modules else {}
    is_part = declaration.is_part or (kind != "folder" and is_shard(place))
    findings += _findings_of_names(place, stored, declaration, wanted, is_part)
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
        (wanted.config, wanted.mtp_config) if wanted else None,
    )


def _tensors(place: Path, declaration: Declaration) -> TensorFiles:
    """Those of a file or of a folder, with the trunk and the modules that lie elsewhere."""
    if not declaration.table:
        return TensorFiles.open(place)
    folder = ModelFolder(place, declaration.table)
    return folder.files.together_with(folder.own_modules) if folder.has_own_modules else folder.files


def _findings_of_names(
    place: Path, stored: Stored, declaration: Declaration, wanted: Wanted | None, is_part: bool
) -> list[Finding]:
    """Invariants on what is declared and on names, shapes and dtypes."""
    findings: list[Finding] = []
    if is_part:
        detail = "one file of several, and the others were not looked at: what is not here may be there"
        findings.append(Finding("info", "one shard", detail, "name the folder, where an index lists the files"))
    elif declaration.is_released_layout:
        findings += _findings_of_modules(stored, declaration, wanted)
    elif declaration.has_own_modules:
        counted_tensors = f"{len(stored.mtp_names)} tensors of the scheme {declaration.own['scheme']!r}"  # type: ignore[index]
        findings.append(Finding("info", "MTP stored", f"{counted_tensors}; nextn.load compares them with the trunk"))
    elif wanted:
        found = stored.shapes(stored.modules.get(0, {}))
        names = {n.removeprefix("mtp."): shape for n, shape in wanted.shapes.items() if n.startswith("mtp.")}
        findings += invariants.other_scheme(wanted.mtp_config.scheme, wanted.mtp_config.num_depths, names, found)
    if wanted:
        ills = {finding.what for finding in findings if finding.severity == "problem"}
        misfits = _findings_of_fit(place, stored, wanted, ills)
        if not ills and not misfits:  # every name was compared with the settings, if not with the trunk
            whole = Finding("ok", "MTP complete", "unlike a layer of the trunk, and as config.json means it")
            findings = [whole if finding.what == "block unlike the trunk" else finding for finding in findings]
        findings += misfits
    for module, roles in stored.modules.items():
        findings += invariants.repeated(module, stored.shapes(roles))
    if stored.modules:
        dtypes = {name: stored.source.dtype(name) for name in stored.mtp_names}
        trunk = [stored.source.dtype(name) for roles in stored.layers.values() for name in roles.values()]
        findings += [*invariants.scales(dtypes), invariants.dtype_mix(list(dtypes.values()), trunk)]
    return findings


def _findings_of_modules(stored: Stored, declaration: Declaration, wanted: Wanted | None) -> list[Finding]:
    """Invariants on modules that engines run: as many as declared, where they should be, and whole."""
    findings = [invariants.declared_and_stored(declaration.count, declaration.count_key, len(stored.modules))]
    if isinstance(stored.source, TensorFiles):  # GGUF's number of layers follows from that of the modules
        findings += fit.layers_miscounted(first_marked(stored.source.names), declaration.num_layers)
    own_count = num_released_modules(wanted.mtp_config) if wanted and declaration.own is not None else None
    findings += invariants.own_settings(own_count, declaration.count, declaration.count_key)
    findings += invariants.unplaced(stored.unplaced, declaration.model_type)
    has_head_norm = _conventions(declaration, wanted).get("head_norm", "own") == "own"
    layers = {layer: stored.shapes(roles) for layer, roles in stored.layers.items()}
    for module, roles in stored.modules.items():
        findings += invariants.completeness(module, stored.shapes(roles), layers, declaration.width, has_head_norm)
    return findings


def _findings_of_fit(place: Path, stored: Stored, wanted: Wanted, ills: Collection[str]) -> list[Finding]:
    """Invariants of nextn's loader. What has another name among the `ills` of the modules is not told again."""
    if unread := fit.unread_weights(place, wanted, stored.source.names):
        return unread
    if "layers miscounted" in ills:
        return []
    misfits = fit.unlike_settings(stored.source, wanted, with_modules=not ills)
    return misfits + fit.copies_unlike_the_trunk(stored.source, wanted.config)


# ------------------------------------------------------------------------------------------------------- conventions


def _conventions(declaration: Declaration, wanted: Wanted | None) -> dict[str, str]:
    """By name, those that have an effect and are known: from nextn's settings, else from the table of families."""
    if wanted is not None:
        read = scheme_class(wanted.mtp_config).settings_read(wanted.mtp_config)
        return {name: getattr(wanted.mtp_config, name) for name in CONVENTIONS if name in read}
    stated = declaration.own or vars(declaration.family or object)
    return {name: stated[name] for name in CONVENTIONS if stated.get(name) and isinstance(stated[name], str)}


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
    """Invariants on the MTP tensors' values, and the look for copies of the trunk."""
    say(f"reading {counted(len(stored.mtp_names), 'MTP tensor')}")
    modules: dict[int, dict[str, TensorStatistics]] = {}
    order = _ORDERS.get(conventions.get("concat", ""), ("first input", "second input"))
    halves: list[Finding] = []
    unread = []
    for module, roles in stored.modules.items():
        for role, name in roles.items():
            tensor = _read(stored, name)
            if tensor is None:
                unread.append(name)
                continue
            number = module if declaration.is_released_layout else _number_in_other_scheme(role)
            modules.setdefault(number, {})[name] = TensorStatistics.of(tensor)
            if role == "eh_proj.weight" and tensor.dim() == 2:
                first, second = (TensorStatistics.of(half) for half in tensor.tensor_split(2, dim=1))
                halves += values.fusion_halves(name, first, second, order)
    statistics = {name: found for named in modules.values() for name, found in named.items()}
    zero_centred = (declaration.model_type or "").startswith(values.ZERO_CENTRED_NORMS)
    findings = [
        *values.not_finite(statistics),
        *values.uninitialised(statistics),
        *values.zeroed(statistics, zero_centred),
        *values.constant(statistics),
        *halves,
        *values.norms(statistics, zero_centred),
        *values.norms_as_initialised(modules, zero_centred),
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


def _number_in_other_scheme(role: str) -> int:
    """The module (0-based) of `layers.1.norm.weight`, which in nextn's other schemes is one of several in one place."""
    first, _, rest = role.partition(".")
    number = rest.partition(".")[0]
    return int(number) if first == "layers" and number.isdecimal() else 0


def _read(stored: Stored, name: str) -> Tensor | None:
    """The tensor, None for packed integers, which mean nothing by themselves."""
    if stored.source.dtype(name) in _INTEGERS:
        return None
    try:
        return stored.source.read(name)
    except CheckpointError:  # a GGUF type that cannot be decoded
        return None


def _is_copy(stored: Stored, module: Mapping[str, str], layer: Mapping[str, str]) -> bool:
    """Whether every matrix that both have is the same, bit for bit, and not merely zeros; the smallest first."""
    source = stored.source
    both = [
        role
        for role in module.keys() & layer.keys()
        if len(source.shape(module[role])) >= 2
        and source.shape(module[role]) == source.shape(layer[role])
        and source.dtype(module[role]) == source.dtype(layer[role])
    ]
    has_values = False
    for role in sorted(both, key=lambda role: (math.prod(source.shape(module[role])), role)):
        matrix, original = _read(stored, module[role]), _read(stored, layer[role])
        if matrix is None or original is None:
            continue
        if not torch.equal(matrix, original):
            return False
        has_values = has_values or bool(matrix.any())
    return has_values
