"""Prepare weights for decoding: forms that a product with a few rows reads fastest.

Decoding multiplies the same matrices with a handful of rows, again and again, so its speed is that of reading weights.
On a CPU the stock product reads them in the order in which they were trained. Measured on 2 cores, 1536 x 576, one row
and eight: bfloat16 stock 25 and 22 GB/s, packed 41 and 33; float32 stock 17 and 12.

- `packed`: the same numbers. Large bfloat16 matrices are reordered as oneDNN wants them; other products of a few rows
  are written as sums, of which the compiler makes loops. Elsewhere (GPUs, other dtypes) as they are.
- `int8`: weights rounded to 8 bits, one scale per output: half the bytes of bfloat16, and a different model. Drafting
  and verification with it are lossless with respect to *that* model.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextn.errors import ConfigError
from nextn.model.kernels import few_rows_product, is_few_rows
from nextn.model.moe import Experts

WeightForm = Literal["packed", "int8", "as_stored"]
WEIGHT_FORMS: tuple[WeightForm, ...] = ("packed", "int8", "as_stored")

MIN_WEIGHTS_PACKED = 2**18
"""A smaller bfloat16 matrix is read from a cache: there a loop that the compiler fuses costs less than a call."""

READ_AS_STORED = "kv_b_proj"
"""Cached attention reads this matrix itself (absorbed form): with 8 bits it would be another one without a cache."""

INT8_MULTIPLE = 16
"""torch's product with 8-bit weights reads so many inputs at a time: beyond the end where they are not a multiple."""

M = TypeVar("M", bound=nn.Module)

_PACKED: dict[int, tuple[Tensor, Tensor | None]] = {}
"""Packed weights and biases by number: a compiled step cannot be handed oneDNN's own kind of tensor, but a number."""

_ops = torch.library.Library("nextn", "DEF")
_ops.define("packed_linear(Tensor hidden, int number, int out_features) -> Tensor")


@torch.library.impl(_ops, "packed_linear", "CPU")
def _packed_linear(hidden: Tensor, number: int, out_features: int) -> Tensor:
    weight, bias = _PACKED[number]
    return torch.ops.mkldnn._linear_pointwise(hidden, weight, bias, "none", [], "")


@torch.library.register_fake("nextn::packed_linear", lib=_ops)
def _shape_of_packed_linear(hidden: Tensor, number: int, out_features: int) -> Tensor:
    return hidden.new_empty(*hidden.shape[:-1], out_features)


def prepared(model: M, form: WeightForm) -> M:
    """The model with its matrices in another form: new modules around the same stored tensors, `model` untouched.

    Args:
        model: in the dtype and on the device that it decodes in.
        form: see the module's docstring; "as_stored" returns the model itself.

    Raises:
        ConfigError: an unknown form.
    """
    if form not in WEIGHT_FORMS:
        raise ConfigError(f"weights must be one of {', '.join(WEIGHT_FORMS)}, got {form!r}")
    if form == "as_stored":
        return model
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    result = copy.deepcopy(model, shared)
    done: dict[int, nn.Module] = {}
    for module in list(result.modules()):
        for name, child in list(module.named_children()):
            make = _maker(child, form)
            if make is not None and not (form == "int8" and name == READ_AS_STORED):
                setattr(module, name, done.setdefault(id(child), make(child)))
    return result


def _maker(module: nn.Module, form: WeightForm) -> Callable[[Any], nn.Module] | None:
    """The function that converts a module to that form; None for a module that stays as it is."""
    if isinstance(module, Experts):
        return Int8Experts if form == "int8" else None
    if type(module) is not nn.Linear:
        return None
    if form == "int8":
        return Int8Linear
    if module.weight.device.type != "cpu":
        return None
    is_large = module.weight.numel() >= MIN_WEIGHTS_PACKED
    if module.weight.dtype == torch.bfloat16 and is_large and packs_bfloat16():
        return PackedLinear
    return SummedLinear if module.weight.dtype in (torch.float32, torch.bfloat16) else None


def packs_bfloat16() -> bool:
    """oneDNN reorders bfloat16 matrices on this processor; on one without AVX-512 or AVX-NE-CONVERT it cannot."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class _LikeLinear(nn.Linear):
    """A linear layer around the weights of another one."""

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias


class SummedLinear(_LikeLinear):
    """Products of a few rows written as sums, when compiled."""

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if not is_few_rows(hidden[..., 0]):
            return super().forward(hidden)
        out = few_rows_product(hidden, self.weight)
        return out if self.bias is None else out + self.bias


class _Kept:
    """Keeps a packed weight as long as some copy of its layer lives; copies share it."""

    def __init__(self, linear: nn.Linear):
        bias = None if linear.bias is None else linear.bias.detach()
        _PACKED[id(self)] = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1), bias
        weakref.finalize(self, _PACKED.pop, id(self))

    def __deepcopy__(self, _: Any) -> _Kept:
        return self


class PackedLinear(_LikeLinear):
    """bfloat16 weights reordered by oneDNN."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear)
        self._kept = _Kept(linear)
        self._number = id(self._kept)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return torch.ops.nextn.packed_linear(hidden, self._number, self.out_features)


def rounded_to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric rounding, one scale per row of the last dimension.

    Args:
        weight: [..., out, in].

    Returns:
        int8 [..., out, in] and scales float32 [..., out]; weight = int8 * scale, up to half a scale.
    """
    scale = weight.detach().float().abs().amax(-1).clamp_(min=1e-12) / 127
    return (weight.detach().float() / scale.unsqueeze(-1)).round_().to(torch.int8), scale


class Int8Linear(_LikeLinear):
    """Weights of 8 bits; sums in float32."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear)
        self._rounded, scale = rounded_to_int8(linear.weight)
        self._scale = scale.to(linear.weight.dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if hidden.device.type == "cpu" and self.in_features % INT8_MULTIPLE == 0:
            out = torch._weight_int8pack_mm(hidden.flatten(0, -2).contiguous(), self._rounded, self._scale)
            out = out.unflatten(0, hidden.shape[:-1])
        else:
            out = F.linear(hidden, self._rounded.to(hidden.dtype)) * self._scale
        return out if self.bias is None else out + self.bias


class Int8Experts(nn.Module):
    """Routed experts with weights of 8 bits: each token reads its own experts', as `Experts` does when compiled."""

    def __init__(self, experts: Experts):
        super().__init__()
        self._gate_up, self._gate_up_scale = rounded_to_int8(experts.gate_up_proj)
        self._down, self._down_scale = rounded_to_int8(experts.down_proj)

    def forward(self, hidden: Tensor, gates: Tensor, experts: Tensor) -> Tensor:
        """Sum over the chosen experts of gate * expert(token): [N, C] -> [N, C]."""
        gate_up = (self._gate_up[experts].float() * hidden[:, None, None].float()).sum(-1)
        gate, up = (gate_up * self._gate_up_scale[experts]).chunk(2, dim=-1)  # [N, top_k, I]
        inner = F.silu(gate) * up * gates.unsqueeze(-1)
        out = (self._down[experts].float() * inner.unsqueeze(2)).sum(-1) * self._down_scale[experts]
        return out.sum(1).to(hidden.dtype)
