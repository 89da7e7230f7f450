"""`nextn.load`: any checkpoint nextn can run, with nextn's own trunk or transformers' one.

A DeepSeek-V3 checkpoint, nextn's own included, is read by `nextn.mtp.released`. For the other families transformers
reads the trunk, and the MTP tensors, which it drops, are read by `nextn.interop.hf_layout`: renamed by the layout of
`nextn.interop.families` into the sequential scheme with the family's conventions, or as the scheme that nextn's key in
config.json names. A language model without MTP has K = 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from nextn.config import MTPConfig
from nextn.errors import CheckpointError, ConfigError
from nextn.files import TensorFiles
from nextn.interop.adapter import TransformersTrunk
from nextn.interop.families import FAMILIES, Family, count_keys, family_of, text_config
from nextn.interop.hf_layout import TransformersLayout, quiet
from nextn.interop.lora import merge_adapter
from nextn.model.device import resolve_device
from nextn.mtp.config_file import NATIVE
from nextn.mtp.layout import some
from nextn.mtp.model import MTPModel
from nextn.mtp.released import load_model
from nextn.mtp.store import CONFIG_FILE, ModelFolder, attach_origin, read_state, resolve_dtype

_LOOKS_LIKE_MTP = re.compile(r"(?:^|\.)(?:mtp\w*|nextn)\.")


def load(path: str | Path, device: str = "cpu", dtype: str = "float32") -> MTPModel:
    """A model with its MTP modules, in evaluation mode, its tokenizer attached if the folder has one.

    Args:
        path: a checkpoint folder, or a run folder, whose newest checkpoint is taken.
        device: auto, cpu, cuda or cuda:N.
        dtype: of the weights: float32, bfloat16, float16 or float64; routing biases stay float32.

    Raises:
        CheckpointError: missing, truncated, foreign or pickled files; a family that nextn or transformers does not
            know; tensors that are missing, unexpected, misshapen or were never initialised (named).
        DeviceError: unknown device or dtype.
    """
    folder = ModelFolder.open(path)
    model = load_unmerged(folder, device, dtype)
    if folder.has_adapter:
        merge_adapter(model, folder)
    return model


def load_unmerged(path: str | Path | ModelFolder, device: str = "cpu", dtype: str = "float32") -> MTPModel:
    """The same without the LoRA factors that may lie beside the trunk."""
    folder = path if isinstance(path, ModelFolder) else ModelFolder.open(path)
    is_native = folder.table.get("model_type") == NATIVE
    return (load_model if is_native else load_with_transformers)(folder, device, dtype)


def load_with_transformers(path: str | Path | ModelFolder, device: str = "cpu", dtype: str = "float32") -> MTPModel:
    """The same with transformers' trunk whatever the family, DeepSeek-V3 too, and without LoRA factors."""
    torch_dtype, target = resolve_dtype(dtype), resolve_device(device)
    folder = path if isinstance(path, ModelFolder) else ModelFolder.open(path)
    where, table, _ = folder.path, folder.table, folder.files  # pickles are refused before any settings are read
    if "model_type" not in table:
        raise CheckpointError(f"{where / CONFIG_FILE} names no model_type, so nobody knows what these tensors are")
    if table.get("quantization_config") is not None:
        _refuse_quantised(where, table["quantization_config"])
    family = family_of(table)
    try:
        mtp_config = _mtp_config(folder, family)
        hf_model = transformers_model(folder, family, torch_dtype)
        if family is None:
            _refuse_unknown_modules(folder)
        trunk = TransformersTrunk(hf_model, family.block_settings if family else None, TransformersLayout(family))
        trunk.layout.files = folder.files
        model = MTPModel(None, mtp_config, trunk)
        _cast_modules(model, torch_dtype)
        if model.scheme is not None:
            model.load_state_dict(read_state(folder, model, with_trunk=False), strict=False)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from None
    attach_origin(model, folder)
    return model.to(target).eval()


def _cast_modules(model: MTPModel, dtype: torch.dtype) -> None:
    """The modules' weights in that dtype, but for those that the family keeps in float32."""
    if model.scheme is None:
        return
    in_float32 = tuple(getattr(model.trunk.model, "_keep_in_fp32_modules_strict", None) or ())  # type: ignore[attr-defined]
    for name, parameter in model.scheme.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if any(part in name for part in in_float32) else dtype)


def _refuse_quantised(folder: Path, value: Any) -> NoReturn:
    if not isinstance(value, Mapping):
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: quantization_config is {value!r}, which says no method; take it out if the "
            "weights are float"
        )
    raise CheckpointError(
        f"{folder}: weights quantised by {value.get('quant_method', 'an unnamed method')!r} are read for {NATIVE} "
        "only; save them as float weights first"
    )


def _mtp_config(folder: ModelFolder, family: Family | None) -> MTPConfig:
    """Scheme, K and conventions: as nextn's key says, or the family's. Raises CheckpointError."""
    own = folder.own_settings()
    num_modules = _num_modules(folder, family)
    if folder.has_own_modules:
        if own is None or not own.num_depths:
            raise CheckpointError(
                f"{folder.path / CONFIG_FILE} does not say what the modules in mtp/ compute (nextn.mtp); restore it, "
                "or remove mtp/ to load the trunk alone"
            )
        if num_modules:
            raise CheckpointError(
                f"{folder.path} holds {num_modules} MTP modules in its family's layout and others in mtp/; remove one"
            )
        return own
    if family is None or not num_modules:
        return MTPConfig(num_depths=0)
    released = family.mtp_config(num_modules)
    fits = own is not None and own.num_depths and (1 if own.share_weights else own.num_depths) == num_modules
    return own if own is not None and fits else released


def _num_modules(folder: ModelFolder, family: Family | None) -> int:
    """Modules in the family's layout; what is declared must be what is stored. Raises CheckpointError."""
    where, text, names = folder.path, text_config(folder.table), folder.files.names
    if family is None:
        if found := {key: text[key] for key in count_keys() if text.get(key)}:
            raise CheckpointError(
                f"{where / CONFIG_FILE}: model_type {folder.table['model_type']!r} declares MTP modules ({found}) in a "
                f"layout that nextn does not know; known: {_known()}"
            )
        return 0
    num_layers = _num_layers(text, where)
    declared, stored = family.num_declared(folder.table), family.num_stored(names, num_layers)
    if declared is not None and declared > stored:
        wanted = family.layout.stored_name(stored, "eh_proj.weight", num_layers)
        raise CheckpointError(
            f"{where}: {CONFIG_FILE} declares {declared} MTP modules ({family.count_key}), and the files hold "
            f"{stored}: {wanted} and all that belongs to it is missing. `nextn doctor {where}` looks closer; with "
            f"{family.count_key} = 0 and no MTP tensors the trunk loads alone"
        )
    if declared is not None and declared < stored:
        raise CheckpointError(
            f"{where}: the files hold {stored} MTP modules, and {CONFIG_FILE} declares {declared}; set "
            f"{family.count_key} = {stored} to use them. `nextn doctor {where}` looks closer"
        )
    if stored and family.refusal:
        raise CheckpointError(f"{where}: nextn cannot run the MTP modules of {family.name}: {family.refusal}")
    return stored


def _refuse_unknown_modules(folder: ModelFolder) -> None:
    """Raise CheckpointError for tensors that look like MTP modules, which transformers leaves out without a word."""
    if strange := [name for name in folder.files.names if _LOOKS_LIKE_MTP.search(name)]:
        raise CheckpointError(
            f"{folder.path}: tensors that look like MTP modules, {some(strange)}, lie in a layout that nextn does not "
            f"know for model_type {folder.table['model_type']!r}; known: {_known()}. Without them the trunk loads alone"
        )


def _num_layers(text: Mapping[str, Any], folder: Path) -> int:
    """Layers of the trunk, by whichever key the family has."""
    for key in ("num_hidden_layers", "num_layers", "n_layer"):
        if isinstance(text.get(key), int):
            return int(text[key])
    if isinstance(kinds := text.get("layer_types") or text.get("layers_block_type"), list):
        return len(kinds)
    raise CheckpointError(f"{folder / CONFIG_FILE} does not say how many layers the trunk has (num_hidden_layers)")


def transformers_model(folder: ModelFolder, family: Family | None, dtype: torch.dtype) -> nn.Module:
    """The trunk as transformers' model, complete. Raises CheckpointError."""
    from transformers import AutoConfig, AutoModelForCausalLM

    where, table = folder.trunk_path, folder.table
    kind = family.trunk_model_type if family and family.trunk_model_type else None
    try:
        if kind is None:
            config = AutoConfig.from_pretrained(where, local_files_only=True, trust_remote_code=False)
        else:
            own = {key: value for key, value in table.items() if key not in ("model_type", "architectures", "auto_map")}
            config = AutoConfig.for_model(kind, **own)
        _check_size(config, folder.files, where)
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                where,
                config=config,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, by name
                **({"experts_implementation": "eager"} if dtype == torch.float64 else {}),  # no grouped product
            )
        model, info = loaded
    except (ValueError, KeyError, OSError, RuntimeError, TypeError) as error:
        raise CheckpointError(
            f"{where}: transformers cannot load the trunk of model_type {table['model_type']!r}: {error}. "
            f"Families whose MTP modules nextn knows: {_known()}"
        ) from None
    num_layers = _num_layers(text_config(table), where)
    unexpected = [name for name in info["unexpected_keys"] if not (family and family.layout.locate(name, num_layers))]
    for what, names in (("missing", info["missing_keys"]), ("unexpected", unexpected)):
        if names:
            raise CheckpointError(f"{where}: tensors of the trunk are {what}: {some(names)}")
    if mismatched := info["mismatched_keys"]:
        raise CheckpointError(f"{where}: tensors do not have the shapes that {CONFIG_FILE} means: {some(mismatched)}")
    return model.eval()


def _check_size(config: Any, files: TensorFiles, folder: Path) -> None:
    """Refuse, before any memory is taken, a trunk far larger than what is stored: the files are of another model."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        wanted = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    stored = sum(math.prod(files.shape(name)) for name in files.names)
    if wanted > 2 * stored:
        raise CheckpointError(
            f"{folder}: {CONFIG_FILE} (model_type {config.model_type!r}) means a trunk of {wanted:,} weights, and the "
            f"files hold {stored:,}: they belong to another model, or most of them are missing"
        )


def _known() -> str:
    return ", ".join(kind for family in FAMILIES for kind in family.model_types)
