"""LoRA factors in a trunk, by PEFT (arXiv 2106.09685): put in before training, merged when a model is loaded."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from nextn.config import LoraConfig
from nextn.errors import CheckpointError, ConfigError
from nextn.files import read_json
from nextn.model import Transformer
from nextn.mtp.model import MTPModel
from nextn.mtp.store import ADAPTER_CONFIG, ADAPTER_FOLDER, ModelFolder, load_adapter

_READ_AS_STORED = "kv_b_proj"
"""nextn's own attention reads this matrix itself while it decodes, so factors beside it would be left out there."""


def add_factors(model: MTPModel, config: LoraConfig, seed: int) -> None:
    """Freeze the trunk and put trainable factors beside its linear layers; B is zero, so the model computes the same.

    Args:
        model: its trunk is changed in place.
        config: rank, scale and layers.
        seed: of the factors A, the same on every device.

    Raises ConfigError: PEFT is not installed, or no layer of that name, or one that cannot have factors.
    """
    peft = _peft()
    linear = _linear_names(model)
    wanted = config.targets or tuple(sorted(linear))
    if unknown := sorted(set(wanted) - linear):
        raise ConfigError(
            f"trunk.lora.targets names {', '.join(unknown)}, and the linear layers of this trunk that can have factors "
            f"are {', '.join(sorted(linear))}"
        )
    settings = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=list(wanted), lora_dropout=0.0)
    model.trunk.requires_grad_(False)  # type: ignore[attr-defined]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(settings, _holder(model))
    table = settings.to_dict()
    model.adapter = {key: sorted(value) if isinstance(value, set) else value for key, value in table.items()}


def merge_adapter(model: MTPModel, folder: ModelFolder) -> None:
    """Read the factors of a checkpoint into the model and merge them into its trunk: W <- W + (alpha / rank) B A.

    Raises CheckpointError: the factors do not fit the trunk; ConfigError: PEFT is not installed.
    """
    peft = _peft()
    table = read_json(folder.path / ADAPTER_FOLDER / ADAPTER_CONFIG)
    try:
        settings = peft.LoraConfig(
            r=table["r"], lora_alpha=table["lora_alpha"], target_modules=list(table["target_modules"])
        )
        peft.inject_adapter_in_model(settings, _holder(model))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder.path}: {ADAPTER_FOLDER} does not fit the trunk: {error}") from None
    model.adapter = table
    load_adapter(model, folder)
    for parent in list(_holder(model).modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, peft.tuners.lora.LoraLayer):
                child.merge()
                setattr(parent, name, child.get_base_layer())
    model.adapter = None
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def _holder(model: MTPModel) -> nn.Module:
    """The module whose names PEFT counts from: transformers' model, or nextn's own trunk."""
    return model.trunk if isinstance(model.trunk, Transformer) else model.trunk.model  # type: ignore[attr-defined]


def _linear_names(model: MTPModel) -> set[str]:
    """Last parts of the names of the trunk's linear layers, without the output head and what is read as stored."""
    head, own = model.trunk.output_head, isinstance(model.trunk, Transformer)
    names = {
        name.rpartition(".")[2]
        for name, module in _holder(model).named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    return names - {_READ_AS_STORED} if own else names


def _peft() -> Any:
    try:
        return importlib.import_module("peft")
    except ImportError:
        raise ConfigError(
            "low-rank factors need PEFT: pip install peft (the extra nextn[lora]), or train the whole trunk "
            "(trunk.train = 'all') or none of it (trunk.train = 'none')"
        ) from None
