"""One module of DeepSeek-V3's kind: a state and the embedding of a future token, joined, then one block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nextn.config import MTPConfig
from nextn.model import LayerCache, LayerContext, Trunk
from nextn.model.flops import head_flops


class FusionModule(nn.Module):
    """Weights under DeepSeek's names; `eh_proj.weight` is [C, 2C].

        h' = eh_proj([enorm(Emb(token)); hnorm(h)])    (arXiv 2412.19437 eq. 21)
        out = block(h')                                  (22)
        head_input = head_norm(out)                      (the norm of 23)

    The paper writes the concatenation the other way round; the released weights are embed first.
    """

    def __init__(self, trunk: Trunk, config: MTPConfig):
        super().__init__()
        self.config = config
        self.enorm = trunk.new_norm()
        self.hnorm = trunk.new_norm()
        self.eh_proj = nn.Linear(2 * trunk.hidden_size, trunk.hidden_size, bias=False)
        self.block = trunk.new_block(dense=config.dense_blocks)
        self.shared_head = nn.ModuleDict({"norm": trunk.new_norm()} if config.head_norm == "own" else {})

    def forward(
        self, trunk: Trunk, hidden: Tensor, embedded_ids: Tensor, context: LayerContext, layer_cache: LayerCache | None
    ) -> tuple[Tensor, Tensor]:
        """States [B, M, C] and tokens int64 [B, M] -> the block's output and its normed form, [B, M, C] each."""
        parts = [self.enorm(trunk.embed(embedded_ids)), self.hnorm(hidden)]
        if self.config.concat == "hidden_first":
            parts.reverse()
        out = self.block(self.eh_proj(torch.cat(parts, dim=-1)), context, layer_cache)
        norm = self.shared_head["norm"] if self.config.head_norm == "own" else trunk.final_norm
        return out, norm(out)

    def flops(self, trunk: Trunk, sequence_length: int) -> float:
        """Forward FLOPs at one position, the trunk's output head included."""
        block = trunk.block_flops(self.block, sequence_length)
        return block + 4.0 * trunk.hidden_size**2 + head_flops(trunk)
