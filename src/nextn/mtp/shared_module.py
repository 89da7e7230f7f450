"""One MTP transformer shared by all depths, and a linear head for each: the form of popular guides.

    g = norm(layers(h[0])),  P[k] = head_k(g) = W_k g + b_k

With no layers, heads read the trunk's normed state directly, as Medusa's do without their residual block
(arXiv 2401.10774 section 2.1.1).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from nextn.config import MTPConfig
from nextn.model import Cache, LayerContext, Trunk
from nextn.model.flops import head_flops
from nextn.mtp.scheme import DepthState, Scheme


class SharedModule(Scheme):
    """`num_layers` layers run once, then K heads of their own, with bias; no future token is embedded.

    So all drafts of a cycle are independent of each other. The layers run at depth 1; deeper ones only cut the end.

    Worked example, K = 2, row [A B C D E]:

        depth 1, position 0: g[0] (saw A) through head 1 predicts C
        depth 2, position 0: g[0] (saw A) through head 2 predicts D
    """

    reads = frozenset({"num_layers", "dense_blocks", "trunk_hidden", "head_norm"})
    embeds_tokens = False
    is_chain = False

    def __init__(self, trunk: Trunk, config: MTPConfig):
        super().__init__(trunk, config)
        self.layers = nn.ModuleList(trunk.new_block(dense=config.dense_blocks) for _ in range(config.num_layers))
        self.norm = trunk.new_norm() if config.num_layers and config.head_norm == "own" else None
        self.heads = nn.ModuleList(nn.Linear(trunk.hidden_size, trunk.vocab_size) for _ in range(config.num_depths))

    def trunk_state(self, hidden: Tensor, normed: Tensor) -> Tensor:
        """h[0]; without layers always the normed state, which the heads then read."""
        return super().trunk_state(hidden, normed) if self.config.num_layers else normed

    @classmethod
    def settings_read(cls, config: MTPConfig) -> frozenset[str]:
        """Without layers only their number: heads alone have no block and no norm, and `trunk_state` no choice."""
        return cls.reads if config.num_layers else frozenset({"num_layers"})

    @classmethod
    def uses_trunk_head(cls, config: MTPConfig) -> bool:
        """Heads are the module's own; the trunk's final norm stands before them if it is asked for."""
        return config.num_layers > 0 and config.head_norm == "shared"

    def required_depths(self, wanted: Sequence[int]) -> list[int]:
        """The wanted ones, and depth 1, which runs the layers."""
        return sorted({1, *wanted}) if wanted else []

    def step(
        self,
        trunk: Trunk,
        depth: int,
        hidden: Tensor,
        embedded_ids: Tensor,
        context: LayerContext,
        cache: Cache | None = None,
    ) -> DepthState:
        """Depth 1 runs the layers; deeper ones are handed their output. `embedded_ids` are not read."""
        if depth == 1 and len(self.layers):
            for index, layer in enumerate(self.layers):
                hidden = layer(hidden, context, None if cache is None else cache.layers[index])
            hidden = (trunk.final_norm if self.norm is None else self.norm)(hidden)
        return DepthState(carry=hidden, head_input=hidden)

    def head(self, trunk: Trunk, depth: int) -> nn.Linear:
        """Depth k's own head."""
        return self.heads[depth - 1]  # type: ignore[return-value]

    def depth_flops(self, trunk: Trunk, depth: int, sequence_length: int) -> float:
        """The head, and at depth 1 all layers."""
        layers = self.layers if depth == 1 else ()
        return sum(trunk.block_flops(layer, sequence_length) for layer in layers) + head_flops(trunk)

    def num_cache_layers(self, draft_length: int) -> int:
        """The module's own layers, however many depths are drafted."""
        return len(self.layers)
