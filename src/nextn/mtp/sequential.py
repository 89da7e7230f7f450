"""DeepSeek-V3's multi-token prediction: a causal chain of modules (arXiv 2412.19437 section 2.2, eq. 21-25).

    h'[k] = eh_proj([enorm(Emb(t[i+k])); hnorm(h[k-1])])    (21)
    h[k]  = block(h'[k])                                      (22)
    P[k]  = output_head(head_norm(h[k]))                      (23)

The paper writes the concatenation the other way round; the released weights are embed first. What differs between
implementations (order, which trunk state is h[0], what is carried on, whose norm) are settings, see `MTPConfig`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nextn.alignment import num_final_positions
from nextn.config import ModelConfig, MTPConfig
from nextn.model import Cache, LayerContext, Trunk
from nextn.model.flops import block_flops, head_flops
from nextn.mtp.scheme import DepthState, Scheme


class SequentialModule(nn.Module):
    """The weights of one module, under DeepSeek's names; `eh_proj.weight` is [C, 2C]."""

    def __init__(self, trunk: Trunk, config: MTPConfig):
        super().__init__()
        self.enorm = trunk.new_norm()
        self.hnorm = trunk.new_norm()
        self.eh_proj = nn.Linear(2 * trunk.hidden_size, trunk.hidden_size, bias=False)
        self.block = trunk.new_block()
        self.shared_head = nn.ModuleDict({"norm": trunk.new_norm()} if config.head_norm == "own" else {})


class Sequential(Scheme):
    """K chained depths; with `share_weights` one module serves them all.

    Worked example, K = 2, row [A B C D E] (the embedding shifts, positions do not):

        depth 1, position 0: h[0][0] (saw A) with Emb(B) predicts C
        depth 2, position 0: h[1][0] (saw A B) with Emb(C) predicts D
    """

    def __init__(self, trunk: Trunk, config: MTPConfig):
        super().__init__()
        self.config = config
        self.num_depths = config.num_depths
        self.layers = nn.ModuleList(SequentialModule(trunk, config) for _ in range(config.num_modules))

    def module_at(self, depth: int) -> SequentialModule:
        """The module that depth k >= 1 uses: its own, or the last one beyond the last."""
        return self.layers[min(depth, len(self.layers)) - 1]  # type: ignore[return-value]

    def trunk_state(self, trunk: Trunk, hidden: Tensor) -> Tensor:
        """h[0]: the trunk's state after or before its final norm, as `trunk_hidden` says."""
        return trunk.final_norm(hidden) if self.config.trunk_hidden == "post_norm" else hidden

    def step(
        self,
        trunk: Trunk,
        depth: int,
        hidden: Tensor,
        embedded_ids: Tensor,
        context: LayerContext,
        cache: Cache | None = None,
    ) -> DepthState:
        """Eq. 21, 22 and the norm of 23; see `Scheme.step`."""
        module = self.module_at(depth)
        parts = [module.enorm(trunk.embed(embedded_ids)), module.hnorm(hidden)]
        if self.config.concat == "hidden_first":
            parts.reverse()
        layer_cache = None if cache is None else cache.layers[depth - 1]
        out = module.block(module.eh_proj(torch.cat(parts, dim=-1)), context, layer_cache)
        normed = module.shared_head["norm"](out) if self.config.head_norm == "own" else trunk.final_norm(out)
        return DepthState(carry=normed if self.config.carry == "post_norm" else out, head_input=normed)

    def logits(self, trunk: Trunk, depth: int, head_input: Tensor) -> Tensor:
        """The trunk's own output head at every depth."""
        return trunk.output_head(head_input)

    def flops_per_token(self, config: ModelConfig, sequence_length: int) -> float:
        """K times a block, eh_proj and the head, over the T-k positions depth k has."""
        is_moe = config.is_moe_layer(config.num_hidden_layers - 1)
        eh_proj = 2 * 2 * config.hidden_size**2
        depth_flops = block_flops(config, is_moe, sequence_length) + eh_proj + head_flops(config)
        num_positions = sum(num_final_positions(sequence_length, depth) for depth in range(1, self.num_depths + 1))
        return depth_flops * num_positions / sequence_length

    def new_cache(self, trunk: Trunk, num_rows: int, capacity: int, draft_length: int) -> Cache:
        """One layer per drafted depth: depth k uses `layers[k - 1]`."""
        return trunk.new_cache(num_rows, capacity, num_layers=draft_length)
