"""Names and forms of the stored weights: DeepSeek's released layout <-> our state dict.

    model.layers.{0..L-1}.*     the trunk's layers, experts one by one (`mlp.experts.3.gate_proj.weight`)
    model.layers.{L..}.*        MTP modules: enorm, hnorm, eh_proj, shared_head.norm, and the block's own names
    mtp.*                       modules of schemes other than the sequential one, which nobody released

A module's `embed_tokens.weight` and `shared_head.head.weight`, which the released files have, are copies of the
trunk's; they are checked and dropped. FP8 weights come with one factor per block, `weight_scale_inv`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nextn.config import ModelConfig, MTPConfig
from nextn.errors import CheckpointError
from nextn.files import TensorFiles

RELEASED_SCHEME = "sequential"
"""The scheme of DeepSeek's released weights, whose layout it is stored in."""

COPIES = {"embed_tokens.weight": "embedding", "shared_head.head.weight": "output head"}
"""What a released module may repeat, by its name inside the module, and what of the trunk it repeats."""

_ORIGINALS = {"embedding": "model.embed_tokens.weight", "output head": "lm_head.weight"}

FP8_BLOCK = (128, 128)
"""Rows and columns that share a factor, where `quantization_config.weight_block_size` does not say otherwise."""

LARGEST_PLAUSIBLE = 1e4
"""No weight of a trained model comes near this; memory that nobody initialised often lies far above."""

_SCALE = "_scale_inv"
_MTP_LAYER = re.compile(r"scheme\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)\.weight")
_STACKED = re.compile(r"(.+\.experts)\.(gate_up_proj|gate_proj|up_proj|down_proj)")


# ------------------------------------------------------------------------------------------------- experts and modules


def stacked_experts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stack experts that are stored one by one: `experts.3.gate_proj.weight` and the others -> `experts.gate_up_proj`.

    Experts without a gate are stacked as they are. A set of experts with a gap stays out: its tensor is missing then.

    >>> parts = {f"mlp.experts.0.{kind}.weight": torch.ones(2, 3) for kind in ("gate_proj", "up_proj")}
    >>> {name: tuple(tensor.shape) for name, tensor in stacked_experts(parts).items()}
    {'mlp.experts.gate_up_proj': (1, 4, 3)}
    """
    state: dict[str, Tensor] = {}
    experts: dict[tuple[str, str], dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        if match := _EXPERT.fullmatch(name):
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


def separate_experts(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name the experts of a stack one by one, views of it: the inverse of `stacked_experts`.

    >>> list(separate_experts({"mlp.experts.gate_up_proj": torch.ones(1, 4, 3)}))
    ['mlp.experts.0.gate_proj.weight', 'mlp.experts.0.up_proj.weight']
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        match = _STACKED.fullmatch(name)
        if match is None:
            tensors[name] = tensor
            continue
        for index, matrix in enumerate(tensor):
            if match[2] == "gate_up_proj":
                gate, up = matrix.chunk(2)
                tensors[f"{match[1]}.{index}.gate_proj.weight"] = gate
                tensors[f"{match[1]}.{index}.up_proj.weight"] = up
            else:
                tensors[f"{match[1]}.{index}.{match[2]}.weight"] = matrix
    return tensors


@dataclass(frozen=True)
class ModuleNames:
    """How files name the tensors of MTP modules.

    Attributes:
        prefixes: (prefix in the file, prefix inside a `FusionModule`), the first that fits counts. `{module}` is the
            module's number (0-based), `{layer}` the same plus the trunk's number of layers; neither: module 0.

    Inside are `enorm.`, `hnorm.`, `eh_proj.`, `shared_head.norm.`, `block.` and the names in `COPIES`.
    """

    prefixes: tuple[tuple[str, str], ...]

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self.prefixes)

    def locate(self, name: str, num_layers: int) -> tuple[int, str] | None:
        """Module (0-based) and name inside it of a stored tensor; None for one of the trunk's.

        >>> APPENDED.locate("model.layers.8.enorm.weight", num_layers=8)
        (0, 'enorm.weight')
        """
        for stored, inside in self.prefixes:
            match = _pattern(stored).match(name)
            if match is None:
                continue
            number = int(match[1]) if match.groups() else 0
            module = number - num_layers if "{layer}" in stored else number
            if module >= 0:
                return module, inside + name[match.end() :]
        return None

    def stored_name(self, module: int, inside: str, num_layers: int) -> str:
        """The inverse of `locate`. Raises KeyError for a name that the layout has no place for.

        >>> APPENDED.stored_name(0, "block.mlp.up_proj.weight", num_layers=8)
        'model.layers.8.mlp.up_proj.weight'
        """
        for stored, prefix in self.prefixes:
            if inside.startswith(prefix):
                return stored.format(module=module, layer=num_layers + module) + inside.removeprefix(prefix)
        raise KeyError(inside)


@functools.cache
def _pattern(stored: str) -> re.Pattern[str]:
    """A prefix of a layout as a regular expression; a number is its group 1."""
    return re.compile(re.sub(r"\\\{(module|layer)\\\}", r"(\\d+)", re.escape(stored)))


def appended(norm: str = "shared_head.norm.", head: str = "shared_head.head.") -> ModuleNames:
    """Modules as further layers, `model.layers.{L}.enorm.weight`: DeepSeek's layout, and of those who followed it."""
    layer = "model.layers.{layer}."
    return ModuleNames(
        (
            (layer + "enorm.", "enorm."),
            (layer + "hnorm.", "hnorm."),
            (layer + "eh_proj.", "eh_proj."),
            (layer + norm, "shared_head.norm."),
            (layer + head, "shared_head.head."),
            (layer + "embed_tokens.", "embed_tokens."),
            (layer, "block."),
        )
    )


APPENDED = appended()


# ---------------------------------------------------------------------------------------- DeepSeek's names of a model


def to_released_names(state: Mapping[str, Tensor], config: ModelConfig, mtp_config: MTPConfig) -> dict[str, Tensor]:
    """State dict -> released names: MTP modules become layers L, L+1, ..., stacked experts become single ones."""
    released = {}
    for name, tensor in state.items():
        if mtp_config.scheme == RELEASED_SCHEME and (match := _MTP_LAYER.fullmatch(name)):
            name = APPENDED.stored_name(int(match[1]), match[2], config.num_hidden_layers)
        elif name.startswith("scheme."):
            name = f"mtp.{name.removeprefix('scheme.')}"
        released[name.removeprefix("trunk.")] = tensor
    return separate_experts(released)


def from_released_names(released: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Released names -> state dict, the inverse of `to_released_names`, for a complete set of tensors."""
    state: dict[str, Tensor] = {}
    for name, tensor in released.items():
        if located := APPENDED.locate(name, config.num_hidden_layers):
            name = f"scheme.layers.{located[0]}.{located[1]}"
        elif name.startswith("mtp."):
            name = f"scheme.{name.removeprefix('mtp.')}"
        else:
            name = f"trunk.{name}"
        state[name] = tensor
    return stacked_experts(state)


def mtp_module(name: str, config: ModelConfig) -> int | None:
    """The MTP module (0-based) that a released name belongs to, None for the trunk's.

    >>> mtp_module("model.layers.8.enorm.weight", ModelConfig(num_hidden_layers=8))
    0
    """
    located = APPENDED.locate(name, config.num_hidden_layers)
    return None if located is None else located[0]


def copy_of(name: str, config: ModelConfig) -> str | None:
    """The tensor that a released name repeats, None if it is one of its own.

    >>> copy_of("model.layers.8.shared_head.head.weight", ModelConfig(num_hidden_layers=8))
    'lm_head.weight'
    """
    located = APPENDED.locate(name, config.num_hidden_layers)
    original = _ORIGINALS.get(COPIES.get(located[1], "")) if located else None
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
        elif mtp_module(name, config) is not None:
            check_plausible(name, released[name], where)
    return released


def unlike(
    wanted: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]]
) -> tuple[list[str], list[str], list[str]]:
    """Compare the shapes of stored tensors with those wanted, by name: names missing, unexpected and misshapen.

    >>> unlike({"a": (2,), "b": (3,)}, {"b": (4,), "c": (1,)})
    (['a'], ['c'], ['b'])
    """
    missing, unexpected = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
    return missing, unexpected, sorted(name for name in wanted.keys() & stored.keys() if wanted[name] != stored[name])


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def some(names: Iterable[object]) -> str:
    """How many names there are, and the first few of them.

    >>> some(["b", "a"])
    '2 (a, b)'
    """
    listed = sorted(str(name) for name in names)
    return f"{len(listed)} ({', '.join(listed[:4])}{', ...' if len(listed) > 4 else ''})"


def check_plausible(name: str, tensor: Tensor, where: str, zero_norms: bool = False) -> None:
    """Raise CheckpointError for an MTP tensor that no training gave; `zero_norms` as of `implausible`."""
    if (reason := implausible(name, tensor, zero_norms)) is not None:
        raise CheckpointError(
            f"{where}: {name} {reason}: this MTP tensor was never initialised or is damaged. "
            f"`nextn doctor {where}` looks at all of them"
        )


def implausible(name: str, tensor: Tensor, zero_norms: bool = False) -> str | None:
    """Why a tensor cannot be a trained weight: not finite, far too large, or a norm or matrix of zeros; else None.

    A router of zeros is right where its experts are always on, a norm of zeros where norms multiply by 1 + weight
    (`zero_norms`: Qwen3-Next's, Qwen3.5's, Gemma's).

    >>> implausible("eh_proj.weight", torch.full((2, 2), 1e18))
    'reaches 1e+18'
    """
    largest = tensor.abs().max().item() if tensor.numel() else 0.0
    if not largest < float("inf"):
        return "holds values that are not finite"
    if largest > LARGEST_PLAUSIBLE:
        return f"reaches {largest:.0e}"
    may_be_zero = name.endswith("gate.weight") or not name.endswith("weight") or (zero_norms and tensor.ndim == 1)
    if largest == 0.0 and tensor.numel() and not may_be_zero:
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
