"""Mixture of experts (DeepSeek-V3, arXiv 2412.19437 section 2.1.2).

A token's gate is sigmoid(x . centroid); the choice of experts adds a bias that only balancing moves (eq. 12-16), see
`nextn.model.balancing`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextn.config import ModelConfig
from nextn.model.balancing import ExpertUsage
from nextn.model.kernels import joint_linear, operand

MAX_EXPERTS_DENSE = 16
"""Up to this many experts, a forward of a few tokens runs all of them as one product and gates the unchosen to zero."""

SLOT_MULTIPLE = 64
"""Tokens per expert are rounded up to a multiple of this, see `Dispatch`."""

MAX_TOKENS_DENSE = 16
"""How many tokens "a few" are: beyond, sorting tokens by expert costs less than running every expert on them."""


class MLP(nn.Module):
    """SwiGLU feed-forward: down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden: Tensor, usage: ExpertUsage | None = None) -> Tensor:
        """[..., C] -> [..., C]; `usage` is for experts only and unused here."""
        gate, up = joint_linear(operand(hidden), self.gate_proj, self.up_proj)
        return self.down_proj(F.silu(gate) * up)


class Routing(NamedTuple):
    """The router's decision for N tokens.

    Attributes:
        scores: sigmoid affinities without bias, float32 [N, E] (eq. 15).
        gates: of the chosen experts, from unbiased scores, float32 [N, top_k] (eq. 13).
        experts: chosen by biased scores, int64 [N, top_k] (eq. 16).
    """

    scores: Tensor
    gates: Tensor
    experts: Tensor


class Router(nn.Module):
    """Chooses experts per token; weight names `gate.weight`, `gate.e_score_correction_bias`."""

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.top_k, self.num_groups, self.top_k_groups = config.num_experts_per_tok, config.n_group, config.topk_group
        self.normalise, self.scaling = config.norm_topk_prob, config.routed_scaling_factor
        self.weight = nn.Parameter(torch.zeros(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))

    def forward(self, hidden: Tensor) -> Routing:
        """Scores, experts and gates of each token, [N, C].

        With groups, experts are chosen only inside the `topk_group` groups whose best two biased scores sum highest.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            scores = F.linear(hidden.float(), self.weight.float()).sigmoid()
        biased = scores.detach() + self.e_score_correction_bias
        if self.num_groups > 1:
            grouped = biased.unflatten(-1, (self.num_groups, -1))
            group_scores = grouped.topk(2, dim=-1).values.sum(-1)
            chosen = group_scores.topk(self.top_k_groups, dim=-1).indices
            open_groups = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, chosen, True)
            biased = grouped.masked_fill(~open_groups.unsqueeze(-1), float("-inf")).flatten(-2)
        experts = biased.topk(self.top_k, dim=-1).indices
        gates = scores.gather(1, experts)
        if self.normalise:
            gates = gates / (gates.sum(-1, keepdim=True) + 1e-20)
        return Routing(scores, gates * self.scaling, experts)


class Experts(nn.Module):
    """All routed experts' weights, stacked: `gate_up_proj` [E, 2 * I, C], `down_proj` [E, C, I]."""

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(num_experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.zeros(num_experts, hidden_size, intermediate_size))

    @property
    def num_experts(self) -> int:
        """E."""
        return self.gate_up_proj.shape[0]

    def forward(self, hidden: Tensor, gates: Tensor, experts: Tensor) -> Tensor:
        """Sum over the chosen experts of gate * expert(token): [N, C] -> [N, C]."""
        if torch.compiler.is_compiling():
            if not torch.is_grad_enabled():
                return self._run_chosen(hidden, gates, experts)
            from nextn.model.compiler import call_uncompiled  # loads differ at every step: compiling would never end

            return call_uncompiled(self._run_sorted, hidden, gates, experts)
        few = hidden.shape[0] <= MAX_TOKENS_DENSE and self.num_experts <= MAX_EXPERTS_DENSE
        if few and not torch.is_grad_enabled():
            return self._run_all(hidden, gates, experts)
        return self._run_sorted(hidden, gates, experts)

    def _run_sorted(self, hidden: Tensor, gates: Tensor, experts: Tensor) -> Tensor:
        """Tokens sorted by expert, one product per expert over its tokens."""
        dispatch = Dispatch.of(experts, self.num_experts)
        rows = SpreadRows.apply(hidden, dispatch)
        gate, up = GroupedLinear.apply(rows, self.gate_up_proj, dispatch.num_slots).chunk(2, dim=-1)
        rows = GroupedLinear.apply(F.silu(gate) * up, self.down_proj, dispatch.num_slots)
        return GatherRows.apply(rows, gates, dispatch)

    def _run_all(self, hidden: Tensor, gates: Tensor, experts: Tensor) -> Tensor:
        """Every expert on every token, unchosen ones gated to zero; two products, for a few tokens."""
        combine = hidden.new_zeros(hidden.shape[0], self.num_experts).scatter_(1, experts, gates.to(hidden.dtype))
        gate, up = F.linear(hidden, self.gate_up_proj.flatten(0, 1)).unflatten(-1, (self.num_experts, -1)).chunk(2, -1)
        inner = F.silu(gate) * up * combine.unsqueeze(-1)  # [N, E, I]
        return torch.bmm(inner.transpose(0, 1), self.down_proj.transpose(1, 2)).sum(0)

    def _run_chosen(self, hidden: Tensor, gates: Tensor, experts: Tensor) -> Tensor:
        """Each token reads its own experts' weights. Products written as sums, which the compiler makes loops of.

        Without a compiler the chosen weights would be copied first. Compiled, on 2 cores, float32, 10 layers of 8
        experts of 192 x 128, top-2: 0.28 ms for a token against 2.19 ms with every expert; for 64 tokens 4.1 and 7.0.
        """
        wide = torch.promote_types(hidden.dtype, torch.float32)
        gate_up = (self.gate_up_proj[experts].to(wide) * hidden[:, None, None].to(wide)).sum(-1)
        gate, up = gate_up.chunk(2, dim=-1)  # [N, top_k, I]
        inner = F.silu(gate) * up * gates.unsqueeze(-1)
        return (self.down_proj[experts].to(wide) * inner.unsqueeze(2)).sum((1, 3)).to(hidden.dtype)

    def reference(self, hidden: Tensor, gates: Tensor, experts: Tensor) -> Tensor:
        """The plain formula of eq. 12, token by token and choice by choice: for tests."""
        rows = []
        for token, token_gates, token_experts in zip(hidden, gates, experts, strict=True):
            row = torch.zeros_like(token)
            for weight, index in zip(token_gates, token_experts.tolist(), strict=True):
                gate, up = (self.gate_up_proj[index] @ token).chunk(2)
                row = row + weight * (self.down_proj[index] @ (F.silu(gate) * up))
            rows.append(row)
        return torch.stack(rows)


@dataclass(frozen=True)
class Dispatch:
    """The slots of (token, choice) pairs that are sorted by expert.

    Each expert's pairs fill slots in a row, rounded up to a multiple of `SLOT_MULTIPLE`; a slot left over stands for
    pair 0 with gate 0. Loads differ at every step, and without the rounding so would the shapes of all products, for
    which the CPU library then prepares itself anew: 0.6 ms instead of 0.1 ms each, two fifths of a step.

    Attributes:
        slot_of_pair: int64 [N, top_k].
        pair_of_slot: int64 [S], index into the flattened pairs.
        is_filled: bool [S], False for slots left over.
        num_slots: slots of each expert, multiples of `SLOT_MULTIPLE`.
    """

    slot_of_pair: Tensor
    pair_of_slot: Tensor
    is_filled: Tensor
    num_slots: list[int]

    @staticmethod
    def of(experts: Tensor, num_experts: int) -> Dispatch:
        """From the chosen experts, int64 [N, top_k]."""
        pairs = experts.flatten()
        by_expert = pairs.argsort(stable=True)
        counts = torch.bincount(pairs, minlength=num_experts)
        num_slots = (counts + SLOT_MULTIPLE - 1) // SLOT_MULTIPLE * SLOT_MULTIPLE
        # The j-th pair in sorted order moves up by the slots left over before its expert.
        shift = (num_slots - counts).cumsum(0) - (num_slots - counts)
        slots = torch.arange(len(pairs), device=pairs.device) + shift[pairs[by_expert]]
        sizes = num_slots.tolist()
        pair_of_slot = pairs.new_zeros(sum(sizes)).index_copy_(0, slots, by_expert)
        is_filled = torch.zeros(sum(sizes), dtype=torch.bool, device=pairs.device).index_fill_(0, slots, True)
        slot_of_pair = torch.empty_like(pairs).index_copy_(0, by_expert, slots)
        return Dispatch(slot_of_pair.view_as(experts), pair_of_slot, is_filled, sizes)


class SpreadRows(torch.autograd.Function):
    """rows[slot] = hidden[token of the slot]; its backward gathers too, where autograd would scatter-add."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, dispatch: Dispatch) -> Tensor:
        """[N, C] -> [S, C]."""
        ctx.dispatch = dispatch
        return hidden.index_select(0, dispatch.pair_of_slot // dispatch.slot_of_pair.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """A token's gradient is the sum over its choices."""
        first, *others = ctx.dispatch.slot_of_pair.unbind(1)
        total = grad.index_select(0, first)
        for slots in others:
            total += grad.index_select(0, slots)
        return total, None


class GatherRows(torch.autograd.Function):
    """out[n] = sum over choices c of gates[n, c] * rows[slot of (n, c)]: the way back from `SpreadRows`, gated."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, gates: Tensor, dispatch: Dispatch) -> Tensor:
        """[S, C] and gates [N, top_k] -> [N, C]."""
        ctx.gate_dtype = gates.dtype
        gates = gates.to(rows.dtype)
        ctx.save_for_backward(rows, gates)
        ctx.dispatch = dispatch
        (first, gate), *others = zip(dispatch.slot_of_pair.unbind(1), gates.split(1, dim=1), strict=True)
        out = rows.index_select(0, first).mul_(gate)
        for slots, gate in others:
            out.addcmul_(rows.index_select(0, slots), gate)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gates scale the rows' gradients (0 in slots left over); a gate's gradient is its row times the token's."""
        rows, gates = ctx.saved_tensors
        dispatch = ctx.dispatch
        gate_of_slot = gates.flatten().index_select(0, dispatch.pair_of_slot) * dispatch.is_filled
        grad_rows = grad.to(gates.dtype).index_select(0, dispatch.pair_of_slot // gates.shape[1])
        dots = (grad_rows * rows).sum(-1)
        return grad_rows.mul_(gate_of_slot.unsqueeze(1)), dots[dispatch.slot_of_pair].to(ctx.gate_dtype), None


class GroupedLinear(torch.autograd.Function):
    """y[rows of expert e] = x[rows of expert e] @ weight[e].T, rows sorted by expert, `num_rows[e]` rows each.

    Under autocast both operands are cast to its dtype, as autocast does for a linear layer.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, num_rows: list[int]) -> Tensor:
        """[R, in] and [E, out, in] -> [R, out]."""
        device = rows.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        rows, cast = rows.to(dtype), weight.to(dtype)
        ctx.save_for_backward(rows, cast)
        ctx.num_rows, ctx.weight_dtype = num_rows, weight.dtype
        out = rows.new_empty(rows.shape[0], weight.shape[1])
        for part, inputs, matrix in zip(out.split(num_rows), rows.split(num_rows), cast, strict=True):
            torch.mm(inputs, matrix.t(), out=part)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Two products per expert; an expert without tokens gets a gradient of exactly zero."""
        rows, weight = ctx.saved_tensors
        grad = grad.to(rows.dtype)
        grad_rows, grad_weight = torch.empty_like(rows), torch.empty_like(weight)
        groups = zip(
            grad.split(ctx.num_rows),
            rows.split(ctx.num_rows),
            grad_rows.split(ctx.num_rows),
            weight,
            grad_weight,
            strict=True,
        )
        for grad_part, inputs, grad_inputs, matrix, grad_matrix in groups:
            torch.mm(grad_part, matrix, out=grad_inputs)
            torch.mm(grad_part.t(), inputs, out=grad_matrix)
        return grad_rows, grad_weight.to(ctx.weight_dtype), None


class MixtureOfExperts(nn.Module):
    """Shared experts (as one MLP) plus the gated sum of the chosen routed experts; eq. 12."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config.n_routed_experts, config.hidden_size, config.moe_intermediate_size)
        self.shared_experts = (
            MLP(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)
            if config.n_shared_experts
            else None
        )

    def forward(self, hidden: Tensor, usage: ExpertUsage | None = None) -> Tensor:
        """[B, M, C] -> [B, M, C]; `usage` records the routing."""
        routing = self.gate(hidden.flatten(0, 1))
        noted = (self, routing.scores, routing.experts, hidden.shape[0])
        if usage is not None and torch.compiler.is_compiling():  # a note in a dictionary, not a computation
            from nextn.model.compiler import call_uncompiled

            call_uncompiled(usage.record, *noted)
        elif usage is not None:
            usage.record(*noted)
        hidden = operand(hidden)
        out = self.experts(hidden.flatten(0, 1), routing.gates, routing.experts).view_as(hidden)
        return out if self.shared_experts is None else out + self.shared_experts(hidden)
