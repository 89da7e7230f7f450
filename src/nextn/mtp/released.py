"""nextn's own trunk in a folder: DeepSeek-V3's released layout, which engines and transformers read.

    config.json                 `nextn.mtp.config_file`
    model.safetensors           `nextn.mtp.layout`; large models in shards, with an index

The sequential scheme is what was released and what engines serve. The modules of other schemes are stored under `mtp.`,
with `num_nextn_predict_layers` = 0, so that no engine takes them for what they are not. Embedding and output head are
stored once; the modules share them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from nextn.config import ModelConfig, MTPConfig
from nextn.errors import CheckpointError, ConfigError
from nextn.files import TensorFiles, write_weights
from nextn.model.device import resolve_device
from nextn.mtp.config_file import config_table, fp8_block, read_config
from nextn.mtp.layout import (
    copy_of,
    from_released_names,
    mtp_module,
    read_released,
    shapes,
    some,
    to_released_names,
    unlike,
)
from nextn.mtp.model import MTPModel
from nextn.mtp.store import CONFIG_FILE, Layout, ModelFolder, attach_origin, load_weights, resolve_dtype

_OUTDATED = ("rope_theta", "rope_scaling", "quantization_config", "dtype")
"""Fields of older or quantised folders that say what is written under another name, or is no longer so."""

_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "architectures", "auto_map", "transformers_version")
"""Fields that stay as the folder had them."""


class ReleasedLayout(Layout):
    """DeepSeek-V3's, for the sequential scheme and the others."""

    def has_place_for(self, mtp_config: MTPConfig) -> bool:
        """All schemes: those that were not released have names that no engine reads."""
        return True

    def config_table(self, model: MTPModel, with_modules: bool) -> dict[str, Any]:
        """DeepseekV3Config's fields as nextn has them, and the origin's other ones."""
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        eos_token_id = None if model.tokenizer is None else model.tokenizer.eos_token_id
        mtp_config = model.mtp_config if with_modules else MTPConfig(num_depths=0)
        table = config_table(model.config, mtp_config, dtype, eos_token_id)
        origin = {key: value for key, value in model.origin.table.items() if key not in _OUTDATED}
        kept = _KEPT if model.tokenizer is model.origin.tokenizer else ("architectures",)
        return origin | table | {key: origin[key] for key in kept if key in origin}

    def write_weights(self, model: MTPModel, folder: Path, max_shard_bytes: int, with_modules: bool) -> None:
        """All tensors under released names."""
        mtp_config = model.mtp_config if with_modules else MTPConfig(num_depths=0)
        write_weights(folder, _released_tensors(model, mtp_config), max_shard_bytes)

    def read_state(self, folder: ModelFolder, model: MTPModel) -> dict[str, Tensor]:
        """From released names, FP8 blocks dequantised."""
        config = model.config
        held = MTPConfig(num_depths=0) if folder.has_own_modules else model.mtp_config
        _check_names(folder.files, _released_tensors(model, held), config, folder.path)
        block = fp8_block(folder.table, folder.path / CONFIG_FILE)
        return from_released_names(read_released(folder.files, config, str(folder.path), block), config)


def _released_tensors(model: MTPModel, mtp_config: MTPConfig) -> dict[str, Tensor]:
    """The model's tensors by released name; those of the scheme only where `mtp_config` has depths."""
    state = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in model.state_dict().items()
        if not _is_alias(name, model.config)
        and ".lora_" not in name
        and (mtp_config.num_depths or not name.startswith("scheme."))
    }
    return to_released_names(state, model.config, mtp_config)


def load_model(path: str | Path | ModelFolder, device: str = "cpu", dtype: str = "float32") -> MTPModel:
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
    torch_dtype, target = resolve_dtype(dtype), resolve_device(device)
    opened = path if isinstance(path, ModelFolder) else ModelFolder.open(path)
    _ = opened.files  # refused before any settings are read
    config, mtp_config = read_config(opened.table, opened.path / CONFIG_FILE)
    try:
        model = MTPModel(config, mtp_config)
    except ConfigError as error:
        raise CheckpointError(f"{opened.path / CONFIG_FILE} does not describe a model: {error}") from None
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch_dtype)
    load_weights(model, opened)
    attach_origin(model, opened)
    return model.to(target).eval()


def _is_alias(name: str, config: ModelConfig) -> bool:
    """True for the name of a tensor that is stored under another one."""
    return config.tie_word_embeddings and name == "trunk.lm_head.weight"


def _check_names(files: TensorFiles, wanted: Mapping[str, Tensor], config: ModelConfig, folder: Path) -> None:
    """Raise CheckpointError unless exactly the wanted tensors are stored, in their shapes, by released names."""
    names = [name for name in files.names if not name.endswith("_scale_inv") and copy_of(name, config) is None]
    stored, means = {name: files.shape(name) for name in names}, shapes(wanted)
    missing, unexpected, misshapen = unlike(means, stored)
    if misshapen and not missing and not unexpected:
        name = misshapen[0]
        raise CheckpointError(f"{folder}: {name} has shape {stored[name]}, config.json means {means[name]}")
    lists = [
        f"{some(names).replace(' ', f' {kind} ', 1)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    if not lists:
        return
    hint = ""
    if any(mtp_module(name, config) is not None for name in (*missing, *unexpected)):
        hint = (
            f". They belong to MTP modules: `nextn doctor {folder}` says what happened to them; with "
            "num_nextn_predict_layers = 0 and no such tensors the trunk loads alone"
        )
    raise CheckpointError(f"{folder}: tensors do not fit config.json: {'; '.join(lists)}{hint}")
