"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434 section 2.1; DeepSeek-V3, arXiv 2412.19437 eq. 1-11).

Keys and values of all heads come from one latent vector per token, which is all that decoding caches. Two equal forms:
the *expanded* one builds every head's keys and values (training: many queries), the *absorbed* one multiplies the
up-projections into query and output instead and attends to the latents themselves (decoding: few queries).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nextn.config import ModelConfig
from nextn.model.cache import LayerCache
from nextn.model.context import LayerContext
from nextn.model.kernels import attention, joint_linear, operand
from nextn.model.norm import RMSNorm
from nextn.model.rope import rotate, softmax_scale


class LatentAttention(nn.Module):
    """MLA with DeepSeek's weight names; `q_lora_rank = None` has one full query projection `q_proj`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.nope_dim, self.rope_dim = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.v_dim, self.latent_rank = config.v_head_dim, config.kv_lora_rank
        self.interleaved = config.rope_interleave
        self.scale = softmax_scale(config)

        width, bias = config.hidden_size, config.attention_bias
        query_dim = self.num_heads * config.qk_head_dim
        self.q_lora_rank = config.q_lora_rank
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(width, query_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(width, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank)  # eps 1e-6 whatever rms_norm_eps is, as released
            self.q_b_proj = nn.Linear(config.q_lora_rank, query_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(width, config.latent_dim, bias=bias)
        self.kv_a_layernorm = RMSNorm(self.latent_rank)
        self.kv_b_proj = nn.Linear(self.latent_rank, self.num_heads * (self.nope_dim + self.v_dim), bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.v_dim, width, bias=bias)

    def forward(self, hidden: Tensor, context: LayerContext, cache: LayerCache | None = None) -> Tensor:
        """[B, M, C] -> [B, M, C]; with a cache, writes this forward's latents first."""
        query_proj = self.q_proj if self.q_lora_rank is None else self.q_a_proj
        query, latent = joint_linear(operand(hidden), query_proj, self.kv_a_proj_with_mqa)
        query_nope, query_rope = self._queries(query, context)
        latent = self._latent(latent, context)
        if cache is None:
            heads = self._attend_expanded(query_nope, query_rope, latent, context)
        else:
            assert context.positions is not None, "a cache needs positions"
            assert context.num_keys is not None, "a cache needs the number of keys"
            cache.write(context.positions, latent)
            heads = self._attend_absorbed(query_nope, query_rope, cache.read(context.num_keys), context)
        return self.o_proj(heads)

    def _queries(self, query: Tensor, context: LayerContext) -> tuple[Tensor, Tensor]:
        """[B, M, H, nope_dim] and [B, M, H, rope_dim] (rotated), from the (first) projection's output; eq. 6-9."""
        if self.q_lora_rank is not None:
            query = self.q_b_proj(self.q_a_layernorm(query))
        query = query.unflatten(-1, (self.num_heads, self.nope_dim + self.rope_dim))
        query_nope, query_rope = query.split((self.nope_dim, self.rope_dim), dim=-1)
        return query_nope, rotate(query_rope, context.cos, context.sin, self.interleaved)

    def _latent(self, projected: Tensor, context: LayerContext) -> Tensor:
        """What is cached, [B, M, latent_rank + rope_dim]: normalised latent (eq. 1), shared rotated key (eq. 3)."""
        latent, key_rope = projected.split((self.latent_rank, self.rope_dim), dim=-1)
        key_rope = rotate(key_rope.unsqueeze(2), context.cos, context.sin, self.interleaved).squeeze(2)
        return torch.cat((self.kv_a_layernorm(latent), key_rope), dim=-1)

    def _attend_expanded(self, query_nope: Tensor, query_rope: Tensor, latent: Tensor, context: LayerContext) -> Tensor:
        """Keys and values per head, [B, M, H * v_dim]; eq. 2, 4, 5, 10."""
        compressed, key_rope = latent.split((self.latent_rank, self.rope_dim), dim=-1)
        key_value = self.kv_b_proj(compressed).unflatten(-1, (self.num_heads, self.nope_dim + self.v_dim))
        key_nope, value = key_value.split((self.nope_dim, self.v_dim), dim=-1)
        key = torch.cat((key_nope, key_rope.unsqueeze(2).expand(-1, -1, self.num_heads, -1)), dim=-1)
        query = torch.cat((query_nope, query_rope), dim=-1)
        heads = attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), context.mask, self.scale)
        return heads.transpose(1, 2).flatten(2)

    def _attend_absorbed(self, query_nope: Tensor, query_rope: Tensor, latent: Tensor, context: LayerContext) -> Tensor:
        """The same on cached latents [B, S, latent_dim]: q W_uk . c = q . (W_uk c), so W_uk moves to the query side."""
        num_rows, num_queries = query_nope.shape[:2]
        up = self.kv_b_proj.weight.unflatten(0, (self.num_heads, self.nope_dim + self.v_dim))
        key_up, value_up = up.split((self.nope_dim, self.v_dim), dim=1)  # [H, nope, rank], [H, v, rank]
        query = torch.cat((torch.einsum("bmhd,hdr->bhmr", query_nope, key_up), query_rope.transpose(1, 2)), dim=-1)
        scores = query.flatten(1, 2) @ latent.transpose(1, 2)  # [B, H * M, S]
        scores = scores.view(num_rows, self.num_heads, num_queries, -1).mul(self.scale)
        if context.mask is not None:
            scores = scores.masked_fill(~context.mask, float("-inf"))
        weights = scores.softmax(dim=-1).flatten(1, 2)
        attended = (weights @ latent[..., : self.latent_rank]).view(num_rows, self.num_heads, num_queries, -1)
        return torch.einsum("bhmr,hvr->bmhv", attended, value_up).flatten(2)
