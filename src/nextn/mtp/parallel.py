"""Parallel heads of Gloeckle et al. (arXiv 2404.19737 section 2): one own layer per depth, one shared unembedding.

    P[k] = output_head(head_norm(layer_k(h[0])))

Their n counts the next token, so n = K + 1; their next-token head has a layer of its own too, which here is the trunk's
last one.
"""

from __future__ import annotations

from torch import Tensor, nn

from nextn.config import MTPConfig
from nextn.model import Cache, LayerContext, Trunk
from nextn.model.flops import head_flops
from nextn.mtp.scheme import DepthState, Scheme


class ParallelHead(nn.Module):
    """A transformer layer and the norm after it."""

    def __init__(self, trunk: Trunk, config: MTPConfig):
        super().__init__()
        self.block = trunk.new_block(dense=config.dense_blocks)
        self.norm = trunk.new_norm() if config.head_norm == "own" else None


class Parallel(Scheme):
    """K layers side by side on the trunk's states; no future token is embedded.

    Worked example, K = 2, row [A B C D E]:

        depth 1, position 0: h[0][0] (saw A) predicts C, not knowing B
        depth 2, position 0: h[0][0] (saw A) predicts D, not knowing B and C

    The trunk's state before its final norm is the usual input of a further layer: `trunk_hidden = "pre_norm"`.
    """

    reads = frozenset({"dense_blocks", "trunk_hidden", "head_norm"})
    embeds_tokens = False
    is_chain = False

    def __init__(self, trunk: Trunk, config: MTPConfig):
        super().__init__(trunk, config)
        self.layers = nn.ModuleList(ParallelHead(trunk, config) for _ in range(config.num_depths))

    def step(
        self,
        trunk: Trunk,
        depth: int,
        hidden: Tensor,
        embedded_ids: Tensor,
        context: LayerContext,
        cache: Cache | None = None,
    ) -> DepthState:
        """Depth k's own layer on the trunk's state, which is carried on unchanged; `embedded_ids` are not read."""
        head = self.layers[depth - 1]
        out = head.block(hidden, context, None if cache is None else cache.layers[depth - 1])  # type: ignore[operator]
        norm = trunk.final_norm if head.norm is None else head.norm
        return DepthState(carry=hidden, head_input=norm(out))  # type: ignore[operator]

    def depth_flops(self, trunk: Trunk, depth: int, sequence_length: int) -> float:
        """A layer and the head."""
        return trunk.block_flops(self.layers[depth - 1].block, sequence_length) + head_flops(trunk)  # type: ignore[arg-type]

    def num_cache_layers(self, draft_length: int) -> int:
        """One per drafted depth: depth k uses `layers[k - 1]`."""
        return draft_length
