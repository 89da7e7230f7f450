"""What every multi-token prediction scheme offers: training states of all depths, one draft step, caches, FLOPs."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from nextn.alignment import DepthAlignment, num_final_positions
from nextn.config import DetachConfig, MTPConfig
from nextn.model import Cache, LayerContext, Trunk
from nextn.mtp.routing import NO_DETACH, routed

ContextFactory = Callable[[int, int, Tensor | None], LayerContext]
"""From a depth, its number of positions and their documents (int64 [B, M] or None) to what its layers share."""


@dataclass(frozen=True)
class DepthState:
    """What one depth computed at each position.

    Attributes:
        carry: what depth k+1 reads, [B, M, C]: h[k] in a chain, the trunk's own state where depths do not build on
            each other.
        head_input: what depth k's output head reads (normed), [B, M, C].
    """

    carry: Tensor
    head_input: Tensor


class Scheme(nn.Module, abc.ABC):
    """Extra depths on a trunk. The trunk is passed in, never owned: embedding and head stay one storage.

    Depths are 1-based. `docs/adding_a_scheme.md` builds one from scratch.
    """

    reads: ClassVar[frozenset[str]]
    """Fields of `MTPConfig` that the scheme can read, beside `scheme` and `num_depths`."""

    embeds_tokens: ClassVar[bool]
    """Depth k reads the embedding of t[i+k]; so drafts of one cycle build on each other."""

    is_chain: ClassVar[bool]
    """Depth k+1 reads what depth k computed; so the last module can be used again beyond the trained depths."""

    def __init__(self, trunk: Trunk, config: MTPConfig):
        super().__init__()
        self.config = config
        self.num_depths = config.num_depths
        """K: depths trained."""

    @classmethod
    def settings_read(cls, config: MTPConfig) -> frozenset[str]:
        """Those of `reads` that have an effect with this config: all of them, unless one makes others idle."""
        return cls.reads

    @classmethod
    def uses_trunk_head(cls, config: MTPConfig) -> bool:
        """True iff some depth reads the trunk's output head, or its final norm as head norm (see `detach.head`)."""
        return True

    @classmethod
    def max_draft_length(cls, num_depths: int) -> int | None:
        """Most tokens drafted in a cycle with K depths; None: any number, since a chain can go on."""
        return None if cls.is_chain else num_depths

    def trunk_state(self, hidden: Tensor, normed: Tensor) -> Tensor:
        """h[0]: the trunk's state before or after its final norm, [B, M, C] each, as `trunk_hidden` says."""
        return normed if self.config.trunk_hidden == "post_norm" else hidden

    def required_depths(self, wanted: Sequence[int]) -> list[int]:
        """The depths to compute where only some are wanted: a chain needs all up to the last one."""
        return list(range(1, max(wanted, default=0) + 1)) if self.is_chain else list(wanted)

    def trained_depths(self, wanted: Sequence[int], detach: DetachConfig) -> list[int]:
        """The depths that the losses of the wanted ones train: what these build on too, unless they read it detached.

        Any other depth gets no gradient, no balance loss and no routing bias update, computed or not.
        """
        return list(wanted) if detach.between_depths and self.is_chain else self.required_depths(wanted)

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
            hidden: what depth k-1 carried at these positions (for k = 1: h[0]), [B, M, C].
            embedded_ids: t[i+k] for each position i, int64 [B, M].
            context: of the positions i, from the trunk's `context` or, with a cache, `cached_context`.
            cache: from `new_cache`; slot i holds position i.
        """

    def head(self, trunk: Trunk, depth: int) -> nn.Linear:
        """The output head of depth k, [..., C] -> [..., V]: the trunk's, unless the scheme has its own."""
        return trunk.output_head

    @abc.abstractmethod
    def depth_flops(self, trunk: Trunk, depth: int, sequence_length: int) -> float:
        """Forward FLOPs of depth k at one position, head included, in a row of `sequence_length` tokens."""

    @abc.abstractmethod
    def num_cache_layers(self, draft_length: int) -> int:
        """Cached layers that drafting `draft_length` depths needs."""

    def flops_per_token(self, trunk: Trunk, sequence_length: int) -> float:
        """Forward FLOPs of all K depths per token of a row of T tokens: depth k has T-k positions."""
        totals = (
            self.depth_flops(trunk, depth, sequence_length) * num_final_positions(sequence_length, depth)
            for depth in range(1, self.num_depths + 1)
        )
        return sum(totals) / sequence_length

    def new_cache(self, trunk: Trunk, num_rows: int, capacity: int, draft_length: int) -> Cache:
        """Empty cache for drafting `draft_length` depths in rows of at most `capacity` tokens."""
        return trunk.new_cache(num_rows, capacity, num_layers=self.num_cache_layers(draft_length))

    def forward(
        self,
        trunk: Trunk,
        hidden: Tensor,
        normed: Tensor,
        aligned: Sequence[DepthAlignment],
        document_ids: Tensor | None = None,
        detach: DetachConfig = NO_DETACH,
        new_context: ContextFactory | None = None,
    ) -> list[Tensor]:
        """Head inputs of some depths over whole rows, for training and evaluation.

        Args:
            trunk: the model whose embedding, norm and head are shared.
            hidden: the trunk's states before its final norm, [B, T, C].
            normed: the same after it.
            aligned: the depths to compute, in growing order (those of `required_depths`, or 1..K).
            document_ids: of the tokens, int64 [B, T] or None.
            detach: where gradients stop.
            new_context: called once per depth; None: the trunk's `context`, whatever the depth.

        Returns:
            For each of these depths k, [B, T-k, C].
        """
        head_inputs = []
        new_context = new_context or (lambda _, *positions: trunk.context(*positions))
        carry = self.trunk_state(hidden, normed)
        if detach.trunk:
            carry = carry.detach()
        trunk = routed(trunk, detach)
        for one in aligned:
            documents = None if document_ids is None else one.documents(document_ids)
            context = new_context(one.depth, one.num_positions, documents)
            state = self.step(trunk, one.depth, one.cut(carry), one.embedded_ids, context)
            head_inputs.append(state.head_input)
            carry = state.carry.detach() if detach.between_depths and self.is_chain else state.carry
        return head_inputs
