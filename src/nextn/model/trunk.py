"""The `Trunk` protocol: the parts of a language model that MTP and decoding need.

The native `Transformer` satisfies it, and so does `nextn.interop.adapter` around transformers' models. Nothing above
this package knows which one it has. A context is an object of the trunk's own kind, which is passed to its blocks
unread (the native trunk's is `LayerContext`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nextn.model.balancing import ExpertUsage
from nextn.model.cache import Cache


class Trunk(Protocol):
    """A causal language model in parts, a module. B rows, M positions, C width, V vocabulary."""

    hidden_size: int
    vocab_size: int
    num_layers: int
    max_position_embeddings: int

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        ...

    @property
    def layers(self) -> Sequence[nn.Module]:
        """Its own transformer layers, in order; what `new_block` gives is made of layers of these classes."""
        ...

    def block_flops(self, block: nn.Module, sequence_length: int) -> float:
        """Forward FLOPs per token of one of `layers` or of a `new_block`, in rows of `sequence_length` tokens.

        `nextn.model.flops` says what is counted.
        """
        ...

    def num_unchosen_parameters(self, block: nn.Module) -> int:
        """Weights of routed experts that a token does not choose, in a block; 0 without experts."""
        ...

    def modules(self) -> Iterator[nn.Module]:
        """Itself and every module inside it."""
        ...

    def embed(self, token_ids: Tensor) -> Tensor:
        """int64 [B, M] -> [B, M, C]."""
        ...

    def context(self, num_positions: int, document_ids: Tensor | None = None, usage: ExpertUsage | None = None) -> Any:
        """The context that layers share in a forward over whole rows of M positions; documents int64 [B, M] stay apart.

        `usage` records the experts of the tokens; a trunk without experts leaves it empty.
        """
        ...

    def cached_context(self, positions: Tensor, num_keys: int | None = None) -> Any:
        """The same for positions int64 [B, M] after cached ones; `num_keys` = largest position + 1, if known."""
        ...

    def hidden_states(self, token_ids: Tensor, context: Any = None, cache: Cache | None = None) -> Tensor:
        """State after the last layer, before the final norm: int64 [B, M] -> [B, M, C]; no context: whole rows."""
        ...

    @property
    def final_norm(self) -> nn.Module:
        """The norm before the output head, [..., C] -> [..., C]."""
        ...

    @property
    def output_head(self) -> nn.Linear:
        """Logits of normed states, [..., C] -> [..., V]."""
        ...

    def new_cache(self, num_rows: int, capacity: int, num_layers: int | None = None) -> Cache:
        """An empty cache for `num_layers` blocks (None: the trunk's own layers)."""
        ...

    def new_block(self, dense: bool = False) -> nn.Module:
        """A fresh layer like the trunk's last one, called as block(hidden [B, M, C], context, layer_cache or None).

        With `dense`, it has a plain feed-forward even where the trunk's has experts.
        """
        ...

    def new_norm(self) -> nn.Module:
        """A fresh norm like the trunk's final one, for an MTP module."""
        ...

    def initialize(self, module: nn.Module, generator: torch.Generator) -> None:
        """Fresh weights for this trunk itself or for a module built with `new_block` and `new_norm`."""
        ...
