"""`nextn.load`: any checkpoint nextn can run, with nextn's own trunk or transformers' one.

A DeepSeek-V3 checkpoint, nextn's own included, is read by `nextn.mtp.storage`. For the other families of
`nextn.interop.families` transformers reads the trunk, and the MTP tensors, which it drops, are read here: renamed by
the family's layout into the sequential scheme with the family's conventions. A language model without MTP has K = 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from nextn.config import MTPConfig
from nextn.errors import CheckpointError, ConfigError, DeviceError
from nextn.files import TensorFiles, read_json
from nextn.interop.adapter import TransformersTrunk
from nextn.interop.families import COPIES, FAMILIES, Family, count_keys, family_of, text_config
from nextn.model.device import resolve_device
from nextn.mtp.config_file import CONFIG_FILE
from nextn.mtp.layout import implausible
from nextn.mtp.model import MTPModel
from nextn.mtp.storage import DTYPES, attach_tokenizer, find_checkpoint, load_model

NATIVE = "deepseek_v3"


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
    folder = find_checkpoint(path)
    table = read_json(folder / CONFIG_FILE)
    kind = table.get("model_type") if isinstance(table, dict) else None
    return load_model(folder, device, dtype) if kind == NATIVE else load_with_transformers(folder, device, dtype)


def load_with_transformers(folder: Path, device: str = "cpu", dtype: str = "float32") -> MTPModel:
    """The same with transformers' trunk whatever the family, DeepSeek-V3 too; `folder` holds the checkpoint itself."""
    if dtype not in DTYPES:
        raise DeviceError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    target = resolve_device(device)
    files, table = TensorFiles.open(folder), read_json(folder / CONFIG_FILE)
    if not isinstance(table, dict) or "model_type" not in table:
        raise CheckpointError(f"{folder / CONFIG_FILE} names no model_type, so nobody knows what these tensors are")
    if table.get("quantization_config") is not None:
        _refuse_quantised(folder, table["quantization_config"])
    family = family_of(table)
    try:
        num_modules = _num_modules(folder, table, files, family)
        hf_model = _transformers_model(folder, table, files, family, DTYPES[dtype])
        trunk = TransformersTrunk(hf_model, family.block_settings if family and num_modules else None)
        mtp_config = family.mtp_config(num_modules) if family else MTPConfig(num_depths=0)
        model = MTPModel(None, mtp_config, trunk)
        if family and num_modules:
            _load_modules(model, trunk, family, files, folder, DTYPES[dtype])
    except ConfigError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    attach_tokenizer(model, folder)
    return model.to(target).eval()


def _refuse_quantised(folder: Path, value: Any) -> NoReturn:
    """Raise CheckpointError: transformers' trunk is read from float weights, declared by the key's absence."""
    if not isinstance(value, Mapping):
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: quantization_config is {value!r}, which says no method; take it out if the "
            "weights are float"
        )
    raise CheckpointError(
        f"{folder}: weights quantised by {value.get('quant_method', 'an unnamed method')!r} are read for {NATIVE} "
        "only; save them as float weights first"
    )


def _num_modules(folder: Path, table: Mapping[str, Any], files: TensorFiles, family: Family | None) -> int:
    """K, after checking that what is declared is what is stored. Raises CheckpointError."""
    text = text_config(table)
    if family is None:
        if found := {key: text[key] for key in count_keys() if text.get(key)}:
            raise CheckpointError(
                f"{folder / CONFIG_FILE}: model_type {table['model_type']!r} declares MTP modules ({found}) in a "
                f"layout that nextn does not know; known: {_known()}"
            )
        return 0
    num_layers = _num_layers(text, folder)
    declared, stored = family.num_declared(table), family.num_stored(files.names, num_layers)
    if declared is not None and declared > stored:
        wanted = family.stored_name(stored, "eh_proj.weight", num_layers)
        raise CheckpointError(
            f"{folder}: {CONFIG_FILE} declares {declared} MTP modules ({family.count_key}), and the files hold "
            f"{stored}: {wanted} and all that belongs to it is missing. `nextn doctor {folder}` looks closer; with "
            f"{family.count_key} = 0 and no MTP tensors the trunk loads alone"
        )
    if declared is not None and declared < stored:
        raise CheckpointError(
            f"{folder}: the files hold {stored} MTP modules, and {CONFIG_FILE} declares {declared}; set "
            f"{family.count_key} = {stored} to use them. `nextn doctor {folder}` looks closer"
        )
    if stored and family.refusal:
        raise CheckpointError(f"{folder}: nextn cannot run the MTP modules of {family.name}: {family.refusal}")
    return stored


def _num_layers(text: Mapping[str, Any], folder: Path) -> int:
    """Layers of the trunk, by whichever key the family has."""
    for key in ("num_hidden_layers", "num_layers"):
        if isinstance(text.get(key), int):
            return int(text[key])
    if isinstance(kinds := text.get("layer_types") or text.get("layers_block_type"), list):
        return len(kinds)
    raise CheckpointError(f"{folder / CONFIG_FILE} does not say how many layers the trunk has (num_hidden_layers)")


def _transformers_model(
    folder: Path, table: Mapping[str, Any], files: TensorFiles, family: Family | None, dtype: torch.dtype
) -> nn.Module:
    """The trunk, complete. Raises CheckpointError."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = family.trunk_model_type if family and family.trunk_model_type else None
    try:
        if kind is None:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        else:
            own = {key: value for key, value in table.items() if key not in ("model_type", "architectures", "auto_map")}
            config = AutoConfig.for_model(kind, **own)
        _check_size(config, files, folder)
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
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
            f"{folder}: transformers cannot load the trunk of model_type {table['model_type']!r}: {error}. "
            f"Families whose MTP modules nextn knows: {_known()}"
        ) from None
    num_layers = _num_layers(text_config(table), folder)
    unexpected = [name for name in info["unexpected_keys"] if not (family and family.locate(name, num_layers))]
    for what, names in (("missing", info["missing_keys"]), ("unexpected", unexpected)):
        if names:
            raise CheckpointError(f"{folder}: tensors of the trunk are {what}: {_some(names)}")
    if mismatched := info["mismatched_keys"]:
        raise CheckpointError(f"{folder}: tensors do not have the shapes that {CONFIG_FILE} means: {_some(mismatched)}")
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


def _load_modules(
    model: MTPModel, trunk: TransformersTrunk, family: Family, files: TensorFiles, folder: Path, dtype: torch.dtype
) -> None:
    """Fill the scheme's modules from the files. Raises CheckpointError naming tensors by their stored names."""
    assert model.scheme is not None, "there are modules to fill"
    num_layers = trunk.num_layers
    in_float32 = tuple(getattr(trunk.model, "_keep_in_fp32_modules_strict", None) or ())
    stored: dict[int, dict[str, str]] = {}
    for name in files.names:
        if (place := family.locate(name, num_layers)) is not None:
            stored.setdefault(place[0], {})[place[1]] = name
    for number, module in enumerate(model.scheme.layers):  # type: ignore[arg-type]
        names = stored.get(number, {})
        tensors = {inside: files.read(name) for inside, name in names.items()}
        for inside in COPIES.keys() & tensors.keys():
            _check_copy(inside, tensors.pop(inside), trunk, names[inside], folder)
        for inside, tensor in tensors.items():
            if (reason := implausible(inside, tensor)) is not None:
                raise CheckpointError(
                    f"{folder}: {names[inside]} {reason}: this MTP tensor was never initialised or is damaged. "
                    f"`nextn doctor {folder}` looks at all of them"
                )
        state = stacked_experts(tensors)
        block = "block.layers.0." if len(module.block.layers) == 1 else "block.layers."
        wanted = {name.replace(block, "block.", 1): name for name in module.state_dict()}
        missing, unexpected = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
        if missing:
            named = [family.stored_name(number, inside, num_layers) for inside in missing]
            raise CheckpointError(
                f"{folder}: tensors of MTP module {number} are missing: {_some(named)}. `nextn doctor {folder}` looks "
                "closer"
            )
        if unexpected:
            raise CheckpointError(f"{folder}: tensors of MTP module {number} are unexpected: {_some(unexpected)}")
        for name, parameter in module.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if any(part in name for part in in_float32) else dtype)
        for inside, name in wanted.items():
            target = module.state_dict()[name]
            if target.shape != state[inside].shape:
                raise CheckpointError(
                    f"{folder}: {family.stored_name(number, inside, num_layers)} has shape "
                    f"{tuple(state[inside].shape)}, {CONFIG_FILE} means {tuple(target.shape)}"
                )
        module.load_state_dict({name: state[inside] for inside, name in wanted.items()})


def stacked_experts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Experts stored one by one, `experts.3.gate_proj.weight`, as transformers holds them: `experts.gate_up_proj`.

    >>> parts = {f"mlp.experts.0.{kind}.weight": torch.ones(2, 3) for kind in ("gate_proj", "up_proj")}
    >>> {name: tuple(tensor.shape) for name, tensor in stacked_experts(parts).items()}
    {'mlp.experts.gate_up_proj': (1, 4, 3)}
    """
    state: dict[str, Tensor] = {}
    experts: dict[tuple[str, str], dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"(.+\.experts)\.(\d+)\.(\w+)\.weight", name):
            experts.setdefault((match[1], match[3]), {})[int(match[2])] = tensor
        else:
            state[name] = tensor
    for (prefix, kind), parts in experts.items():
        if kind == "up_proj" and (prefix, "gate_proj") in experts:
            continue
        if kind == "gate_proj":
            ups = experts.get((prefix, "up_proj"), {})
            if ups.keys() == parts.keys():
                parts, kind = {i: torch.cat((gate, ups[i])) for i, gate in parts.items()}, "gate_up_proj"
        if sorted(parts) == list(range(len(parts))):
            state[f"{prefix}.{kind}"] = torch.stack([parts[i] for i in range(len(parts))])
    return state


def _check_copy(inside: str, copy: Tensor, trunk: TransformersTrunk, name: str, folder: Path) -> None:
    """Raise CheckpointError unless a module's embedding or head is the trunk's."""
    embedding = trunk.model.get_input_embeddings().weight  # type: ignore[operator]
    original = embedding if COPIES[inside] == "embedding" else trunk.output_head.weight
    if copy.shape != original.shape or not torch.equal(copy.to(original.dtype), original.detach()):
        raise CheckpointError(
            f"{folder}: {name} differs from the trunk's {COPIES[inside]}; nextn's modules share the trunk's, so what "
            "this copy learnt would be lost"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Neither reports below errors nor progress bars of transformers inside the block; afterwards they are as before.

    Its reports are about tensors that it leaves out, and those are answered here.
    """
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _known() -> str:
    return ", ".join(kind for family in FAMILIES for kind in family.model_types)


def _some(names: Any) -> str:
    """The first few of many names, and how many there are."""
    listed = sorted(str(name) for name in names)
    return f"{len(listed)} ({', '.join(listed[:4])}{', ...' if len(listed) > 4 else ''})"
