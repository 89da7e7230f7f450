"""Check that MTP is declared, stored and complete: invariants on declarations, names, shapes and dtypes alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from nextn.interop.doctor.finding import Finding, counted, some
from nextn.mtp.layout import COPIES

Shapes = Mapping[str, tuple[int, ...]]
"""Role or name -> shape, of one module, one layer of the trunk, or a model."""

_FUSION_ROLES = ("enorm.weight", "hnorm.weight", "eh_proj.weight")
_HEAD_NORM = "shared_head.norm.weight"
PACKED_TAILS = ("qweight", "weight_packed")
"""Last words of the names of matrices packed into integers."""

SCALE_TAILS = ("weight_scale_inv", "weight_scale", "input_scale", "scales", "qzeros", "g_idx", "weight_shape")
"""Last words of what a quantised matrix is read with."""

_RESTORE = (
    "copy the MTP tensors from the checkpoint this one was made from (transformers' save_pretrained and many "
    "quantisers leave them out), or train new modules"
)
_NOT_COMPARED = "compare the block's tensors with those of the original checkpoint"
_OTHER_TRUNK = "they are made for another trunk: take trunk and MTP modules from one checkpoint"


def declared_and_stored(declared: int | None, where: str, stored: int) -> Finding:
    """Modules declared against modules of which any tensor is stored.

    >>> declared_and_stored(1, "num_nextn_predict_layers in config.json", 0).detail
    'num_nextn_predict_layers in config.json declares 1 module and no tensor of it is stored'

    Args:
        declared: None where nothing could declare any.
        where: the key, and where it stands.
        stored: modules.
    """
    if declared is None:
        if stored:
            return Finding("info", "MTP stored", f"{counted(stored, 'module')}; nothing here declares any")
        return Finding("info", "no MTP", "no tensor of an MTP module is stored, and nothing here could declare one")
    says = f"{where} declares {counted(declared, 'module')}"
    if declared == stored == 0:
        return Finding("ok", "no MTP", f"neither declared ({where} is absent or 0) nor stored")
    if stored == 0:
        it = "it" if declared == 1 else "them"
        return Finding("problem", "MTP lost", f"{says} and no tensor of {it} is stored", _RESTORE)
    if declared == 0:
        return Finding(
            "problem",
            "MTP undeclared",
            f"tensors of {counted(stored, 'module')} are stored, and {where} is absent or 0: every engine drops them",
            f"set {where} to {stored}, or remove the tensors",
        )
    if stored < declared:
        detail = f"{says} and tensors of only {stored} are stored"
        return Finding("problem", "MTP lost in part", detail, _RESTORE)
    if stored > declared:
        return Finding(
            "warning",
            "MTP undeclared in part",
            f"{says} and tensors of {stored} are stored: engines drop the others",
            f"set {where} to {stored}, or remove the tensors behind the first {declared}",
        )
    return Finding("ok", "MTP declared", f"{says}, and as many are stored")


def completeness(
    module: int, found: Shapes, layers: Mapping[int, Shapes], width: int | None, has_head_norm: bool = True
) -> list[Finding]:
    """Tensors that a module lacks, or has in another shape.

    Wanted are those of the fusion, and those of a block whose feed-forward is like one trunk layer's and whose rest is
    like one trunk layer's: the last one that has every tensor stored of that part.

    Args:
        module: its number, for the message.
        found: what is stored of it.
        layers: the trunk's layers.
        width: C; None leaves the shapes of the fusion unchecked.
        has_head_norm: whether the module has a norm of its own before the head.
    """
    fusion = (*_FUSION_ROLES, _HEAD_NORM) if has_head_norm else _FUSION_ROLES
    wanted: dict[str, tuple[int, ...] | None] = dict.fromkeys(fusion)
    if width is not None:
        wanted |= {role: (width, 2 * width) if role.startswith("eh_proj") else (width,) for role in fusion}
    stored, alien = _weights(found), []
    references = [_weights(layer) for _, layer in sorted(layers.items(), reverse=True)]
    for part in (True, False):
        roles = {role for role in stored if role.startswith("block.") and _is_feed_forward(role) is part}
        candidates = [{r: shape for r, shape in layer.items() if _is_feed_forward(r) is part} for layer in references]
        like = min(candidates, key=lambda candidate: len(roles - candidate.keys()), default={})
        alien += sorted(roles - like.keys())
        if roles <= like.keys():
            wanted |= like
    missing = sorted(role for role in wanted if role not in stored)
    misshapen = sorted(
        f"{role} is {shape_text(stored[role])} and should be {shape_text(shape)}"
        for role, shape in wanted.items()
        if shape and stored.get(role) and stored[role] != shape
    )
    findings = []
    if missing:
        detail = f"module {module} lacks {counted(len(missing), 'tensor')}: {some(missing)}"
        findings.append(Finding("problem", "MTP incomplete", detail, _RESTORE))
    if misshapen:
        detail = f"module {module}: {some(misshapen)}"
        findings.append(Finding("problem", "MTP misshapen", detail, _OTHER_TRUNK))
    if not findings and not alien:
        detail = f"module {module}: all of its {counted(len(found), 'tensor')} are there"
        findings.append(Finding("ok", "MTP complete", detail))
    if alien:
        detail = f"module {module} has {some(alien)}, as no trunk layer here: that part of the block was not compared"
        findings.append(Finding("warning", "block unlike the trunk", detail, _NOT_COMPARED))
    return findings


def scales(dtypes: Mapping[str, str]) -> list[Finding]:
    """FP8 matrices without the factors that give them their size. `dtypes`: of the MTP tensors, by name."""
    lost = [
        name
        for name, dtype in dtypes.items()
        if dtype.startswith("F8_")
        and not name.endswith(SCALE_TAILS)
        and not {f"{name}_scale_inv", f"{name}_scale"} & dtypes.keys()
    ]
    if not lost:
        return []
    detail = f"{counted(len(lost), 'FP8 tensor')} without its scale: {some(lost)}"
    return [Finding("problem", "MTP scales lost", detail, _RESTORE)]


def dtype_mix(mtp: Sequence[str], trunk: Sequence[str]) -> Finding:
    """Dtypes of the modules beside those of the trunk's layers; a warning only for float16 beside others."""
    counts = {side: Counter(dtypes) for side, dtypes in (("MTP", mtp), ("trunk", trunk))}
    detail = "; ".join(
        f"{side} {', '.join(f'{dtype} ({number})' for dtype, number in count.most_common())}"
        for side, count in counts.items()
        if count
    )
    if "F16" in counts["MTP"] and counts["trunk"] and "F16" not in counts["trunk"]:
        return Finding(
            "warning", "dtypes", f"{detail}: float16 overflows at 65504", "store the modules in the trunk's dtype"
        )
    return Finding("info", "dtypes", f"tensors by dtype: {detail}")


def repeated(module: int, found: Shapes) -> list[Finding]:
    """Copies of the embedding and the head in a module: allowed, and a matter of size."""
    copies = sorted(COPIES.keys() & found.keys())
    if not copies:
        return []
    millions = sum(math.prod(found[role]) for role in copies) / 1e6
    detail = f"module {module} repeats the trunk's {' and '.join(copies)} ({millions:,.1f}M values)"
    return [Finding("info", "copies", detail)]


def other_scheme(scheme: str, num_depths: int, wanted: Shapes, found: Shapes) -> list[Finding]:
    """Modules of a scheme that only nextn runs: what its settings mean against what is stored, by name."""
    says = f"nextn.mtp: scheme {scheme}, num_depths = {num_depths}"
    if not found and wanted:
        return [Finding("problem", "MTP lost", f"{says}, and no tensor of it is stored", _RESTORE)]
    if not found:
        return [Finding("ok", "no MTP", f"{says}, and none is stored")]
    missing = sorted(wanted.keys() - found.keys())
    misshapen = sorted(role for role in wanted.keys() & found.keys() if wanted[role] != found[role])
    if missing:
        detail = f"{says}: {counted(len(missing), 'tensor')} missing: {some(missing)}"
        return [Finding("problem", "MTP incomplete", detail, _RESTORE)]
    if misshapen:
        return [Finding("problem", "MTP misshapen", f"{says}: {some(misshapen)}", _OTHER_TRUNK)]
    return [Finding("ok", "MTP complete", f"{says}: all of its {len(found)} tensors are there")]


def unplaced(names: Collection[str], model_type: str | None) -> list[Finding]:
    """Tensors that look like MTP's by name in a layout that is not known for this family."""
    if not names:
        return []
    detail = (
        f"{counted(len(names), 'tensor')} with MTP-like names where model_type {model_type!r} has none: {some(names)}"
    )
    return [
        Finding("warning", "MTP-like tensors", detail, "nextn does not know this layout, so it could not examine them")
    ]


def own_settings(own_count: int | None, count: int | None, where: str) -> list[Finding]:
    """nextn's settings against the key that engines read. `own_count`: modules by nextn's, None without."""
    if own_count is None or count is None or own_count == count:
        return []
    return [
        Finding(
            "problem",
            "settings disagree",
            f"nextn.mtp in config.json means {counted(own_count, 'module')} for engines, and {where} says {count}",
            f"correct {where}, which the engines read, or nextn.mtp.num_depths",
        )
    ]


def _is_feed_forward(role: str) -> bool:
    return role.startswith(("block.mlp.", "block.ffn_", "block.exp_probs"))


def _weights(shapes: Shapes) -> dict[str, tuple[int, ...] | None]:
    """Roles as they are without quantisation; None is the shape of a packed matrix, which says nothing.

    >>> _weights({"block.mlp.up_proj.qweight": (2, 8), "block.mlp.up_proj.scales": (2, 1)})
    {'block.mlp.up_proj.weight': None}
    """
    weights: dict[str, tuple[int, ...] | None] = {}
    for role, shape in shapes.items():
        stem, _, tail = role.rpartition(".")
        if tail in PACKED_TAILS:
            weights[f"{stem}.weight"] = None
        elif tail not in SCALE_TAILS:
            weights[role] = shape
    return weights


def shape_text(shape: tuple[int, ...] | None) -> str:
    """For messages.

    >>> shape_text((4, 8))
    '4 x 8'
    """
    return " x ".join(map(str, shape or ()))
