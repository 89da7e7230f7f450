"""The attention cache of decoding: one latent vector per token and layer.

Slot s of a row holds position s. A query at position p sees slots 0..p, and every slot up to p is written before it is
read, because decoding feeds positions in order. So rolling back is free: go on from an earlier position, and the stale
slots beyond are overwritten before any query can see them. Rows of a batch may stand at different positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerCache:
    """One layer's latents [B, capacity, latent_dim]: kv_lora_rank normalised, then the rotated shared key."""

    latent: Tensor

    def write(self, positions: Tensor, latent: Tensor) -> None:
        """Store `latent` [B, M, latent_dim] in the slots `positions` [B, M]."""
        index = positions.unsqueeze(-1).expand_as(latent)
        self.latent.scatter_(1, index, latent.to(self.latent.dtype))

    def read(self, num_keys: int) -> Tensor:
        """Slots 0..num_keys-1, a view [B, num_keys, latent_dim]."""
        return self.latent[:, :num_keys]


@dataclass(frozen=True)
class Cache:
    """Preallocated latents of several layers.

    Bytes per token of a row = latent_dim x layers x element size.
    """

    layers: tuple[LayerCache, ...]

    @staticmethod
    def allocate(
        num_layers: int, num_rows: int, capacity: int, latent_dim: int, dtype: torch.dtype, device: torch.device
    ) -> Cache:
        """A cache of zeros for `num_rows` rows (B) of at most `capacity` tokens."""
        shape = (num_rows, capacity, latent_dim)
        layers = tuple(LayerCache(torch.zeros(shape, dtype=dtype, device=device)) for _ in range(num_layers))
        return Cache(layers)

    def rows(self, first: int, end: int) -> Cache:
        """The same slots of rows first..end-1 only: views."""
        return Cache(tuple(LayerCache(layer.latent[first:end]) for layer in self.layers))

    def copy_row(self, source: int, target: int, num_tokens: int) -> None:
        """Row `target` takes over the first `num_tokens` slots of row `source`."""
        for layer in self.layers:
            layer.latent[target, :num_tokens] = layer.latent[source, :num_tokens]

    @property
    def num_bytes(self) -> int:
        """Memory held by all layers, in bytes."""
        return sum(layer.latent.numel() * layer.latent.element_size() for layer in self.layers)
