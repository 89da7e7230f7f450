"""`config.json` of a model: DeepseekV3Config's fields, and nextn's settings under the key `nextn`.

A checkpoint without that key, as DeepSeek released it and transformers writes it, has the conventions of the release
(`RELEASED_CONVENTIONS`); everywhere else they are read from the file, never implied.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nextn.config import ModelConfig, MTPConfig
from nextn.errors import CheckpointError, ConfigError
from nextn.mtp.layout import FP8_BLOCK, RELEASED_SCHEME
from nextn.tables import from_table, to_table

NATIVE = "deepseek_v3"
"""`model_type` of nextn's own trunk."""

FIXED_FIELDS = {"hidden_act": "silu", "scoring_func": "sigmoid", "topk_method": "noaux_tc"}
"""What DeepSeek-V3 leaves no choice about, named because the serving engines ask for it."""

RELEASED_CONVENTIONS = {
    "concat": "embed_first",
    "trunk_hidden": "post_norm",
    "carry": "post_norm",
    "head_norm": "own",
    "dense_blocks": False,
}
"""What DeepSeek's released modules compute, by the engines that run them (transformers' MtpModel, vLLM, SGLang)."""

OPTIONAL_FIELDS = {
    "rope_interleave": True,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "attention_bias": False,
}
"""Fields that a released config.json may leave out, with DeepseekV3Config's defaults."""


def config_table(config: ModelConfig, mtp_config: MTPConfig, dtype: str, eos_token_id: int | None) -> dict[str, Any]:
    """`config.json`: what transformers and the serving engines read; nextn's own key is the store's."""
    table: dict[str, Any] = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": NATIVE}
    table |= to_table(config)
    table["rope_parameters"] = {key: value for key, value in table["rope_parameters"].items() if value is not None}
    return table | {
        "num_key_value_heads": config.num_attention_heads,
        "num_nextn_predict_layers": num_released_modules(mtp_config),
        **FIXED_FIELDS,
        "torch_dtype": dtype,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
    }


def num_released_modules(mtp_config: MTPConfig) -> int:
    """Modules stored in the released layout: those of a chain, none of another scheme."""
    if mtp_config.scheme != RELEASED_SCHEME:
        return 0
    return min(mtp_config.num_depths, 1) if mtp_config.share_weights else mtp_config.num_depths


def read_config(table: Mapping[str, Any], where: Path) -> tuple[ModelConfig, MTPConfig]:
    """Trunk and MTP settings of a config.json in the released layout, with or without nextn's own key.

    Args:
        table: config.json, parsed.
        where: its path, for messages.

    Raises CheckpointError for another family, a missing field, or a value that nextn does not compute.
    """
    if table.get("model_type") != NATIVE:
        raise CheckpointError(
            f"{where}: model_type is {table.get('model_type')!r}, and nextn's own trunk is {NATIVE!r}"
        )
    own = table.get("nextn")
    try:
        if own is None:
            return _model_config(_modern(table)), _released_mtp_config(table)
        for key, wanted in FIXED_FIELDS.items():
            if table.get(key) != wanted:
                raise ConfigError(f"{key} is {table.get(key)!r}, and nextn computes {wanted!r} only")
        return _model_config(table), _complete(MTPConfig, own["mtp"], "nextn.mtp")
    except (ConfigError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{where} does not describe a model: {error}") from None


def fp8_block(table: Mapping[str, Any], where: Path) -> tuple[int, int]:
    """Rows and columns of an FP8 block. Raises CheckpointError for a quantisation that nextn cannot undo.

    Args:
        table: config.json, parsed.
        where: its path, for messages.
    """
    quantization = table.get("quantization_config")
    if quantization is None:
        return FP8_BLOCK
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if not isinstance(quantization, dict) or method != "fp8":
        raise CheckpointError(f"{where}: quant_method is {method!r}; nextn reads float and block-quantised FP8 weights")
    match quantization.get("weight_block_size") or FP8_BLOCK:
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
        case other:
            raise CheckpointError(f"{where}: weight_block_size is {other!r}, wanted [rows, columns]")


def _model_config(table: Mapping[str, Any]) -> ModelConfig:
    config: ModelConfig = _complete(ModelConfig, table, "config")
    return config


def _complete(settings_class: type, table: Mapping[str, Any], where: str) -> Any:
    """Settings of which the table has every field. Raises ConfigError naming those it lacks."""
    fields = {field.name for field in dataclasses.fields(settings_class)}
    if missing := sorted(fields - table.keys()):
        raise ConfigError(f"it lacks {', '.join(missing)}")
    known = {key: value for key, value in table.items() if key in fields}
    return from_table(settings_class, known if settings_class is ModelConfig else table, where)


def _modern(table: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config.json without nextn's key, under today's names."""
    for key, wanted in {**FIXED_FIELDS, "moe_layer_freq": 1}.items():
        if table.get(key, wanted) != wanted:
            raise ConfigError(f"{key} is {table[key]!r}, and nextn computes {wanted!r} only")
    modern = OPTIONAL_FIELDS | dict(table)
    if "rope_parameters" not in modern:
        modern["rope_parameters"] = {"rope_theta": table["rope_theta"], **(table.get("rope_scaling") or {})}
    rope = {key: value for key, value in modern["rope_parameters"].items() if value is not None}
    rope.setdefault("rope_type", rope.get("type", "default"))
    rope.pop("type", None)
    rope["rope_theta"] = float(rope["rope_theta"])
    return modern | {"rope_parameters": rope}


def _released_mtp_config(table: Mapping[str, Any]) -> MTPConfig:
    num_modules = int(table.get("num_nextn_predict_layers") or 0)
    conventions: dict[str, Any] = RELEASED_CONVENTIONS if num_modules else {}
    return MTPConfig(scheme=RELEASED_SCHEME, num_depths=num_modules, **conventions)
