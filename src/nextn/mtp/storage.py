"""A model as a Hugging Face folder, its MTP weights laid out as DeepSeek released them.

    model.layers.{0..L-1}.*     the trunk's layers, experts one by one (`mlp.experts.3.gate_proj.weight`)
    model.layers.{L..}.*        MTP modules: enorm, hnorm, eh_proj, shared_head.norm, and the block's own names

That is the sequential scheme, which is what was released and what engines serve (with the released conventions: a
checkpoint of others has the same layout, and only the key `nextn` says so). The modules of other schemes are
stored under `mtp.`, with `num_nextn_predict_layers` = 0, so that no engine takes them for what they are not.

Embedding and output head are stored once; the modules share them. `config.json` has DeepseekV3Config's fields, the
number of modules in the released layout as `num_nextn_predict_layers`, and nextn's settings under the key `nextn`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextn.checkpoint import PICKLE_SUFFIXES, list_checkpoints, read_json, read_tensors, write_json, write_tensors
from nextn.config import ModelConfig, MTPConfig
from nextn.data.tokenizers import load_tokenizer
from nextn.errors import CheckpointError, ConfigError, DeviceError
from nextn.model.device import resolve_device
from nextn.mtp.model import MTPModel
from nextn.mtp.sequential import Sequential
from nextn.tables import from_table, to_table

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
FIXED_FIELDS = {"hidden_act": "silu", "scoring_func": "sigmoid", "topk_method": "noaux_tc"}
"""What DeepSeek-V3 leaves no choice about, named because the serving engines ask for it."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def save_model(model: MTPModel, folder: Path) -> None:
    """Write the model, and its tokenizer if it has one, into an existing folder (see `checkpoint.atomic_folder`)."""
    state = {name: tensor for name, tensor in model.state_dict().items() if not _is_alias(name, model.config)}
    write_tensors(folder / WEIGHTS_FILE, to_released_names(state, model.config, model.mtp_config))
    write_json(folder / CONFIG_FILE, config_table(model))
    if model.tokenizer is not None:
        model.tokenizer.save(folder)


def load_model(path: str | Path, device: str = "cpu", dtype: str = "float32") -> MTPModel:
    """Read a model written by `save_model`, in evaluation mode, its tokenizer attached.

    Args:
        path: the folder, or a run folder, whose newest checkpoint is taken.
        device: auto, cpu, cuda or cuda:N.
        dtype: of the weights: float32, bfloat16, float16 or float64; routing biases stay float32.

    Raises:
        CheckpointError: missing, truncated, foreign or pickled files; missing, unexpected or misshapen tensors (named).
        DeviceError: unknown device or dtype.
    """
    if dtype not in DTYPES:
        raise DeviceError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    target = resolve_device(device)
    folder = find_checkpoint(path)
    if not (folder / WEIGHTS_FILE).exists():
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
        found = f"only pickle files ({', '.join(pickles)}), which are refused" if pickles else "none"
        raise CheckpointError(f"{folder} should hold weights as {WEIGHTS_FILE}; found {found}")
    config, mtp_config = read_config(folder)
    try:
        model = MTPModel(config, mtp_config)
    except ConfigError as error:
        raise CheckpointError(f"{folder / CONFIG_FILE} does not describe a model: {error}") from None
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[dtype])
    state = from_released_names(read_tensors(folder / WEIGHTS_FILE), config, folder)
    _check_state(state, {n: t for n, t in model.state_dict().items() if not _is_alias(n, config)}, folder)
    model.load_state_dict(state, strict=False)
    model.to(target)
    if (folder / "tokenizer.json").exists():
        tokenizer = load_tokenizer(folder)
        if tokenizer.vocab_size > config.vocab_size:
            raise CheckpointError(
                f"{folder}: tokenizer.json has {tokenizer.vocab_size} tokens and the model knows {config.vocab_size}; "
                "put the tokenizer beside it that it was trained with"
            )
        model.tokenizer = tokenizer
    return model.eval()


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


def config_table(model: MTPModel) -> dict[str, Any]:
    """`config.json`: what transformers and the serving engines read, and nextn's own settings."""
    table: dict[str, Any] = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
    table |= to_table(model.config)
    table["rope_parameters"] = {key: value for key, value in table["rope_parameters"].items() if value is not None}
    table |= {
        "num_key_value_heads": model.config.num_attention_heads,
        "num_nextn_predict_layers": _num_released_modules(model),
        **FIXED_FIELDS,
        "torch_dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "bos_token_id": None,
        "eos_token_id": None if model.tokenizer is None else model.tokenizer.eos_token_id,
        "nextn": {"mtp": to_table(model.mtp_config)},
    }
    return table


def read_config(folder: Path) -> tuple[ModelConfig, MTPConfig]:
    """Trunk and MTP settings of a checkpoint. Raises CheckpointError for another family or a missing field."""
    table = read_json(folder / CONFIG_FILE)
    if not isinstance(table, dict) or table.get("model_type") != "deepseek_v3" or "nextn" not in table:
        kind = table.get("model_type") if isinstance(table, dict) else type(table).__name__
        raise CheckpointError(
            f"{folder / CONFIG_FILE} is not a nextn checkpoint: model_type is {kind!r}, wanted 'deepseek_v3' "
            "with nextn's settings under the key 'nextn'"
        )
    known = {key: value for key, value in table.items() if key in ModelConfig.__dataclass_fields__}
    try:
        for settings_class, found in ((ModelConfig, known), (MTPConfig, table["nextn"]["mtp"])):
            if missing := sorted(settings_class.__dataclass_fields__.keys() - found.keys()):
                raise ConfigError(f"it lacks {', '.join(missing)}")
        for key, wanted in FIXED_FIELDS.items():
            if table.get(key) != wanted:
                raise ConfigError(f"{key} is {table.get(key)!r}, and nextn computes {wanted!r} only")
        return from_table(ModelConfig, known, "config"), from_table(MTPConfig, table["nextn"]["mtp"], "nextn.mtp")
    except (ConfigError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / CONFIG_FILE} does not describe a model: {error}") from None


# ------------------------------------------------------------------------------------------------ names of the weights

RELEASED_SCHEME = "sequential"
"""The scheme of DeepSeek's released weights, whose layout it is stored in."""

_MTP_LAYER = re.compile(r"scheme\.layers\.(\d+)\.(?:block\.)?(.+)")
_MTP_OWN = ("enorm.", "hnorm.", "eh_proj.", "shared_head.")


def to_released_names(state: Mapping[str, Tensor], config: ModelConfig, mtp_config: MTPConfig) -> dict[str, Tensor]:
    """State dict -> released names: MTP modules become layers L, L+1, ..., stacked experts become single ones."""
    released = {}
    for name, tensor in state.items():
        if mtp_config.scheme == RELEASED_SCHEME and (match := _MTP_LAYER.fullmatch(name)):
            name = f"model.layers.{config.num_hidden_layers + int(match[1])}.{match[2]}"
        elif name.startswith("scheme."):
            name = f"mtp.{name.removeprefix('scheme.')}"
        name = name.removeprefix("trunk.")
        prefix, stacked, kind = name.rpartition(".experts.")
        if not stacked:
            released[name] = tensor
            continue
        for index, matrix in enumerate(tensor):
            if kind == "gate_up_proj":
                gate, up = matrix.chunk(2)
                released[f"{prefix}.experts.{index}.gate_proj.weight"] = gate
                released[f"{prefix}.experts.{index}.up_proj.weight"] = up
            else:
                released[f"{prefix}.experts.{index}.down_proj.weight"] = matrix
    return released


def from_released_names(released: Mapping[str, Tensor], config: ModelConfig, folder: Path) -> dict[str, Tensor]:
    """Released names -> state dict, the inverse of `to_released_names`. Raises CheckpointError for a missing expert."""
    state: dict[str, Tensor] = {}
    experts: dict[str, dict[tuple[int, str], Tensor]] = {}
    for name, tensor in released.items():
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if match and int(match[1]) >= config.num_hidden_layers:
            inside = match[2] if match[2].startswith(_MTP_OWN) else f"block.{match[2]}"
            name = f"scheme.layers.{int(match[1]) - config.num_hidden_layers}.{inside}"
        elif name.startswith("mtp."):
            name = f"scheme.{name.removeprefix('mtp.')}"
        else:
            name = f"trunk.{name}"
        if expert := re.fullmatch(r"(.+\.mlp\.experts)\.(\d+)\.(\w+)\.weight", name):
            experts.setdefault(expert[1], {})[int(expert[2]), expert[3]] = tensor
        else:
            state[name] = tensor
    for prefix, parts in experts.items():
        try:
            indices = range(config.n_routed_experts)
            gate_up = [torch.cat((parts.pop((i, "gate_proj")), parts.pop((i, "up_proj")))) for i in indices]
            state[f"{prefix}.gate_up_proj"] = torch.stack(gate_up)
            state[f"{prefix}.down_proj"] = torch.stack([parts.pop((i, "down_proj")) for i in indices])
        except KeyError as error:
            index, kind = error.args[0]
            raise CheckpointError(f"{folder}: missing tensor {prefix}.{index}.{kind}.weight") from None
        if parts:
            raise CheckpointError(f"{folder}: {prefix} holds more than the {config.n_routed_experts} experts declared")
    return state


def _num_released_modules(model: MTPModel) -> int:
    """Modules stored in the released layout: all of a chain, none of another scheme."""
    return len(model.scheme.layers) if isinstance(model.scheme, Sequential) else 0


def _is_alias(name: str, config: ModelConfig) -> bool:
    """True for the name of a tensor that is stored under another one."""
    return config.tie_word_embeddings and name == "trunk.lm_head.weight"


def _check_state(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], folder: Path) -> None:
    missing, unexpected = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or unexpected:
        lists = [
            f"{len(names)} {kind} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
            for kind, names in (("missing", missing), ("unexpected", unexpected))
            if names
        ]
        raise CheckpointError(f"{folder}: tensors do not fit config.json: {'; '.join(lists)}")
    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape:
            raise CheckpointError(
                f"{folder}: {name} has shape {tuple(tensor.shape)}, config.json wants {tuple(wanted[name].shape)}"
            )
