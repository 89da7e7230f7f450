"""A model as a Hugging Face folder, its MTP weights laid out as DeepSeek released them.

    config.json                 `nextn.mtp.config_file`
    model.safetensors           `nextn.mtp.layout`; large models in shards, with an index
    generation_config.json      how the text ends
    tokenizer.json, ...         `nextn.data.tokenizers`

The sequential scheme is what was released and what engines serve. The modules of other schemes are stored under `mtp.`,
with `num_nextn_predict_layers` = 0, so that no engine takes them for what they are not. Embedding and output head are
stored once; the modules share them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from nextn.config import ModelConfig
from nextn.data.tokenizers import load_tokenizer
from nextn.errors import CheckpointError, ConfigError, DeviceError
from nextn.files import MAX_SHARD_BYTES, TensorFiles, list_checkpoints, write_json, write_weights
from nextn.model.device import resolve_device
from nextn.mtp.config_file import CONFIG_FILE, config_table, fp8_block, read_config
from nextn.mtp.layout import copy_of, from_released_names, mtp_module, read_released, to_released_names
from nextn.mtp.model import MTPModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def save_model(model: MTPModel, folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write the model, and its tokenizer if it has one, into an existing folder (see `files.atomic_folder`)."""
    state = {name: tensor for name, tensor in model.state_dict().items() if not _is_alias(name, model.config)}
    write_weights(folder, to_released_names(state, model.config, model.mtp_config), max_shard_bytes)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    eos_token_id = None if model.tokenizer is None else model.tokenizer.eos_token_id
    write_json(folder / CONFIG_FILE, config_table(model.config, model.mtp_config, dtype, eos_token_id))
    write_json(folder / "generation_config.json", {"eos_token_id": eos_token_id, "do_sample": False})
    if model.tokenizer is not None:
        model.tokenizer.save(folder)


def load_model(path: str | Path, device: str = "cpu", dtype: str = "float32") -> MTPModel:
    """Read a model from a folder in DeepSeek-V3's layout, in evaluation mode, its tokenizer attached.

    It may be written by `save_model` or by others: sharded, block-quantised FP8, with copies of embedding and head.

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
    files = TensorFiles.open(folder)
    config, mtp_config = read_config(folder)
    try:
        model = MTPModel(config, mtp_config)
    except ConfigError as error:
        raise CheckpointError(f"{folder / CONFIG_FILE} does not describe a model: {error}") from None
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[dtype])
    wanted = {name: tensor for name, tensor in model.state_dict().items() if not _is_alias(name, config)}
    _check_names(files, to_released_names(wanted, config, mtp_config), config, folder)
    state = from_released_names(read_released(files, config, str(folder), fp8_block(folder)), config)
    if dtype == "float16":
        _check_range(state, folder)
    model.load_state_dict(state, strict=False)
    model.to(target)
    attach_tokenizer(model, folder)
    return model.eval()


def attach_tokenizer(model: MTPModel, folder: Path) -> None:
    """Give the model the tokenizer beside its weights, if there is one. Raises CheckpointError for one too large."""
    if not (folder / "tokenizer.json").exists():
        return
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > model.trunk.vocab_size:
        raise CheckpointError(
            f"{folder}: tokenizer.json has {tokenizer.vocab_size} tokens and the model knows {model.trunk.vocab_size}; "
            "put the tokenizer beside it that it was trained with"
        )
    model.tokenizer = tokenizer


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


def _is_alias(name: str, config: ModelConfig) -> bool:
    """True for the name of a tensor that is stored under another one."""
    return config.tie_word_embeddings and name == "trunk.lm_head.weight"


def _check_range(state: Mapping[str, Tensor], folder: Path) -> None:
    """Raise CheckpointError for a weight that float16 has no number for."""
    largest = torch.finfo(torch.float16).max
    for name, tensor in state.items():
        if tensor.abs().max() > largest:
            raise CheckpointError(f"{folder}: {name} exceeds {largest:g}, float16's largest number; use bfloat16")


def _check_names(files: TensorFiles, wanted: Mapping[str, Tensor], config: ModelConfig, folder: Path) -> None:
    """Raise CheckpointError unless exactly the wanted tensors are stored, in their shapes, by released names."""
    stored = {name for name in files.names if not name.endswith("_scale_inv") and copy_of(name, config) is None}
    missing, unexpected = sorted(wanted.keys() - stored), sorted(stored - wanted.keys())
    if not missing and not unexpected:
        for name, tensor in wanted.items():
            if files.shape(name) != tuple(tensor.shape):
                raise CheckpointError(
                    f"{folder}: {name} has shape {files.shape(name)}, config.json means {tuple(tensor.shape)}"
                )
        return
    lists = [
        f"{len(names)} {kind} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
        for kind, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    hint = ""
    if any(mtp_module(name, config) is not None for name in (*missing, *unexpected)):
        hint = (
            f". They belong to MTP modules: `nextn doctor {folder}` says what happened to them; with "
            "num_nextn_predict_layers = 0 and no such tensors the trunk loads alone"
        )
    raise CheckpointError(f"{folder}: tensors do not fit config.json: {'; '.join(lists)}{hint}")
