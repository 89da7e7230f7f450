"""One transformer layer: attention and feed-forward, each after a norm and added to the residual stream."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nextn.config import ModelConfig
from nextn.model.attention import LatentAttention
from nextn.model.cache import LayerCache
from nextn.model.context import LayerContext
from nextn.model.moe import MLP, MixtureOfExperts
from nextn.model.norm import RMSNorm


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); the feed-forward is dense or a mixture of experts.

    With `recompute` set, a training forward keeps only its input, and the backward pass computes the layer again: the
    same numbers for about a third more time and a fraction of the memory (arXiv 1604.06174).
    """

    recompute = False

    def __init__(self, config: ModelConfig, is_moe: bool):
        super().__init__()
        self.self_attn = LatentAttention(config)
        self.mlp = MixtureOfExperts(config) if is_moe else MLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden: Tensor, context: LayerContext, cache: LayerCache | None = None) -> Tensor:
        """[B, M, C] -> [B, M, C]; with a cache, this forward's latents are written to it first."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._run, hidden, context, cache, use_reentrant=False, preserve_rng_state=False)
        if cache is not None and torch.compiler.is_compiling():
            from nextn.model.compiler import call_compiled_once  # layers of one kind are compiled once

            return call_compiled_once(self._run, hidden, context, cache)
        return self._run(hidden, context, cache)

    def _run(self, hidden: Tensor, context: LayerContext, cache: LayerCache | None) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), context, cache)
        return hidden + self.mlp(self.post_attention_layernorm(hidden), context.usage)
