"""Rotary position embedding (arXiv 2104.09864) in DeepSeek's interleaved layout, with YaRN (arXiv 2309.00071)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from nextn.config import ModelConfig, RopeConfig


def rope_frequencies(rope: RopeConfig, dim: int) -> tuple[Tensor, float]:
    """Angular frequency of every rotary pair, and the factor on cos and sin.

    Args:
        rope: the settings.
        dim: rotary width per head (even).

    Returns:
        Frequencies in radians per position, float32 [dim / 2], and the attention factor (1.0 without YaRN).
    """
    wavelength_scale = rope.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    frequencies = 1.0 / wavelength_scale
    if rope.rope_type == "default":
        return frequencies, 1.0
    assert rope.factor is not None, "RopeConfig requires it"
    assert rope.original_max_position_embeddings is not None, "RopeConfig requires it"
    original_length = rope.original_max_position_embeddings

    def dimension_of(num_rotations: float) -> float:
        """The (fractional) dimension that turns `num_rotations` times over the original context."""
        turns = original_length / (num_rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(rope.rope_theta))

    low, high = dimension_of(rope.beta_fast or 32.0), dimension_of(rope.beta_slow or 1.0)
    if rope.truncate is None or rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    interpolated_share = ramp.clamp(0, 1)
    frequencies = frequencies / rope.factor * interpolated_share + frequencies * (1 - interpolated_share)

    if rope.mscale and rope.mscale_all_dim:
        factor = yarn_mscale(rope.factor, rope.mscale) / yarn_mscale(rope.factor, rope.mscale_all_dim)
    else:
        factor = yarn_mscale(rope.factor, 1.0)
    return frequencies, factor


def yarn_mscale(factor: float, coefficient: float) -> float:
    """YaRN's attention temperature (arXiv 2309.00071 section 3.4): 0.1 * coefficient * ln(factor) + 1, at least 1."""
    return 1.0 if factor <= 1 else 0.1 * coefficient * math.log(factor) + 1.0


def softmax_scale(config: ModelConfig) -> float:
    """1 / sqrt(qk_head_dim), times YaRN's squared temperature where `mscale_all_dim` is set."""
    scale = config.qk_head_dim**-0.5
    rope = config.rope_parameters
    if rope.rope_type == "yarn" and rope.mscale_all_dim:
        assert rope.factor is not None
        scale *= yarn_mscale(rope.factor, rope.mscale_all_dim) ** 2
    return scale


class RotaryTable(nn.Module):
    """cos and sin of every position up to the longest context, float32 [max_position_embeddings, rope_dim / 2]."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        frequencies, factor = rope_frequencies(config.rope_parameters, config.qk_rope_head_dim)
        angles = torch.arange(config.max_position_embeddings, dtype=torch.float32)[:, None] * frequencies
        self.register_buffer("cos", angles.cos() * factor, persistent=False)
        self.register_buffer("sin", angles.sin() * factor, persistent=False)

    def forward(self, num_positions: int, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """cos and sin, [1, M, R/2] for positions 0..M-1, or [B, M, R/2] for `positions` [B, M].

        Raises ValueError for more positions than the longest context.
        """
        if num_positions > len(self.cos):
            raise ValueError(f"{num_positions} positions exceed max_position_embeddings = {len(self.cos)}")
        if positions is None:
            return self.cos[None, :num_positions], self.sin[None, :num_positions]
        return self.cos[positions], self.sin[positions]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Turn the pairs of the last dimension by their position's angle.

    Args:
        x: [B, M, H, R]; pairs are (x0, x1), (x2, x3), ... if interleaved, else (x0, x[R/2]), (x1, x[R/2 + 1]), ...
        cos, sin: [B or 1, M, R/2].

    Returns:
        [B, M, H, R] in the dtype of x, all first members of the pairs before all second ones. Query and key come out in
        the same order, so their products do not depend on it.

    Example: R = 2, angle a: (1, 0) becomes (cos a, sin a).
    """
    if torch.compiler.is_compiling():  # the compiler fuses the formula, and breaks at writing into parts
        first, second = _pairs(x, interleaved)
        cos, sin = cos.unsqueeze(2).to(x.dtype), sin.unsqueeze(2).to(x.dtype)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return _Rotation.apply(x, cos.unsqueeze(2).to(x.dtype), sin.unsqueeze(2).to(x.dtype), interleaved)


class _Rotation(torch.autograd.Function):
    """`rotate` in four passes each way, where composed operations take about twenty."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        """first * cos - second * sin, then second * cos + first * sin."""
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        first, second = _pairs(x, interleaved)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        left, right = out.chunk(2, dim=-1)
        torch.mul(first, cos, out=left).addcmul_(second, sin, value=-1)
        torch.mul(second, cos, out=right).addcmul_(first, sin)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """A rotation's gradient turns back."""
        cos, sin = ctx.saved_tensors
        left, right = grad.chunk(2, dim=-1)
        grad_x = torch.empty_like(grad, memory_format=torch.contiguous_format)
        first, second = _pairs(grad_x, ctx.interleaved)
        torch.mul(left, cos, out=first).addcmul_(right, sin)
        torch.mul(right, cos, out=second).addcmul_(left, sin, value=-1)
        return grad_x, None, None, None


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """First and second members of all pairs, views [B, M, H, R/2]."""
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    return first, second
