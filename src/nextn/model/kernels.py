"""Training kernels for CPUs, where the stock backward passes are slow, each equal to its plain reference.

Measured on 2 cores with bfloat16 products, forward and backward: attention over 16 x 256 tokens, 4 heads of 48, takes
22 ms stock and 9 ms here (before it went in causal blocks, which save a sixth); a norm over 4096 x 192 takes 3.3 ms
stock (it is composed of five operations, each with its own backward) and 0.9 ms here. Attention uses the stock kernel
on GPUs, in other dtypes, in decoding and on long rows; the norm on GPUs and without gradients.

Attention keeps its scores in bfloat16, where the stock kernel has float32: its relative error is 0.004 on random inputs
against 0.002, and grows with scores far from zero (0.03 where all scores of a row share an offset of 20). Gradients of
keys and values are added up block by block in bfloat16: relative error 0.006 and 0.005 at 256 tokens, 0.008 and 0.007
at 1024.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_MATERIALISED_LENGTH = 1024
"""Longest row whose [T, T] attention weights are held in memory; beyond, the stock kernel's O(T) memory wins."""

QUERY_BLOCK = 64
"""Queries that go together in materialised attention: fewer save work above the diagonal, more make larger products."""


MAX_ROWS_SUMMED = 16
"""Up to this many rows a compiled product is written as a sum; each row reads the matrix again, from a cache."""


def operand(tensor: Tensor) -> Tensor:
    """In the dtype in which autocast multiplies, if it is on: cast once what several products read."""
    device = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor


def joint_linear(hidden: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
    """The outputs of several linear layers that read one input, [..., in] -> [..., out] each.

    In training one product for all of them: larger products are faster, and the input has one gradient instead of
    several to add up. Without gradients, layer by layer, since joining the weights would cost more than it saves.
    """
    if not torch.is_grad_enabled():
        return tuple(layer(hidden) for layer in layers)
    bias = None
    if any(layer.bias is not None for layer in layers):
        bias = torch.cat(
            [layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers]
        )
    out = F.linear(hidden, torch.cat([layer.weight for layer in layers]), bias)
    return out.split([layer.out_features for layer in layers], dim=-1)


def is_few_rows(rows: Tensor) -> bool:
    """A compiled forward on a CPU without gradients over at most `MAX_ROWS_SUMMED` rows, of any shape."""
    return (
        torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and rows.device.type == "cpu"
        and rows.numel() <= MAX_ROWS_SUMMED
    )


def few_rows_product(left: Tensor, right: Tensor) -> Tensor:
    """[..., K] times [..., N, K] (transposed) as a sum of products, [..., N], of which the compiler makes one loop.

    A library's product costs a call and often a copy: more than the product itself when there are few rows.
    """
    wide = torch.promote_types(left.dtype, torch.float32)
    return (left.unsqueeze(-2).to(wide) * right.to(wide)).sum(-1).to(left.dtype)


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale * query key^T) value over the keys a query may see.

    Args:
        query, key: [B, H, T, D].
        value: [B, H, T, V].
        mask: True where a query may look, bool, broadcastable to [B, H, T, T], nowhere ahead of it; None: causal.
        scale: of the products.

    Returns:
        [B, H, T, V] in the dtype of `query`.
    """
    length = query.shape[-2]
    materialise = (
        query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and torch.is_grad_enabled()
        and length <= MAX_MATERIALISED_LENGTH
    )
    if not materialise:
        return F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, scale=scale)
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril_()
    bias = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill_(~mask, float("-inf"))
    return MaterialisedAttention.apply(query, key, value, bias, scale)


class MaterialisedAttention(torch.autograd.Function):
    """Causal attention whose weights are kept for the backward pass: four plain products instead of a recomputation.

    Queries go in blocks of `QUERY_BLOCK`, each against the keys up to its own end, so that most of what the causal mask
    would throw away is never computed.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
        """[B, H, T, D] twice, [B, H, T, V] -> [B, H, T, V]; `bias` is 0 where a query may look and -inf elsewhere."""
        shape = query.shape[:2]
        query, key, value = (part.flatten(0, 1).contiguous() for part in (query * scale, key, value))
        out = torch.empty_like(value)
        weights = []
        for block, seen in _causal_blocks(query.shape[1]):
            scores = torch.bmm(query[:, block], key[:, seen].transpose(1, 2))
            scores.unflatten(0, shape).add_(bias[..., block, seen])
            weights.append(scores.softmax(dim=-1))
            out[:, block] = torch.bmm(weights[-1], value[:, seen])
        ctx.save_for_backward(query, key, value, out, *weights)
        ctx.scale, ctx.shape = scale, shape
        return out.unflatten(0, shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """d scores = weights * (d weights - sum over keys of weights * d weights), and the sum is grad . out."""
        query, key, value, out, *weights = ctx.saved_tensors
        grad = grad.flatten(0, 1).contiguous()
        mean = (grad * out).sum(dim=-1, keepdim=True)
        grad_query, grad_key, grad_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for (block, seen), weight in zip(_causal_blocks(query.shape[1]), weights, strict=True):
            grad_value[:, seen] += torch.bmm(weight.transpose(1, 2), grad[:, block])
            grad_scores = torch.bmm(grad[:, block], value[:, seen].transpose(1, 2))
            grad_scores.sub_(mean[:, block]).mul_(weight)
            grad_query[:, block] = torch.bmm(grad_scores, key[:, seen])
            grad_key[:, seen] += torch.bmm(grad_scores.transpose(1, 2), query[:, block])
        grads = (grad_query.mul_(ctx.scale), grad_key, grad_value)
        return *(part.unflatten(0, ctx.shape) for part in grads), None, None


def _causal_blocks(length: int) -> list[tuple[slice, slice]]:
    """Blocks of queries, and the keys that any query of each may see.

    >>> _causal_blocks(100)
    [(slice(0, 64, None), slice(0, 64, None)), (slice(64, 100, None), slice(0, 100, None))]
    """
    ends = [min(first + QUERY_BLOCK, length) for first in range(0, length, QUERY_BLOCK)]
    return [(slice(first, end), slice(0, end)) for first, end in zip([0, *ends], ends, strict=False)]


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """hidden / sqrt(mean(hidden^2) + eps) * weight over the last dimension, in the dtype of `hidden`."""
    if hidden.device.type == "cpu" and torch.is_grad_enabled():
        return MaterialisedRMSNorm.apply(hidden, weight, eps)
    return F.rms_norm(hidden, weight.shape, weight.to(hidden.dtype), eps)


class MaterialisedRMSNorm(torch.autograd.Function):
    """The norm with a backward of four passes over the data."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        """[..., C] and weight [C] -> [..., C], computed in float32 or better."""
        exact = hidden if hidden.dtype == torch.float64 else hidden.float()
        length = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
        inverse = (length * length / hidden.shape[-1] + eps).rsqrt_()
        unit = exact * inverse
        ctx.save_for_backward(unit, inverse, weight)
        ctx.dtype = hidden.dtype
        return (unit * weight).to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """d hidden = inverse * (g - unit * mean(g * unit)) with g = grad * weight."""
        unit, inverse, weight = ctx.saved_tensors
        grad, weight_like = grad.to(unit.dtype), weight.to(unit.dtype)
        products = grad * unit
        grad_weight = products.flatten(0, -2).sum(0).to(weight.dtype)
        mean = (products @ weight_like / len(weight)).unsqueeze(-1)
        grad_hidden = (grad * weight_like).addcmul_(unit, mean, value=-1).mul_(inverse)
        return grad_hidden.to(ctx.dtype), grad_weight, None
