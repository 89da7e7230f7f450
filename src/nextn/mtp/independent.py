"""Independent depths: each joins the trunk's own state with its future token, without a chain between depths.

h[k] = module_k(h[0], Emb(t[i+k])),  P[k] = output_head(head_norm(h[k]))
"""

from __future__ import annotations

from torch import Tensor, nn

from nextn.config import MTPConfig
from nextn.model import Cache, LayerContext, Trunk
from nextn.mtp.fusion import FusionModule
from nextn.mtp.scheme import DepthState, Scheme


class Independent(Scheme):
    """K modules side by side, each on the trunk's states; depth k does not embed t[i+1..i+k-1] at position i.

    It may see some of them through attention: its block also reads positions j < i, which embed t[j+k].

    Worked example, K = 2, row [A B C D E]:

        depth 1, position 0: h[0][0] (saw A) with Emb(B) predicts C
        depth 2, position 0: h[0][0] (saw A) with Emb(C) predicts D, without B
    """

    reads = frozenset({"dense_blocks", "concat", "trunk_hidden", "head_norm"})
    embeds_tokens = True
    is_chain = False

    def __init__(self, trunk: Trunk, config: MTPConfig):
        super().__init__(trunk, config)
        self.layers = nn.ModuleList(FusionModule(trunk, config) for _ in range(config.num_depths))

    def step(
        self,
        trunk: Trunk,
        depth: int,
        hidden: Tensor,
        embedded_ids: Tensor,
        context: LayerContext,
        cache: Cache | None = None,
    ) -> DepthState:
        """Depth k's own module on the trunk's state, which is carried on unchanged."""
        layer_cache = None if cache is None else cache.layers[depth - 1]
        _, normed = self.layers[depth - 1](trunk, hidden, embedded_ids, context, layer_cache)
        return DepthState(carry=hidden, head_input=normed)

    def depth_flops(self, trunk: Trunk, depth: int, sequence_length: int) -> float:
        """A block, eh_proj and the head."""
        return self.layers[depth - 1].flops(trunk, sequence_length)  # type: ignore[operator]

    def num_cache_layers(self, draft_length: int) -> int:
        """One per drafted depth: depth k uses `layers[k - 1]`."""
        return draft_length
