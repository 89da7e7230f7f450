"""Models in folders: one way to write, read and resume them, whatever their trunk.

    FOLDER/
        config.json                      the family's own; nextn's settings under the key `nextn`
        model*.safetensors               the trunk, and MTP modules in the layout that their family released
        mtp/model.safetensors            MTP modules that no released layout has a place for
        adapter/                         LoRA factors, in PEFT's layout
        tokenizer.json, generation_config.json, ...    as they were found, see `nextn.mtp.origin`

Where a run does not train its trunk, its checkpoints hold none: `nextn.trunk` in config.json names the folder that
does, which the run wrote once.

What differs between kinds of models is a `Layout`: that of nextn's own trunk is in `nextn.mtp.released`, that of
transformers' families in `nextn.interop.hf_layout`.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nextn.data.tokenizers import load_tokenizer
from nextn.errors import CheckpointError, ConfigError, DeviceError
from nextn.files import MAX_SHARD_BYTES, TensorFiles, list_checkpoints, read_json, write_json, write_tensors
from nextn.mtp.layout import check_plausible, separate_experts, shapes, some, stacked_experts, unlike
from nextn.mtp.origin import Origin
from nextn.tables import from_table, to_table

if TYPE_CHECKING:
    from nextn.config import MTPConfig
    from nextn.mtp.model import MTPModel

CONFIG_FILE = "config.json"
MODULES_FILE = "mtp/model.safetensors"
"""In a folder of its own, since engines take every safetensors file beside config.json for weights of the trunk."""
TRUNK_FOLDER = "trunk"
"""Of a run that does not train its trunk: where it lies, beside the checkpoints."""
TRUNK_BESIDE_CHECKPOINTS = f"../../{TRUNK_FOLDER}"
"""The same, seen from a checkpoint."""
ADAPTER_FOLDER, ADAPTER_FILE, ADAPTER_CONFIG = "adapter", "adapter_model.safetensors", "adapter_config.json"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

_LORA = (".lora_A.default.", ".lora_B.default.")


def resolve_dtype(name: str) -> torch.dtype:
    """The dtype of that name. Raises DeviceError for an unknown one."""
    if name not in DTYPES:
        raise DeviceError(f"unknown dtype {name!r}; known: {', '.join(DTYPES)}")
    return DTYPES[name]


@dataclass(frozen=True)
class ModelFolder:
    """A folder that holds a model, opened: config.json parsed, the tensors' headers read.

    Attributes:
        path: the folder.
        table: config.json.
    """

    path: Path
    table: Mapping[str, Any]

    @staticmethod
    def open(path: str | Path) -> ModelFolder:
        """Open a checkpoint folder, or the newest one of a run folder.

        Raises CheckpointError when there is none, or its config.json is no table.
        """
        folder = find_checkpoint(path)
        table = read_json(folder / CONFIG_FILE)
        if not isinstance(table, dict):
            raise CheckpointError(f"{folder / CONFIG_FILE} holds {type(table).__name__}, wanted a table of settings")
        return ModelFolder(folder, table)

    @cached_property
    def own(self) -> Mapping[str, Any]:
        """What stands under nextn's key of config.json; empty without one."""
        own = self.table.get("nextn")
        return own if isinstance(own, Mapping) else {}

    @cached_property
    def trunk_path(self) -> Path:
        """The folder that holds the trunk's tensors: this one, unless a run with a frozen trunk wrote it."""
        named = self.own.get("trunk")
        if named is None:
            return self.path
        if named != TRUNK_BESIDE_CHECKPOINTS:
            raise CheckpointError(
                f"{self.path / CONFIG_FILE}: nextn.trunk is {named!r}; nextn writes {TRUNK_BESIDE_CHECKPOINTS!r} only"
            )
        folder = (self.path / TRUNK_BESIDE_CHECKPOINTS).resolve()
        if not (folder / CONFIG_FILE).is_file():
            raise CheckpointError(
                f"{self.path} holds what its run trained, and the trunk lies in {named}, which is not there; move the "
                "run folder as a whole, or export the checkpoint first (nextn export)"
            )
        return folder

    @cached_property
    def files(self) -> TensorFiles:
        """The trunk's tensors, and those of MTP modules in a released layout. Raises CheckpointError."""
        return TensorFiles.open(self.trunk_path)

    @property
    def has_own_modules(self) -> bool:
        """MTP modules lie in nextn's layout, beside the trunk."""
        return (self.path / MODULES_FILE).exists()

    @property
    def has_adapter(self) -> bool:
        """LoRA factors lie beside the trunk that they change."""
        return (self.path / ADAPTER_FOLDER / ADAPTER_FILE).exists()

    @cached_property
    def own_modules(self) -> TensorFiles:
        """The MTP modules' tensors in nextn's layout. Raises CheckpointError."""
        return TensorFiles.open(self.path / MODULES_FILE)

    def own_settings(self) -> MTPConfig | None:
        """`mtp` under nextn's key, complete; None without the key. Raises CheckpointError for settings cut short."""
        from nextn.config import MTPConfig

        if "mtp" not in self.own:
            return None
        try:
            table = self.own["mtp"]
            if missing := sorted(vars(MTPConfig()).keys() - table.keys()):
                raise ConfigError(f"nextn.mtp lacks {', '.join(missing)}")
            return from_table(MTPConfig, table, "nextn.mtp")
        except (ConfigError, AttributeError) as error:
            raise CheckpointError(f"{self.path / CONFIG_FILE} does not describe a model: {error}") from None


class Layout(abc.ABC):
    """How the models of one kind lie in a folder."""

    @abc.abstractmethod
    def has_place_for(self, mtp_config: MTPConfig) -> bool:
        """The family's own files have names for these modules, and engines take them for what they are."""

    @abc.abstractmethod
    def config_table(self, model: MTPModel, with_modules: bool) -> dict[str, Any]:
        """config.json without nextn's key; `with_modules`: the weights hold the model's MTP modules."""

    @abc.abstractmethod
    def write_weights(self, model: MTPModel, folder: Path, max_shard_bytes: int, with_modules: bool) -> None:
        """Write the trunk's tensors into an existing folder, and the modules' under their released names."""

    @abc.abstractmethod
    def read_state(self, folder: ModelFolder, model: MTPModel) -> dict[str, Tensor]:
        """The model's state dict, without modules that lie in nextn's layout. Raises CheckpointError."""


def layout_of(model: MTPModel) -> Layout:
    """How this model lies in a folder: its trunk says it, or is nextn's own."""
    from nextn.mtp.released import ReleasedLayout

    layout = getattr(model.trunk, "layout", None)
    return ReleasedLayout() if layout is None else layout


def save_model(
    model: MTPModel, folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES, *, trunk: str | None = None
) -> None:
    """Write the model, and what stood beside it, into an existing folder (see `files.atomic_folder`).

    Args:
        model: any trunk, any scheme.
        folder: where to write.
        max_shard_bytes: larger models are split into files of at most this size.
        trunk: where the trunk lies already, relative to `folder`: only what it does not hold is written.

    Raises:
        CheckpointError: the folder cannot be written; LoRA factors that are not merged into the trunk, without `trunk`.
    """
    layout = layout_of(model)
    if trunk is None and model.adapter is not None:
        raise CheckpointError(
            f"{folder}: this model has LoRA factors beside its trunk; merge them first (nextn.load gives it merged)"
        )
    with_modules = trunk is None and model.scheme is not None and layout.has_place_for(model.mtp_config)
    if trunk is None:
        layout.write_weights(model, folder, max_shard_bytes, with_modules)
    if model.scheme is not None and not with_modules:
        (folder / MODULES_FILE).parent.mkdir()
        write_tensors(folder / MODULES_FILE, _module_tensors(model))
    if model.adapter is not None:
        (folder / ADAPTER_FOLDER).mkdir()
        write_tensors(folder / ADAPTER_FOLDER / ADAPTER_FILE, _adapter_tensors(model))
        write_json(folder / ADAPTER_FOLDER / ADAPTER_CONFIG, dict(model.adapter))
    table = layout.config_table(model, with_modules)
    table.pop("nextn", None)
    table["nextn"] = {"mtp": to_table(model.mtp_config)} | ({} if trunk is None else {"trunk": trunk})
    write_json(folder / CONFIG_FILE, table)
    model.origin.write(folder, model.tokenizer)
    if model.tokenizer is not model.origin.tokenizer and model.tokenizer is not None:
        model.tokenizer.save(folder)
    if model.tokenizer is not model.origin.tokenizer or not (folder / "generation_config.json").exists():
        eos_token_id = None if model.tokenizer is None else model.tokenizer.eos_token_id
        write_json(folder / "generation_config.json", {"eos_token_id": eos_token_id, "do_sample": False})


def save_trunk(model: MTPModel, folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write the trunk alone, and what stood beside it, into an existing folder: a model without MTP."""
    layout = layout_of(model)
    layout.write_weights(model, folder, max_shard_bytes, with_modules=False)
    table = layout.config_table(model, with_modules=False)
    table.pop("nextn", None)
    write_json(folder / CONFIG_FILE, table)
    model.origin.write(folder, model.tokenizer)
    if model.tokenizer is not model.origin.tokenizer and model.tokenizer is not None:
        model.tokenizer.save(folder)


def read_state(folder: ModelFolder, model: MTPModel, with_trunk: bool = True) -> dict[str, Tensor]:
    """The state dict of a model as a folder holds it.

    Args:
        folder: with the same trunk and modules as the model.
        model: says what is wanted; it is not changed.
        with_trunk: False leaves out the trunk's tensors, but for LoRA factors.

    Raises:
        CheckpointError: tensors that are missing, unexpected or misshapen, or that no training gave (named).
    """
    state = layout_of(model).read_state(folder, model) if with_trunk or not folder.has_own_modules else {}
    if not with_trunk:
        state = {name: tensor for name, tensor in state.items() if not name.startswith("trunk.")}
    if folder.has_own_modules:
        state |= _module_state(folder, model)
    if model.adapter is not None:
        state |= _adapter_state(folder, model)
    return state


def load_weights(model: MTPModel, folder: ModelFolder, with_trunk: bool = True) -> None:
    """Set a model's weights to those that a folder holds; see `read_state`."""
    load_state(model, read_state(folder, model, with_trunk), folder, with_trunk)


def load_state(model: MTPModel, state: Mapping[str, Tensor], folder: ModelFolder, with_trunk: bool = True) -> None:
    """Set a model's weights to what `read_state` gave. Raises CheckpointError where that is not complete."""
    if missing := _missing(model, state, with_trunk):
        raise CheckpointError(f"{folder.path}: tensors are missing: {some(missing)}")
    if next(model.parameters()).dtype == torch.float16:
        _check_range(state, folder.path)
    try:
        model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"{folder.path} holds another model: {error}") from None


def load_adapter(model: MTPModel, folder: ModelFolder) -> None:
    """Set the LoRA factors of a model's trunk to those that a folder holds. Raises CheckpointError."""
    model.load_state_dict(_adapter_state(folder, model), strict=False)


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder that `path` means: itself, or the newest one of a run folder.

    Raises CheckpointError when there is none.
    """
    folder = Path(path)
    if (folder / CONFIG_FILE).exists():
        return folder
    if not folder.exists():
        raise CheckpointError(f"{folder} does not exist; name a checkpoint or the folder of a run")
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        raise CheckpointError(f"{folder} is neither a checkpoint (no {CONFIG_FILE}) nor a run with checkpoints")
    return checkpoints[-1]


def attach_origin(model: MTPModel, folder: ModelFolder) -> None:
    """Give the model the tokenizer beside its weights, and keep all else that lies there.

    Raises CheckpointError for a tokenizer that is too large for the model.
    """
    if (folder.path / "tokenizer.json").exists():
        tokenizer = load_tokenizer(folder.path)
        if tokenizer.vocab_size > model.trunk.vocab_size:
            raise CheckpointError(
                f"{folder.path}: tokenizer.json has {tokenizer.vocab_size} tokens and the model knows "
                f"{model.trunk.vocab_size}; put the tokenizer beside it that it was trained with"
            )
        model.tokenizer = tokenizer
    model.origin = Origin.read(folder.path, folder.table, model.tokenizer)


def zero_norms(model: MTPModel) -> bool:
    """True for a trunk whose fresh norms are zeros, since they multiply by 1 + weight."""
    return not any(parameter.any() for parameter in model.trunk.new_norm().parameters())


# -------------------------------------------------------------------------------------- what lies in nextn's own layout


def _module_tensors(model: MTPModel) -> dict[str, Tensor]:
    assert model.scheme is not None, "there are modules to write"
    return {f"mtp.{name}": tensor for name, tensor in separate_experts(model.scheme.state_dict()).items()}


def _module_state(folder: ModelFolder, model: MTPModel) -> dict[str, Tensor]:
    """The scheme's state from `MODULES_FILE`. Raises CheckpointError naming tensors as they are stored."""
    files = folder.own_modules
    wanted = shapes(_module_tensors(model)) if model.scheme is not None else {}
    missing, unexpected, misshapen = unlike(wanted, {name: files.shape(name) for name in files.names})
    if missing or unexpected:
        found = "; ".join(
            f"{kind} {some(names)}" for kind, names in (("missing", missing), ("unexpected", unexpected)) if names
        )
        raise CheckpointError(f"{folder.path}: {MODULES_FILE} does not fit {CONFIG_FILE}: {found}")
    if misshapen:
        raise CheckpointError(
            f"{folder.path}: {misshapen[0]} in {MODULES_FILE} has shape {files.shape(misshapen[0])}, {CONFIG_FILE} "
            f"means {wanted[misshapen[0]]}"
        )
    tensors = {name: files.read(name) for name in files.names}
    for name, tensor in tensors.items():
        check_plausible(name, tensor, str(folder.path), zero_norms(model))
    return stacked_experts({f"scheme.{name.removeprefix('mtp.')}": tensor for name, tensor in tensors.items()})


def _check_range(state: Mapping[str, Tensor], folder: Path) -> None:
    """Raise CheckpointError for a weight that float16 has no number for."""
    largest = torch.finfo(torch.float16).max
    for name, tensor in state.items():
        if tensor.abs().max() > largest:
            raise CheckpointError(f"{folder}: {name} exceeds {largest:g}, float16's largest number; use bfloat16")


def _is_lora(name: str) -> bool:
    return any(part in name for part in _LORA)


def _peft_name(name: str) -> str:
    """A LoRA factor of our state dict as PEFT names it in files.

    >>> _peft_name("trunk.model.layers.0.self_attn.q_proj.lora_A.default.weight")
    'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight'
    """
    return f"base_model.model.{name.removeprefix('trunk.').replace('.default.', '.')}"


def _lora_state(model: MTPModel) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if _is_lora(name)}


def _adapter_tensors(model: MTPModel) -> dict[str, Tensor]:
    prefix = _trunk_prefix(model)
    return {_peft_name(name.replace(prefix, "trunk.", 1)): tensor for name, tensor in _lora_state(model).items()}


def _trunk_prefix(model: MTPModel) -> str:
    """How our names of the trunk's tensors begin: transformers' model lies one step deeper."""
    return "trunk.model." if isinstance(getattr(model.trunk, "layout", None), Layout) else "trunk."


def _adapter_state(folder: ModelFolder, model: MTPModel) -> dict[str, Tensor]:
    files = TensorFiles.open(folder.path / ADAPTER_FOLDER / ADAPTER_FILE)
    prefix = _trunk_prefix(model)
    wanted = {_peft_name(name.replace(prefix, "trunk.", 1)): name for name in _lora_state(model)}
    missing, unexpected, _ = unlike(dict.fromkeys(wanted, ()), dict.fromkeys(files.names, ()))
    if missing or unexpected:
        raise CheckpointError(
            f"{folder.path}: the LoRA factors in {ADAPTER_FOLDER} are not those of this model: missing "
            f"{some(missing)}, unexpected {some(unexpected)}"
        )
    return {name: files.read(stored) for stored, name in wanted.items()}


def _missing(model: MTPModel, state: Mapping[str, Tensor], with_trunk: bool) -> list[str]:
    """Names of the model's tensors that `state` has under no name: a tied output head is the embedding."""
    own = model.state_dict()
    held = {own[name].data_ptr() for name in state if name in own}
    wanted = (name for name in own if with_trunk or not name.startswith("trunk.") or _is_lora(name))
    return [name for name in wanted if name not in state and own[name].data_ptr() not in held]
