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

from nextn.config import MTPConfig
from nextn.model import LayerCache, Trunk
from nextn.mtp.scheme import DepthState, Scheme


class SequentialModule(nn.Module):
    """The weights of one module, under DeepSeek's names."""

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
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: LayerCache | None = None,
        num_keys: int | None = None,
    ) -> DepthState:
        """Eq. 21, 22 and the norm of 23; see `Scheme.step`."""
        module = self.module_at(depth)
        parts = [module.enorm(trunk.embed(embedded_ids)), module.hnorm(hidden)]
        if self.config.concat == "hidden_first":
            parts.reverse()
        context = trunk.context(hidden.shape[1], positions, document_ids, cache is not None, num_keys)
        out = module.block(module.eh_proj(torch.cat(parts, dim=-1)), context, cache)
        normed = module.shared_head["norm"](out) if self.config.head_norm == "own" else trunk.final_norm(out)
        return DepthState(carry=normed if self.config.carry == "post_norm" else out, head_input=normed)

    def logits(self, trunk: Trunk, depth: int, head_input: Tensor) -> Tensor:
        """The trunk's own output head at every depth."""
        return trunk.output_head(head_input)

    def stored_modules(self) -> nn.ModuleList:
        """The modules with weights of their own."""
        return self.layers
