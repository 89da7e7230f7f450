"""Names and forms of the stored weights: DeepSeek's released layout <-> our state dict.

    model.layers.{0..L-1}.*     the trunk's layers, experts one by one (`mlp.experts.3.gate_proj.weight`)
    model.layers.{L..}.*        MTP modules: enorm, hnorm, eh_proj, shared_head.norm, and the block's own names
    mtp.*                       modules of schemes other than the sequential one, which nobody released

A module's `embed_tokens.weight` and `shared_head.head.weight`, which the released files have, are copies of the
trunk's; they are checked and dropped. FP8 weights come with one factor per block, `weight_scale_inv`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from nextn.config import ModelConfig, MTPConfig
from nextn.errors import CheckpointError
from nextn.files import TensorFiles

RELEASED_SCHEME = "sequential"
"""The scheme of DeepSeek's released weights, whose layout it is stored in."""

COPIES = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
"""What a released module may repeat, and of which tensor of the trunk."""

FP8_BLOCK = (128, 128)
"""Rows and columns that share a factor, where `quantization_config.weight_block_size` does not say otherwise."""

LARGEST_PLAUSIBLE = 1e4
"""No weight of a trained model comes near this; memory that nobody initialised often lies far above."""

_SCALE = "_scale_inv"
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


def from_released_names(released: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Released names -> state dict, the inverse of `to_released_names`, for a complete set of tensors."""
    state: dict[str, Tensor] = {}
    experts: dict[str, dict[tuple[int, str], Tensor]] = {}
    for name, tensor in released.items():
        module = mtp_module(name, config)
        if module is not None:
            inside = name.split(".", 3)[3]
            name = f"scheme.layers.{module}.{inside if inside.startswith(_MTP_OWN) else f'block.{inside}'}"
        elif name.startswith("mtp."):
            name = f"scheme.{name.removeprefix('mtp.')}"
        else:
            name = f"trunk.{name}"
        if expert := re.fullmatch(r"(.+\.mlp\.experts)\.(\d+)\.(\w+)\.weight", name):
            experts.setdefault(expert[1], {})[int(expert[2]), expert[3]] = tensor
        else:
            state[name] = tensor
    for prefix, parts in experts.items():
        indices = range(config.n_routed_experts)
        gate_up = [torch.cat((parts[i, "gate_proj"], parts[i, "up_proj"])) for i in indices]
        state[f"{prefix}.gate_up_proj"] = torch.stack(gate_up)
        state[f"{prefix}.down_proj"] = torch.stack([parts[i, "down_proj"] for i in indices])
    return state


def mtp_module(name: str, config: ModelConfig) -> int | None:
    """The MTP module (0-based) that a released name belongs to, None for the trunk's.

    >>> mtp_module("model.layers.8.enorm.weight", ModelConfig(num_hidden_layers=8))
    0
    """
    match = re.match(r"model\.layers\.(\d+)\.", name)
    layer = int(match[1]) - config.num_hidden_layers if match else -1
    return layer if layer >= 0 else None


def copy_of(name: str, config: ModelConfig) -> str | None:
    """The tensor that a released name repeats, None if it is one of its own.

    >>> copy_of("model.layers.8.shared_head.head.weight", ModelConfig(num_hidden_layers=8))
    'lm_head.weight'
    """
    original = COPIES.get(name.split(".", 3)[3]) if mtp_module(name, config) is not None else None
    if config.tie_word_embeddings and "lm_head.weight" in (name, original):
        return "model.embed_tokens.weight"
    return original


def read_released(
    files: TensorFiles, config: ModelConfig, where: str, block: tuple[int, int] = FP8_BLOCK
) -> dict[str, Tensor]:
    """Every tensor under its released name, FP8 weights dequantised to float32, copies of trunk tensors dropped.

    Raises:
        CheckpointError: an FP8 weight without its factors or the reverse; a copy that differs from the trunk's tensor;
            an MTP tensor that was never initialised.
    """
    released = dict(_dequantised(files, where, block))
    for name in list(released):
        if (original := copy_of(name, config)) is not None:
            if original not in released or not torch.equal(released.pop(name), released[original]):
                raise CheckpointError(
                    f"{where}: {name} differs from {original}; nextn's modules share the trunk's embedding and head, "
                    "as DeepSeek's do, so what this copy learnt would be lost"
                )
        elif mtp_module(name, config) is not None and (reason := implausible(name, released[name])) is not None:
            raise CheckpointError(
                f"{where}: {name} {reason}: this MTP tensor was never initialised or is damaged. "
                f"`nextn doctor {where}` looks at all of them"
            )
    return released


def implausible(name: str, tensor: Tensor) -> str | None:
    """Why a tensor cannot be a trained weight: not finite, far too large, or a norm or matrix of zeros; else None.

    A router of zeros is right where its experts are always on.

    >>> implausible("eh_proj.weight", torch.full((2, 2), 1e18))
    'reaches 1e+18'
    """
    largest = tensor.abs().max().item() if tensor.numel() else 0.0
    if not largest < float("inf"):
        return "holds values that are not finite"
    if largest > LARGEST_PLAUSIBLE:
        return f"reaches {largest:.0e}"
    if largest == 0.0 and tensor.numel() and name.endswith("weight") and not name.endswith("gate.weight"):
        return "is all zeros"
    return None


def dequantise(weight: Tensor, scale: Tensor, block: tuple[int, int] = FP8_BLOCK) -> Tensor:
    """An FP8 weight [O, I] times one factor per block, [ceil(O / rows), ceil(I / columns)] -> float32 [O, I].

    DeepSeek-V3's files call the factor `weight_scale_inv` though it multiplies.

    >>> dequantise(torch.ones(3, 2), torch.tensor([[2.0], [3.0]]), (2, 2)).tolist()
    [[2.0, 2.0], [2.0, 2.0], [3.0, 3.0]]
    """
    rows, columns = weight.shape
    factors = scale.float().repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return weight.float() * factors


def _dequantised(files: TensorFiles, where: str, block: tuple[int, int]) -> Iterator[tuple[str, Tensor]]:
    names = set(files.names)
    for name in files.names:
        is_fp8 = files.dtype(name).startswith("F8_")
        if name.endswith(_SCALE):
            if name.removesuffix(_SCALE) not in names:
                raise CheckpointError(f"{where}: {name} is stored without the weight that it scales")
        elif not is_fp8:
            yield name, files.read(name)
        elif name + _SCALE not in names:
            raise CheckpointError(f"{where}: {name} is FP8, and its factors {name + _SCALE} are missing")
        else:
            scale = files.read(name + _SCALE)
            if len(files.shape(name)) != len(block):
                raise CheckpointError(f"{where}: {name} is FP8 and has shape {files.shape(name)}; FP8 is for matrices")
            wanted = tuple(-(-size // length) for size, length in zip(files.shape(name), block, strict=True))
            if tuple(scale.shape) != wanted:
                raise CheckpointError(
                    f"{where}: {name + _SCALE} has shape {tuple(scale.shape)}, and blocks of {block[0]} x {block[1]} "
                    f"need {wanted} (quantization_config.weight_block_size)"
                )
            yield name, dequantise(files.read(name), scale, block)
