"""Read a checkpoint's declarations, and sort its stored tensors, from its headers alone.

Tensors are sorted into the trunk's layers and the MTP modules, each under its *role*: the name inside a module in
DeepSeek's words (`enorm.weight`, `eh_proj.weight`, `shared_head.norm.weight`), or `block.` and the name inside a layer
in the file's own words (`block.self_attn.o_proj.weight`, in GGUF `block.attn_output.weight`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor

from nextn.errors import CheckpointError
from nextn.files import INDEX_FILE, PICKLE_SUFFIXES, WEIGHTS_FILE, read_json
from nextn.interop.families import FAMILIES, Family, count_keys, family_of, text_config
from nextn.interop.gguf_layout import ARCHITECTURE
from nextn.mtp import find_checkpoint
from nextn.mtp.layout import RELEASED_SCHEME
from nextn.mtp.store import CONFIG_FILE, ModelFolder
from nextn.tables import to_table

Kind = Literal["folder", "safetensors", "gguf"]

_BEHIND_ALL = 1 << 30
_SHARD = re.compile(r".+-\d+-of-(\d+)\.(?:safetensors|gguf)")
_TRUNK_LAYER = re.compile(r"(?:(?:model|language_model|backbone)\.)*layers\.(\d+)\.(.+)")
_GGUF_LAYER = re.compile(r"blk\.(\d+)\.(nextn\.)?(.+)")
_ONLY_IN_MODULES = re.compile(r"(?:model\.layers|blk)\.(\d+)\.(?:nextn\.)?(?:enorm|hnorm|eh_proj|shared_head)\b.*")
_OWN_MODULE = re.compile(r"mtp\.layers\.(\d+)\.(?:(block\.)(?:layers\.0\.)?)?(.+)")
_LOOKS_LIKE_MTP = re.compile(r"(?:^|\.)(?:mtp\w*|nextn|enorm|hnorm|eh_proj|shared_head)(?:\.|$)")
_GGUF_ROLES = {
    "shared_head_norm.weight": "shared_head.norm.weight",
    "shared_head_head.weight": "shared_head.head.weight",
}
_DEEPSEEK = next(family for family in FAMILIES if "deepseek_v3" in family.model_types)


class TensorSource(Protocol):
    """Tensors known by name, shape and dtype, and read one at a time: `TensorFiles`, or a GGUF file."""

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor's name."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """As a torch tensor has it: rows first."""
        ...

    def dtype(self, name: str) -> str:
        """In the format's words: BF16, F8_E4M3, Q8_0, ..."""
        ...

    def read(self, name: str) -> Tensor:
        """The values."""
        ...


@dataclass(frozen=True)
class Declaration:
    """The settings beside the tensors (in GGUF, before them).

    Attributes:
        model_type: the family's name: `model_type`, or GGUF's `general.architecture`; None where nothing says.
        family: the family, if nextn's table has it.
        count: MTP modules declared; None where nothing could declare them.
        count_key: where that is said, or would be.
        num_layers: layers of the trunk; None where nothing says.
        width: C; None where nothing says.
        context: longest context in tokens; None where nothing says.
        own: nextn's settings of MTP (`nextn.mtp`), where the checkpoint has them.
        is_part: whether these are the settings of one file of several (a split GGUF).
        table: config.json, parsed; empty without one.
        has_own_modules: MTP modules lie in nextn's own layout, beside the trunk.
    """

    model_type: str | None = None
    family: Family | None = None
    count: int | None = None
    count_key: str = "config.json"
    num_layers: int | None = None
    width: int | None = None
    context: int | None = None
    own: Mapping[str, Any] | None = None
    is_part: bool = False
    table: Mapping[str, Any] = field(default_factory=dict, repr=False)
    has_own_modules: bool = False

    @property
    def is_released_layout(self) -> bool:
        """False for nextn's schemes that no engine runs, whose modules lie under `mtp.`."""
        return self.own is None or self.own.get("scheme", RELEASED_SCHEME) == RELEASED_SCHEME


@dataclass(frozen=True)
class Stored:
    """The tensors in their places.

    Attributes:
        source: where they are read from.
        modules: by module (0-based), role -> name. Empty modules are not listed.
        layers: the trunk's, by layer, role -> name.
        unplaced: names that look like MTP's and fit no known layout.
    """

    source: TensorSource
    modules: Mapping[int, Mapping[str, str]] = field(default_factory=dict)
    layers: Mapping[int, Mapping[str, str]] = field(default_factory=dict)
    unplaced: tuple[str, ...] = ()

    @property
    def mtp_names(self) -> tuple[str, ...]:
        """Every MTP tensor in a known place."""
        return tuple(name for module in self.modules.values() for name in module.values())

    def shapes(self, roles: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
        """Shapes by role, of a module or a layer."""
        return {role: self.source.shape(name) for role, name in roles.items()}


def locate(path: Path) -> tuple[Path, Kind]:
    """Find the checkpoint to examine at a path: a checkpoint folder, a safetensors file or a GGUF file.

    Raises CheckpointError where there is no checkpoint of any kind.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; name a checkpoint's folder, a .safetensors or a .gguf file")
    if path.is_file():
        is_whole = path.name == WEIGHTS_FILE and (path.parent / CONFIG_FILE).exists()
        if path.name == INDEX_FILE or is_whole or _is_listed(path):
            return path.parent, "folder"
        if path.suffix == ".gguf":
            return path, "gguf"
        if path.suffix in (".safetensors", *PICKLE_SUFFIXES):
            return path, "safetensors"
        raise CheckpointError(f"{path} is no checkpoint: wanted a folder, a .safetensors or a .gguf file")
    if any((path / name).exists() for name in (CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE)):
        return path, "folder"
    gguf = sorted(path.glob("*.gguf"))
    if len(gguf) == 1:
        return gguf[0], "gguf"
    if gguf:
        raise CheckpointError(f"{path} holds {len(gguf)} GGUF files; name one of them, for example {gguf[0].name}")
    return find_checkpoint(path), "folder"


def is_shard(path: Path) -> bool:
    """Whether a file's name says that it is one of several.

    >>> is_shard(Path("a-00001-of-00002.gguf")), is_shard(Path("a-00001-of-00001.gguf"))
    (True, False)
    """
    match = _SHARD.fullmatch(path.name)
    return match is not None and int(match[1]) > 1


def _is_listed(path: Path) -> bool:
    """Whether the index beside a file names it, so that its folder is the checkpoint."""
    try:
        index = read_json(path.parent / INDEX_FILE)
    except CheckpointError:
        return False
    places = index.get("weight_map") if isinstance(index, dict) else None
    return isinstance(places, dict) and path.name in places.values()


def declared_in_folder(folder: Path) -> Declaration:
    """From config.json; empty where there is none. Raises CheckpointError when it is unreadable."""
    if not (folder / CONFIG_FILE).exists():
        return Declaration()
    table = read_json(folder / CONFIG_FILE)
    if not isinstance(table, dict):
        raise CheckpointError(f"{folder / CONFIG_FILE} should be a table, found {type(table).__name__}")
    model_type = table.get("model_type")
    if model_type is not None and not isinstance(model_type, str):
        raise CheckpointError(f"{folder / CONFIG_FILE}: model_type should be a name, found {model_type!r}")
    settings, family = text_config(table), family_of(table)
    if family is not None:
        key = family.count_key
    else:
        key = next((key for key in count_keys() if key in settings), _DEEPSEEK.count_key)
    opened = ModelFolder(folder, table)
    mtp = opened.own.get("mtp")
    if opened.has_own_modules and (own := opened.own_settings()) is not None:
        return Declaration(
            model_type,
            family,
            min(own.num_depths, 1) if own.share_weights else own.num_depths,
            f"nextn.mtp in {CONFIG_FILE}",
            _whole(settings, "num_hidden_layers", folder),
            _whole(settings, "hidden_size", folder),
            _whole(settings, "max_position_embeddings", folder),
            own=to_table(own),
            table=table,
            has_own_modules=True,
        )
    return Declaration(
        model_type=model_type,
        family=family,
        count=None if key is None else _whole(settings, key, folder) or 0,
        count_key=f"{key} in {CONFIG_FILE}" if key else CONFIG_FILE,
        num_layers=_whole(settings, "num_hidden_layers", folder),
        width=_whole(settings, "hidden_size", folder),
        context=_whole(settings, "max_position_embeddings", folder),
        own=mtp if isinstance(mtp, dict) else None,
        table=table,
    )


def declared_in_gguf(metadata: Mapping[str, Any]) -> Declaration:
    """From a GGUF file's settings; `block_count` counts the MTP blocks too. Of a split model only part 1 has any."""
    architecture = metadata.get("general.architecture")
    is_part = int(metadata.get("split.count") or 1) > 1
    if architecture is None and is_part:
        return Declaration(is_part=True)

    def number(key: str) -> int | None:
        value = metadata.get(f"{architecture}.{key}")
        return None if value is None else int(value)

    count, blocks = number("nextn_predict_layers") or 0, number("block_count")
    return Declaration(
        model_type=str(architecture),
        family=_DEEPSEEK if architecture == ARCHITECTURE else None,
        count=count,
        count_key=f"{architecture}.nextn_predict_layers",
        num_layers=None if blocks is None else blocks - count,
        width=number("embedding_length"),
        context=number("context_length"),
        is_part=is_part,
    )


def sort_tensors(source: TensorSource, declaration: Declaration) -> Stored:
    """Put every tensor into its place; where nothing names the family, DeepSeek's layout and GGUF's are looked for."""
    first = _first_module(source.names, declaration.num_layers)
    family = declaration.family or _DEEPSEEK
    sides: dict[str, dict[int, dict[str, str]]] = {"trunk": {}, "mtp": {}}
    unplaced = []
    for name in source.names:
        if declaration.has_own_modules and declaration.is_released_layout:
            place = _place_in_own_layout(name)
        else:
            place = _place(name, family, first) if declaration.is_released_layout else _place_of_other_scheme(name)
        if place is not None:
            side, index, role = place
            sides[side].setdefault(index, {})[role] = name
        elif _LOOKS_LIKE_MTP.search(name):
            unplaced.append(name)
    return Stored(source, sides["mtp"], sides["trunk"], tuple(unplaced))


Place = tuple[Literal["trunk", "mtp"], int, str]
"""Whose tensor it is, which layer or module, and its role there."""


def _place(name: str, family: Family, first_module: int) -> Place | None:
    if match := _GGUF_LAYER.fullmatch(name):
        layer, role = int(match[1]), _GGUF_ROLES.get(match[3], match[3]) if match[2] else f"block.{match[3]}"
        return ("trunk", layer, role) if layer < first_module else ("mtp", layer - first_module, role)
    if (located := family.layout.locate(name, first_module)) is not None:
        return "mtp", *located
    place = _place_in_trunk(name)
    return place and (*place[:2], _renamed(place[2], family))


def _place_in_trunk(name: str) -> Place | None:
    match = _TRUNK_LAYER.fullmatch(name)
    return ("trunk", int(match[1]), f"block.{match[2]}") if match else None


def _renamed(role: str, family: Family) -> str:
    """A trunk layer's role under the name that the family's layout gives it in a module's block.

    >>> family = next(family for family in FAMILIES if family.name == "MiMo-V2-Flash")
    >>> _renamed("block.self_attn.attention_sink_bias", family)
    'block.self_attn.sinks'
    """
    block = next((stored for stored, inside in family.layout if inside == "block."), "")
    for stored, inside in family.layout:
        old = f"block.{stored.removeprefix(block)}"
        if inside.startswith("block.") and stored.startswith(block) and role.startswith(old):
            return inside + role.removeprefix(old)
    return role


def _place_in_own_layout(name: str) -> Place | None:
    """nextn's own layout of a chain's modules, beside any trunk; their blocks may count transformers' layers.

    >>> _place_in_own_layout("mtp.layers.0.block.layers.0.self_attn.q_proj.weight")
    ('mtp', 0, 'block.self_attn.q_proj.weight')
    """
    match = _OWN_MODULE.fullmatch(name)
    return ("mtp", int(match[1]), f"{match[2] or ''}{match[3]}") if match else _place_in_trunk(name)


def _place_of_other_scheme(name: str) -> Place | None:
    """nextn's own layout of other schemes: all of them under `mtp.`, taken as one module."""
    return ("mtp", 0, name.removeprefix("mtp.")) if name.startswith("mtp.") else _place_in_trunk(name)


def _first_module(names: Iterable[str], num_layers: int | None) -> int:
    """The first layer that is an MTP module: behind the trunk as declared, or with tensors that only modules have."""
    places = (first_marked(names), num_layers)
    return min((place for place in places if place is not None), default=_BEHIND_ALL)


def first_marked(names: Iterable[str]) -> int | None:
    """The first layer (0-based) with tensors that only MTP modules have; None where there is none."""
    return min((int(match[1]) for match in map(_ONLY_IN_MODULES.fullmatch, names) if match), default=None)


def _whole(settings: Mapping[str, Any], key: str, folder: Path) -> int | None:
    value = settings.get(key)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise CheckpointError(f"{folder / CONFIG_FILE}: {key} should be a whole number, found {value!r}")
    return value
