"""What every multi-token prediction scheme offers: training states of all depths, one draft step, caches, FLOPs."""

from __future__ import annotations

import abc
from dataclasses import dataclass

from torch import Tensor, nn

from nextn.alignment import align
from nextn.config import ModelConfig
from nextn.model import Cache, LayerContext, Trunk


@dataclass(frozen=True)
class DepthState:
    """What one depth computed at each position.

    Attributes:
        carry: h[k], which depth k+1 reads, [B, M, C].
        head_input: what depth k's output head reads (normed), [B, M, C].
    """

    carry: Tensor
    head_input: Tensor


class Scheme(nn.Module, abc.ABC):
    """Extra depths on a trunk. The trunk is passed in, never owned: embedding and head stay one storage.

    Depths are 1-based. A depth beyond the trained ones reuses the last module.
    """

    num_depths: int
    """K: depths trained."""

    @abc.abstractmethod
    def trunk_state(self, trunk: Trunk, hidden: Tensor) -> Tensor:
        """h[0] from the trunk's state before its final norm, [B, M, C] -> [B, M, C]."""

    @abc.abstractmethod
    def step(
        self,
        trunk: Trunk,
        depth: int,
        hidden: Tensor,
        embedded_ids: Tensor,
        context: LayerContext,
        cache: Cache | None = None,
    ) -> DepthState:
        """Depth k at some positions.

        Args:
            trunk: the model whose embedding, norm and head are shared.
            depth: k >= 1.
            hidden: h[k-1] at these positions, [B, M, C].
            embedded_ids: t[i+k] for each position i, int64 [B, M].
            context: of the positions i, from the trunk's `context` or, with a cache, `cached_context`.
            cache: from `new_cache`; slot i holds position i.
        """

    @abc.abstractmethod
    def logits(self, trunk: Trunk, depth: int, head_input: Tensor) -> Tensor:
        """Logits of t[i+k+1]: [B, M, C] -> [B, M, V]."""

    @abc.abstractmethod
    def flops_per_token(self, config: ModelConfig, sequence_length: int) -> float:
        """Forward FLOPs of all trained depths, heads included, per token of a row of `sequence_length` tokens."""

    @abc.abstractmethod
    def new_cache(self, trunk: Trunk, num_rows: int, capacity: int, draft_length: int) -> Cache:
        """Empty cache for drafting `draft_length` depths."""

    def forward(
        self, trunk: Trunk, hidden: Tensor, input_ids: Tensor, document_ids: Tensor | None, num_depths: int
    ) -> list[Tensor]:
        """Head inputs of depths 1..num_depths over whole rows, for training and evaluation.

        Args:
            trunk: the model whose embedding, norm and head are shared.
            hidden: the trunk's states before its final norm, [B, T, C].
            input_ids: int64 [B, T].
            document_ids: int64 [B, T] or None.
            num_depths: how many depths to compute, at most K.

        Returns:
            For each depth k, [B, T-k, C] (see `nextn.alignment`).
        """
        head_inputs = []
        carry = self.trunk_state(trunk, hidden)
        for depth in range(1, num_depths + 1):
            aligned = align(input_ids, depth)
            documents = None if document_ids is None else aligned.documents(document_ids)
            context = trunk.context(aligned.num_positions, documents)
            state = self.step(trunk, depth, aligned.cut(carry), aligned.embedded_ids, context)
            head_inputs.append(state.head_input)
            carry = state.carry
        return head_inputs
