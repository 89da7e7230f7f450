"""Output head and cross-entropy in one, without ever holding all logits: the fast path beside `losses`.

The logits [B, T, V] of one depth are by far the largest tensors of training. Here a chunk of positions at a time goes
through head, softmax and both gradients, and only the gradients stay: [B, T, C] per depth and one [V, C] for all depths
that share a head. So memory beyond the states themselves is O(chunk * V + V * C), whatever K is (the aim of arXiv
2404.19737 section 2, there reached by running backward through one head before the next goes forward; in a causal
chain that order is impossible, and this one is not).

The gradients are taken in the forward pass, already multiplied by the depth's weight, since the total loss is a known
linear function of them; the backward pass only scales them by the gradient of the total, which is usually 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nextn.model.kernels import operand

BLOCK_BYTES = 4 << 20
"""Softmax is computed on so many bytes of logits at a time, which stay in the processor's cache."""


@dataclass(frozen=True)
class HeadInput:
    """What one depth's output head reads, and the head: logits = hidden @ weight.T + bias.

    Attributes:
        hidden: [B, M, C].
        weight: [V, C].
        bias: [V] or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None

    def logits(self) -> Tensor:
        """[B, M, V], all at once."""
        return torch.nn.functional.linear(self.hidden, self.weight, self.bias)

    def detached(self) -> HeadInput:
        """The same, which no gradient leaves."""
        return HeadInput(self.hidden.detach(), self.weight.detach(), None if self.bias is None else self.bias.detach())


def chunked_losses(
    inputs: Sequence[HeadInput],
    labels: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    weights: Sequence[float],
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """L_d = sum over positions of coefficient * cross-entropy for every depth d, and their weighted sum.

    Equal to `logits()`, `summed_cross_entropy` and `total_loss` up to rounding. Products run in autocast's dtype if it
    is on, softmax in float32 or better.

    Args:
        inputs: of D depths; depths may share a head, whose gradient is then accumulated in one buffer.
        labels: int64 [B, M] per depth; where the coefficient is 0 any value will do.
        coefficients: float32 [B, M] per depth, 0 where no label counts.
        weights: of the depths in the total. A depth of weight 0 gets no gradient at all, rather than zeros that an
            optimizer would take for one.
        chunk_size: positions whose logits are held at once.

    Returns:
        The total, a scalar that gradients flow from (once), and L [D], detached; nats.
    """
    inputs = [one if weight else one.detached() for one, weight in zip(inputs, weights, strict=True)]
    heads: dict[tuple[int, int], tuple[Tensor, Tensor | None]] = {}
    for depth_input in inputs:
        heads.setdefault((id(depth_input.weight), id(depth_input.bias)), (depth_input.weight, depth_input.bias))
    places = {key: place for place, key in enumerate(heads)}
    plan = _Plan(
        [places[id(depth_input.weight), id(depth_input.bias)] for depth_input in inputs],
        list(labels),
        list(coefficients),
        list(weights),
        chunk_size,
        torch.is_grad_enabled(),
    )
    parameters = [tensor for pair in heads.values() for tensor in pair]
    return _ChunkedLosses.apply(plan, *(depth_input.hidden for depth_input in inputs), *parameters)


@torch.no_grad()
def chunked_predictions(head_input: HeadInput, labels: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Cross-entropy and most likely token of every position, without holding all logits.

    Args:
        head_input: of one depth.
        labels: int64 [B, M]; negative ones give a cross-entropy of 0.
        chunk_size: positions whose logits are held at once.

    Returns:
        Nats, float32 [B, M], and token ids, int64 [B, M].
    """
    losses, choices = [], []
    for rows, part in zip(
        head_input.hidden.flatten(0, 1).split(chunk_size), labels.flatten().split(chunk_size), strict=True
    ):
        logits = _exact(HeadInput(rows, head_input.weight, head_input.bias).logits())
        losses.append(_cross_entropy(logits, part.clamp(min=0))[0].masked_fill(part < 0, 0.0))
        choices.append(logits.argmax(-1))
    return torch.cat(losses).view_as(labels), torch.cat(choices).view_as(labels)


def _exact(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Nats [n], and the log of the softmax's denominator [n, 1]."""
    log_sum = logits.logsumexp(-1, keepdim=True)
    return (log_sum - logits.gather(1, labels[:, None])).squeeze(1), log_sum


@dataclass(frozen=True)
class _Plan:
    """What `_ChunkedLosses` needs beside tensors with gradients; lists have one entry per depth."""

    head_of_depth: list[int]
    labels: list[Tensor]
    coefficients: list[Tensor]
    weights: list[float]
    chunk_size: int
    with_gradients: bool


@dataclass(frozen=True)
class _Head:
    """Weight [V, C] and bias [V] in the dtype of products, and where their gradients are added up, if wanted."""

    weight: Tensor
    bias: Tensor | None
    weight_gradient: Tensor | None
    bias_gradient: Tensor | None


class _ChunkedLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        """`tensors`: the states of every depth, then weight and bias of every head."""
        num_depths = len(plan.head_of_depth)
        needed = [plan.with_gradients and need for need in ctx.needs_input_grad[1:]]
        gradients: list[Tensor | None] = [None] * len(tensors)
        heads: list[_Head] = []
        for place in range(num_depths, len(tensors), 2):
            weight, bias = tensors[place], tensors[place + 1]
            assert weight is not None
            gradients[place] = torch.zeros_like(weight) if needed[place] else None
            gradients[place + 1] = torch.zeros_like(bias) if bias is not None and needed[place + 1] else None
            cast_bias = None if bias is None else operand(bias)
            heads.append(_Head(operand(weight), cast_bias, gradients[place], gradients[place + 1]))
        sums = []
        for depth, head in enumerate(plan.head_of_depth):
            states = tensors[depth]
            assert states is not None
            loss, gradient = _one_depth(
                operand(states.flatten(0, 1)),
                heads[head],
                plan.labels[depth].flatten(),
                plan.coefficients[depth].flatten(),
                plan.weights[depth],
                plan.chunk_size,
                needed[depth],
            )
            gradients[depth] = None if gradient is None else gradient.view_as(states)
            sums.append(loss)
        total = sums[0] * plan.weights[0]
        for loss, weight_in_total in zip(sums[1:], plan.weights[1:], strict=True):
            total = total + loss * weight_in_total
        losses = torch.stack(sums)
        ctx.gradients = gradients
        ctx.mark_non_differentiable(losses)
        return total, losses

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients are there; the engine casts those of states back to the states' dtype."""
        if ctx.gradients is None:
            raise RuntimeError("the chunked loss frees its gradients in the first backward pass; there is no second")
        gradients, ctx.gradients = ctx.gradients, None
        return None, *(None if gradient is None else gradient.mul_(grad_total) for gradient in gradients)


def _one_depth(
    states: Tensor,
    head: _Head,
    labels: Tensor,
    coefficients: Tensor,
    weight_in_total: float,
    chunk_size: int,
    needs_states: bool,
) -> tuple[Tensor, Tensor | None]:
    """Weighted sum of cross-entropies, and the gradient of the states [n, C]; adds to the head's gradients in place."""
    num_positions, vocab_size = len(states), len(head.weight)
    loss = coefficients.new_zeros((), dtype=torch.float64 if states.dtype == torch.float64 else torch.float32)
    states_gradient = torch.empty_like(states) if needs_states else None
    with_gradients = needs_states or head.weight_gradient is not None or head.bias_gradient is not None
    buffer = states.new_empty(min(chunk_size, num_positions), vocab_size) if with_gradients else None
    for first in range(0, num_positions, chunk_size):
        chunk = slice(first, min(first + chunk_size, num_positions))
        for block in _blocks(chunk, vocab_size, states.device):
            logits = _exact(torch.nn.functional.linear(states[block], head.weight, head.bias))
            factors = coefficients[block]
            ids = labels[block].masked_fill(factors == 0, 0)
            nats, log_sum = _cross_entropy(logits, ids)
            loss += (nats * factors).sum()
            if buffer is not None:
                # d nats / d logits = softmax - one at the label
                probs = logits.sub_(log_sum).exp_()
                probs.scatter_add_(1, ids[:, None], probs.new_full((len(ids), 1), -1.0))
                probs.mul_((factors * weight_in_total)[:, None])
                if head.bias_gradient is not None:
                    head.bias_gradient.add_(probs.sum(0))
                buffer[block.start - first : block.stop - first].copy_(probs)
        if buffer is None:
            continue
        logit_gradients = buffer[: chunk.stop - first]
        if states_gradient is not None:
            torch.mm(logit_gradients, head.weight, out=states_gradient[chunk])
        if head.weight_gradient is not None:
            _add_product(head.weight_gradient, logit_gradients.t(), states[chunk])
    return loss, states_gradient


def _blocks(chunk: slice, vocab_size: int, device: torch.device) -> Iterator[slice]:
    """Parts of a chunk whose softmax stays in the processor's cache; a GPU takes the chunk whole."""
    num_rows = max(BLOCK_BYTES // (4 * vocab_size), 16) if device.type == "cpu" else chunk.stop - chunk.start
    for first in range(chunk.start, chunk.stop, num_rows):
        yield slice(first, min(first + num_rows, chunk.stop))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, with total in the parameter's own precision."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
