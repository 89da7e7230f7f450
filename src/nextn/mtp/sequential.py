"""DeepSeek-V3's multi-token prediction: a causal chain of modules (arXiv 2412.19437 section 2.2, eq. 21-25).

    h[k] = module_k(h[k-1], Emb(t[i+k])),  P[k] = output_head(head_norm(h[k]))

What differs between implementations (order of the concatenation, which trunk state is h[0], what is carried on, whose
norm) are settings, see `MTPConfig`.
"""

from __future__ import annotations

from torch import Tensor, nn

from nextn.config import MTPConfig
from nextn.model import Cache, LayerContext, Trunk
from nextn.mtp.fusion import FusionModule
from nextn.mtp.scheme import DepthState, Scheme


class Sequential(Scheme):
    """K chained depths; with `share_weights` one module serves them all. Beyond the last, the last is used again.

    Worked example, K = 2, row [A B C D E] (the embedding shifts, positions do not):

        depth 1, position 0: h[0][0] (saw A) with Emb(B) predicts C
        depth 2, position 0: h[1][0] (saw A B) with Emb(C) predicts D
    """

    reads = frozenset({"share_weights", "dense_blocks", "concat", "trunk_hidden", "carry", "head_norm"})
    embeds_tokens = True
    is_chain = True

    def __init__(self, trunk: Trunk, config: MTPConfig):
        super().__init__(trunk, config)
        num_modules = 1 if config.share_weights else config.num_depths
        self.layers = nn.ModuleList(FusionModule(trunk, config) for _ in range(num_modules))

    def module_at(self, depth: int) -> FusionModule:
        """The module that depth k >= 1 uses: its own, or the last one beyond the last."""
        return self.layers[min(depth, len(self.layers)) - 1]  # type: ignore[return-value]

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
        layer_cache = None if cache is None else cache.layers[depth - 1]
        out, normed = self.module_at(depth)(trunk, hidden, embedded_ids, context, layer_cache)
        return DepthState(carry=normed if self.config.carry == "post_norm" else out, head_input=normed)

    def depth_flops(self, trunk: Trunk, depth: int, sequence_length: int) -> float:
        """A block, eh_proj and the head."""
        return self.module_at(depth).flops(trunk, sequence_length)

    def num_cache_layers(self, draft_length: int) -> int:
        """One per drafted depth, shared weights or not: depth k uses `layers[k - 1]`."""
        return draft_length
