"""What every multi-token prediction scheme offers: training states of all depths, one draft step, caches, sizes."""

from __future__ import annotations

import abc
from dataclasses import dataclass

from torch import Tensor, nn

from nextn.alignment import align
from nextn.model import Cache, LayerCache, Trunk


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
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: LayerCache | None = None,
        num_keys: int | None = None,
    ) -> DepthState:
        """Depth k at some positions.

        Args:
            trunk: the model whose embedding, norm and head are shared.
            depth: k >= 1.
            hidden: h[k-1] at these positions, [B, M, C].
            embedded_ids: t[i+k] for each position i, int64 [B, M].
            positions: i, int64 [B, M]; None: 0..M-1. Required with a cache.
            document_ids: of positions i, int64 [B, M]; not with a cache.
            cache: this depth's own cache layer; its slot i holds position i.
            num_keys: largest position + 1, if known.
        """

    @abc.abstractmethod
    def logits(self, trunk: Trunk, depth: int, head_input: Tensor) -> Tensor:
        """Logits of t[i+k+1]: [B, M, C] -> [B, M, V]."""

    @abc.abstractmethod
    def stored_modules(self) -> nn.ModuleList:
        """The modules with weights of their own, in order: layers num_hidden_layers, ... of a checkpoint."""

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
            documents = None if document_ids is None else aligned.of_previous(document_ids)
            previous = aligned.of_previous(carry)
            state = self.step(trunk, depth, previous, aligned.embedded_ids, document_ids=documents)
            head_inputs.append(state.head_input)
            carry = state.carry
        return head_inputs

    def new_cache(self, trunk: Trunk, num_rows: int, capacity: int, draft_length: int) -> Cache:
        """One cache layer per drafted depth: depth k uses `layers[k - 1]`."""
        return trunk.new_cache(num_rows, capacity, num_layers=draft_length)
