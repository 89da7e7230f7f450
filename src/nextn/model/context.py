"""The context that all layers of one forward share: rotary factors, attention mask, cache slots to write."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nextn.alignment import PADDING_DOCUMENT
from nextn.model.balancing import ExpertUsage
from nextn.model.rope import RotaryTable


@dataclass(frozen=True)
class LayerContext:
    """Built once per forward by `whole_rows` or `cached_rows`, read by every layer.

    Attributes:
        cos, sin: rotary factors of the queries' positions, [B or 1, M, R/2].
        mask: True where a query may look, bool [B or 1, 1, M, S]; None: every earlier position and itself.
        usage: records the experts of the tokens; None: nothing is recorded.
        positions: cache slots to write, int64 [B, M]; None without a cache.
        num_keys: slots 0..num_keys-1 are attended to (S); None without a cache.
    """

    cos: Tensor
    sin: Tensor
    mask: Tensor | None = None
    usage: ExpertUsage | None = None
    positions: Tensor | None = None
    num_keys: int | None = None


def whole_rows(
    rotary: RotaryTable,
    num_positions: int,
    document_ids: Tensor | None = None,
    usage: ExpertUsage | None = None,
) -> LayerContext:
    """Positions 0..M-1 of rows read at once; documents `document_ids`, int64 [B, M], do not see each other."""
    cos, sin = rotary(num_positions, None)
    return LayerContext(cos, sin, None if document_ids is None else document_mask(document_ids), usage)


def cached_rows(rotary: RotaryTable, positions: Tensor, num_keys: int | None = None) -> LayerContext:
    """Some positions, int64 [B, M], of rows whose earlier positions are in a cache; position = slot.

    `num_keys` is the largest position + 1; None reads it back from the device.
    """
    cos, sin = rotary(positions.shape[1], positions)
    num_keys = int(positions.max()) + 1 if num_keys is None else num_keys
    return LayerContext(cos, sin, cached_mask(positions, num_keys), None, positions, num_keys)


def document_mask(document_ids: Tensor) -> Tensor:
    """Causal mask inside documents: bool [B, 1, T, T] from ids [B, T]. Every position sees itself, padding too.

    >>> document_mask(torch.tensor([[0, 0, 1]]))[0, 0].int().tolist()
    [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    """
    length = document_ids.shape[1]
    same = document_ids[:, :, None] == document_ids[:, None, :]
    same &= document_ids[:, None, :] != PADDING_DOCUMENT
    same |= torch.eye(length, dtype=torch.bool, device=document_ids.device)
    return same.tril_()[:, None]


def cached_mask(positions: Tensor, num_keys: int) -> Tensor:
    """Causal mask over cache slots: bool [B, 1, M, num_keys], True for slots up to the query's position [B, M].

    >>> cached_mask(torch.tensor([[1, 2]]), 4)[0, 0].int().tolist()
    [[1, 1, 0, 0], [1, 1, 1, 0]]
    """
    slots = torch.arange(num_keys, device=positions.device)
    return (slots <= positions[..., None])[:, None]
