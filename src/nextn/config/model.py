"""`[model]`: the trunk."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nextn.config.fields import require, setting
from nextn.errors import ConfigError


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding, under the name `rope_parameters` as in transformers.

    `rope_type = "yarn"` (arXiv 2309.00071) needs `factor` and `original_max_position_embeddings`.
    """

    rope_type: Literal["default", "yarn"] = setting("default", "default or yarn")
    rope_theta: float = setting(10000.0, "base of the geometric series of wavelengths")
    factor: float | None = setting(None, "yarn: context extension factor")
    original_max_position_embeddings: int | None = setting(None, "yarn: context trained on, in tokens")
    beta_fast: float | None = setting(None, "yarn: rotations above which a dimension is not interpolated (32)")
    beta_slow: float | None = setting(None, "yarn: rotations below which a dimension is fully interpolated (1)")
    mscale: float | None = setting(None, "yarn: attention temperature coefficient of cos and sin")
    mscale_all_dim: float | None = setting(None, "yarn: attention temperature coefficient of the softmax scale")
    truncate: bool | None = setting(None, "yarn: round the correction range to whole dimensions (true)")

    def __post_init__(self) -> None:
        if self.rope_theta <= 1:
            raise ConfigError(f"model.rope_parameters.rope_theta must be above 1, got {self.rope_theta:g}")
        require(self, "model.rope_parameters", 1, "factor", "original_max_position_embeddings")
        if self.rope_type == "default" and (self.factor, self.original_max_position_embeddings) != (None, None):
            raise ConfigError(
                "model.rope_parameters: factor and original_max_position_embeddings need rope_type = 'yarn'"
            )
        if self.rope_type == "yarn" and (self.factor is None or self.original_max_position_embeddings is None):
            raise ConfigError(
                "model.rope_parameters: rope_type = 'yarn' needs factor and original_max_position_embeddings, "
                f"got factor = {self.factor} and {self.original_max_position_embeddings}"
            )


@dataclass(frozen=True)
class ModelConfig:
    """The trunk, with the field names of transformers' `DeepseekV3Config`."""

    vocab_size: int = setting(0, "tokens in the vocabulary (V); 0 takes the tokenizer's")
    hidden_size: int = setting(256, "width of the residual stream (C)")
    intermediate_size: int = setting(768, "hidden width of a dense feed-forward layer")
    moe_intermediate_size: int = setting(128, "hidden width of one expert")
    num_hidden_layers: int = setting(8, "trunk layers, MTP modules not counted")
    num_attention_heads: int = setting(4, "attention heads (H)")
    n_shared_experts: int = setting(1, "experts every token uses")
    n_routed_experts: int = setting(8, "experts to choose from (E)")
    num_experts_per_tok: int = setting(2, "routed experts a token uses")
    n_group: int = setting(1, "groups the routed experts form")
    topk_group: int = setting(1, "groups a token may choose experts from")
    norm_topk_prob: bool = setting(True, "gates of the chosen experts sum to routed_scaling_factor")
    routed_scaling_factor: float = setting(1.0, "scale of the routed experts' sum")
    first_k_dense_replace: int = setting(1, "leading layers with a dense feed-forward instead of experts")
    q_lora_rank: int | None = setting(None, "rank of the query projection; none for a full one")
    kv_lora_rank: int = setting(64, "width of the cached key-value latent")
    qk_nope_head_dim: int = setting(32, "query/key width per head without position")
    qk_rope_head_dim: int = setting(16, "query/key width with rotary position; the key's is shared by all heads")
    v_head_dim: int = setting(32, "value width per head")
    rope_parameters: RopeConfig = field(default_factory=RopeConfig, metadata={"doc": "rotary position embedding"})
    rope_interleave: bool = setting(True, "rotary pairs are (x0, x1), (x2, x3), ... as in DeepSeek's weights")
    max_position_embeddings: int = setting(1024, "longest context, in tokens")
    rms_norm_eps: float = setting(1e-6, "epsilon of the layer norms")
    initializer_range: float = setting(0.02, "standard deviation of fresh weights")
    tie_word_embeddings: bool = setting(False, "output head is the embedding matrix")
    attention_bias: bool = setting(False, "biases in the low-rank down-projections and the output projection")

    def __post_init__(self) -> None:
        if self.qk_rope_head_dim % 2:
            raise ConfigError(f"model.qk_rope_head_dim must be even (rotary pairs), got {self.qk_rope_head_dim}")
        require(self, "model", 1, "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers")
        require(self, "model", 1, "num_attention_heads", "q_lora_rank", "kv_lora_rank", "v_head_dim")
        require(self, "model", 1, "qk_nope_head_dim", "qk_rope_head_dim", "max_position_embeddings")
        require(self, "model", 1, "n_group", "topk_group", "num_experts_per_tok")
        require(self, "model", 0, "vocab_size", "n_routed_experts", "n_shared_experts", "first_k_dense_replace")
        require(self, "model", 0, "rms_norm_eps", "initializer_range")
        if self.has_experts:
            self._check_routing()

    def _check_routing(self) -> None:
        if self.n_routed_experts % self.n_group:
            raise ConfigError(
                f"model.n_routed_experts = {self.n_routed_experts} does not divide into n_group = {self.n_group} groups"
            )
        experts_per_group = self.n_routed_experts // self.n_group
        if self.n_group > 1 and experts_per_group < 2:
            raise ConfigError("model.n_group: a group is scored by its best two experts, so it needs at least two")
        if not 1 <= self.topk_group <= self.n_group:
            raise ConfigError(f"model.topk_group must lie in 1..n_group = {self.n_group}, got {self.topk_group}")
        if not 1 <= self.num_experts_per_tok <= self.topk_group * experts_per_group:
            raise ConfigError(
                f"model.num_experts_per_tok = {self.num_experts_per_tok}, but a token may choose among "
                f"{self.topk_group * experts_per_group} experts (topk_group x experts per group)"
            )

    @property
    def has_experts(self) -> bool:
        """True iff some trunk layer is a mixture of experts."""
        return self.n_routed_experts > 0 and self.first_k_dense_replace < self.num_hidden_layers

    @property
    def qk_head_dim(self) -> int:
        """Query and key width per head, position part included."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Numbers the attention cache holds per token and layer."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def is_moe_layer(self, layer_index: int) -> bool:
        """True iff trunk layer `layer_index` (0-based) is a mixture of experts."""
        return self.n_routed_experts > 0 and layer_index >= self.first_k_dense_replace

    def extra_block_is_moe(self, dense: bool) -> bool:
        """True iff a block beyond the trunk's layers has experts: as the last of them has, unless `dense`."""
        return not dense and self.is_moe_layer(self.num_hidden_layers - 1)
