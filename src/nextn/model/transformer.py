"""The DeepSeek-V3 trunk: embedding, dense then mixture-of-experts layers, final norm, output head.

Module names give the released weights' names: `model.embed_tokens`, `model.layers.N`, `model.norm`, `lm_head`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextn.config import ModelConfig
from nextn.model import flops
from nextn.model.attention import LatentAttention
from nextn.model.balancing import ExpertUsage
from nextn.model.blocks import DecoderLayer
from nextn.model.cache import Cache
from nextn.model.context import LayerContext, cached_rows, whole_rows
from nextn.model.moe import MLP, Experts, MixtureOfExperts, Router
from nextn.model.norm import RMSNorm
from nextn.model.rope import RotaryTable


class Backbone(nn.Module):
    """Embedding, layers and final norm: the part whose weight names begin with `model.`"""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, config.is_moe_layer(index)) for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    """The native `Trunk`. Fresh weights are set by `initialize`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.hidden_size, self.vocab_size = config.hidden_size, config.vocab_size
        self.num_layers, self.max_position_embeddings = config.num_hidden_layers, config.max_position_embeddings
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.rotary = RotaryTable(config)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.lm_head.weight.device

    @property
    def layers(self) -> list[DecoderLayer]:
        """Dense ones first, then those with experts."""
        return list(self.model.layers)  # type: ignore[arg-type]

    def block_flops(self, block: nn.Module, sequence_length: int) -> float:
        """Forward FLOPs per token of a layer; see `nextn.model.flops`."""
        assert isinstance(block, DecoderLayer), "blocks are layers of this trunk"
        return flops.block_flops(self.config, isinstance(block.mlp, MixtureOfExperts), sequence_length)

    def num_unchosen_parameters(self, block: nn.Module) -> int:
        """Weights of routed experts that a token does not choose."""
        routed = sum(p.numel() for m in block.modules() if isinstance(m, Experts) for p in m.parameters())
        return routed - routed * self.config.num_experts_per_tok // max(self.config.n_routed_experts, 1)

    def embed(self, token_ids: Tensor) -> Tensor:
        """int64 [B, M] -> [B, M, C]."""
        return F.embedding(token_ids, self.model.embed_tokens.weight)

    def context(
        self, num_positions: int, document_ids: Tensor | None = None, usage: ExpertUsage | None = None
    ) -> LayerContext:
        """For whole rows of M positions; see `whole_rows`."""
        return whole_rows(self.rotary, num_positions, document_ids, usage)

    def cached_context(self, positions: Tensor, num_keys: int | None = None) -> LayerContext:
        """For positions int64 [B, M] after cached ones; see `cached_rows`."""
        return cached_rows(self.rotary, positions, num_keys)

    def hidden_states(
        self, token_ids: Tensor, context: LayerContext | None = None, cache: Cache | None = None
    ) -> Tensor:
        """State after the last layer, before the final norm: int64 [B, M] -> [B, M, C].

        Args:
            token_ids: int64 [B, M].
            context: from `context`, or with a cache from `cached_context`; None: whole rows, one document each.
            cache: its slots at the context's positions are written, and those up to each position are seen.
        """
        context = self.context(token_ids.shape[1]) if context is None else context
        hidden = self.embed(token_ids)
        for index, layer in enumerate(self.model.layers):
            hidden = layer(hidden, context, None if cache is None else cache.layers[index])
        return hidden

    @property
    def final_norm(self) -> RMSNorm:
        """The norm before the output head, [..., C] -> [..., C]."""
        return self.model.norm

    @property
    def output_head(self) -> nn.Linear:
        """Logits of normed states, [..., C] -> [..., V]."""
        return self.lm_head

    def forward(self, token_ids: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Next-token logits: int64 [B, T] -> [B, T, V]."""
        hidden = self.hidden_states(token_ids, self.context(token_ids.shape[1], document_ids))
        return self.output_head(self.final_norm(hidden))

    def new_cache(self, num_rows: int, capacity: int, num_layers: int | None = None) -> Cache:
        """An empty cache for `num_layers` blocks (None: the trunk's own)."""
        weight = self.lm_head.weight
        num_layers = self.num_layers if num_layers is None else num_layers
        return Cache.allocate(num_layers, num_rows, capacity, self.config.latent_dim, weight.dtype, weight.device)

    def new_block(self, dense: bool = False) -> DecoderLayer:
        """A fresh layer like the trunk's last one, or one with a dense feed-forward."""
        return DecoderLayer(self.config, self.config.extra_block_is_moe(dense))

    def new_norm(self) -> RMSNorm:
        """A fresh norm of the trunk's width."""
        return RMSNorm(self.hidden_size, self.config.rms_norm_eps)

    def initialize(self, module: nn.Module, generator: torch.Generator) -> None:
        """Fresh weights for this trunk itself or for a module built with `new_block` and `new_norm`."""
        initialize_weights(module, self.config, generator)


@torch.no_grad()
def initialize_weights(module: nn.Module, config: ModelConfig, generator: torch.Generator) -> None:
    """Normal weights of standard deviation `initializer_range`; norms one, biases zero.

    Projections into the residual stream (attention's o_proj, every down_proj) are divided by sqrt(2 * layers), so that
    the stream's variance does not grow with depth (as in GPT-2).
    """
    std = config.initializer_range
    residual_std = std / (2 * config.num_hidden_layers) ** 0.5

    def fill(weight: Tensor, std: float) -> None:
        weight.copy_(torch.randn(weight.shape, generator=generator) * std)

    for child in module.modules():
        if isinstance(child, RMSNorm):
            child.weight.fill_(1.0)
        elif isinstance(child, Experts):
            fill(child.gate_up_proj, std)
            fill(child.down_proj, residual_std)
        elif isinstance(child, Router):
            fill(child.weight, std)
            child.e_score_correction_bias.zero_()
        elif isinstance(child, nn.Linear | nn.Embedding):
            fill(child.weight, std)
            if isinstance(child, nn.Linear) and child.bias is not None:
                child.bias.zero_()
    for child in module.modules():
        if isinstance(child, LatentAttention):
            child.o_proj.weight.mul_(residual_std / std)
        elif isinstance(child, MLP):
            child.down_proj.weight.mul_(residual_std / std)
