"""Tiny random checkpoints in each family's released layout, and what their MTP modules must compute.

Everything here is written out by hand from the families' own code (see `source` in `nextn.interop.families`), not from
nextn's table, so that a mistake in the table has something to differ from.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Ernie4_5_MoeConfig,
    Glm4MoeConfig,
    Glm4MoeLiteConfig,
    MiMoV2FlashConfig,
    NemotronHConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
)

from .conftest import randomise

WIDTH, VOCABULARY, LAYERS = 48, 61, 3
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 80,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_HEADS = _COMMON | {"head_dim": 12}
_EXPERTS = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
_LATENT = _COMMON | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 20,
    "q_lora_rank": 28,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_routed_experts": 4,
}
_LINEAR = {
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_APPENDED = {
    "enorm": "model.layers.{layer}.enorm",
    "hnorm": "model.layers.{layer}.hnorm",
    "eh_proj": "model.layers.{layer}.eh_proj",
    "norm": "model.layers.{layer}.shared_head.norm",
    "block": "model.layers.{layer}",
    "embedding": "model.layers.{layer}.embed_tokens",
    "head": "model.layers.{layer}.shared_head.head",
}
_QWEN = {
    "enorm": "mtp.pre_fc_norm_embedding",
    "hnorm": "mtp.pre_fc_norm_hidden",
    "eh_proj": "mtp.fc",
    "norm": "mtp.norm",
    "block": "mtp.layers.{module}",
}


@dataclass(frozen=True)
class Released:
    """One family: a tiny trunk, the names of its MTP tensors, and what its modules compute.

    `hidden_first`, `trunk_post_norm`, `carry_post_norm` and `own_norm` are the conventions; `block` gives the config
    fields that build a module's block with the trunk's layer class; `declared` is written into config.json.
    """

    config: Callable[[], PreTrainedConfig]
    names: dict[str, str]
    hidden_first: bool = False
    trunk_post_norm: bool = True
    carry_post_norm: bool = True
    own_norm: bool = True
    block: dict[str, Any] = field(default_factory=dict)
    rename_in_block: dict[str, str] = field(default_factory=dict)
    declared: dict[str, Any] = field(default_factory=lambda: {"num_nextn_predict_layers": 1})
    num_modules: int = 1
    num_layers_in_block: int = 1
    is_recurrent: bool = False


FAMILIES = {
    "deepseek_v3": Released(
        lambda: DeepseekV3Config(**_LATENT, **_EXPERTS, first_k_dense_replace=1, n_group=2, topk_group=1),
        _APPENDED,
        block={"first_k_dense_replace": 0},
        num_modules=2,
        declared={"num_nextn_predict_layers": 2},
    ),
    "glm4_moe": Released(
        lambda: Glm4MoeConfig(**_HEADS, **_EXPERTS, n_routed_experts=4, first_k_dense_replace=1, use_qk_norm=True),
        _APPENDED,
        block={"first_k_dense_replace": 0},
    ),
    "glm4_moe_lite": Released(
        lambda: Glm4MoeLiteConfig(**_LATENT, **_EXPERTS), _APPENDED, block={"mlp_layer_types": ["sparse"]}
    ),
    "mimo": Released(
        lambda: Qwen2Config(**_COMMON),
        {
            "enorm": "model.mtp_layers.{module}.token_layernorm",
            "hnorm": "model.mtp_layers.{module}.hidden_layernorm",
            "eh_proj": "model.mtp_layers.{module}.input_proj",
            "norm": "model.mtp_layers.{module}.final_layernorm",
            "block": "model.mtp_layers.{module}",
        },
        hidden_first=True,
        trunk_post_norm=False,
        declared={"num_nextn_predict_layers": 1, "model_type": "mimo", "architectures": ["MiMoForCausalLM"]},
    ),
    "mimo_v2_flash": Released(
        lambda: MiMoV2FlashConfig(
            **_HEADS | {"num_key_value_heads": 1},
            **_EXPERTS,
            n_routed_experts=4,
            v_head_dim=10,
            sliding_window=5,
            layer_types=["full_attention", "sliding_attention", "full_attention"],
            mlp_layer_types=["dense", "sparse", "sparse"],
        ),
        {
            "enorm": "model.mtp.layers.{module}.enorm",
            "hnorm": "model.mtp.layers.{module}.hnorm",
            "eh_proj": "model.mtp.layers.{module}.eh_proj",
            "norm": "model.mtp.layers.{module}.final_layernorm",
            "block": "model.mtp.layers.{module}",
        },
        trunk_post_norm=False,
        carry_post_norm=False,
        block={"layer_types": ["sliding_attention"], "mlp_layer_types": ["dense"]},
        rename_in_block={
            "post_attention_layernorm": "pre_mlp_layernorm",
            "self_attn.sinks": "self_attn.attention_sink_bias",
        },
        declared={},
        num_modules=2,
    ),
    "qwen3_next": Released(
        lambda: Qwen3NextConfig(**_HEADS, **_EXPERTS, **_LINEAR, num_experts=4, shared_expert_intermediate_size=24),
        _QWEN,
        block={"layer_types": ["full_attention"]},
        declared={},
        is_recurrent=True,
    ),
    "qwen3_5_text": Released(
        lambda: Qwen3_5TextConfig(**_HEADS, **_LINEAR),
        _QWEN,
        block={"layer_types": ["full_attention"]},
        declared={"mtp_num_hidden_layers": 1},
        is_recurrent=True,
    ),
    "qwen3_5_moe_text": Released(
        lambda: Qwen3_5MoeTextConfig(
            **{key: value for key, value in _HEADS.items() if key != "intermediate_size"},
            **_EXPERTS,
            **_LINEAR,
            num_experts=4,
            shared_expert_intermediate_size=24,
        ),
        _QWEN,
        block={"layer_types": ["full_attention"]},
        declared={"mtp_num_hidden_layers": 1},
        is_recurrent=True,
    ),
    "ernie4_5_moe": Released(
        lambda: Ernie4_5_MoeConfig(
            **_COMMON,
            moe_intermediate_size=24,
            moe_k=2,
            moe_num_experts=4,
            moe_num_shared_experts=1,
            moe_layer_start_index=1,
        ),
        {
            "enorm": "model.mtp_emb_norm.{module}",
            "hnorm": "model.mtp_hidden_norm.{module}",
            "eh_proj": "model.mtp_linear_proj.{module}",
            "block": "model.mtp_block.{module}",
        },
        own_norm=False,
        block={"moe_layer_start_index": 99},
    ),
    "nemotron_h": Released(
        lambda: NemotronHConfig(
            **{key: value for key, value in _HEADS.items() if key != "num_hidden_layers"},
            layer_types=["linear_attention", "moe", "full_attention"],
            mamba_num_heads=4,
            mamba_head_dim=8,
            ssm_state_size=8,
            n_groups=1,
            moe_intermediate_size=24,
            moe_shared_expert_intermediate_size=24,
            n_routed_experts=4,
        ),
        {
            "enorm": "mtp.layers.0.enorm",
            "hnorm": "mtp.layers.0.hnorm",
            "eh_proj": "mtp.layers.0.eh_proj",
            "norm": "mtp.layers.1.final_layernorm",
            "block": "mtp.layers",
        },
        block={"layer_types": ["full_attention", "moe"]},
        num_layers_in_block=2,
        is_recurrent=True,
    ),
}


class Reference(nn.Module):
    """Trunk by transformers and MTP modules by hand: parts that nextn's own code has no share in."""

    def __init__(self, released: Released, seed: int = 7):
        super().__init__()
        torch.manual_seed(seed)
        self.released = released
        config = released.config()
        self.trunk = AutoModelForCausalLM.from_config(config).eval()
        block_config = copy.deepcopy(self.trunk.config)
        for name, value in released.block.items():
            setattr(block_config, name, value)
        decoder = self.trunk.model
        self.norm = decoder.norm_f if hasattr(decoder, "norm_f") else decoder.norm
        self.embed = self.trunk.get_input_embeddings()
        self.parts = nn.ModuleList()
        for _ in range(released.num_modules):
            parts = {name: copy.deepcopy(self.norm) for name in ("enorm", "hnorm", "norm")}
            parts["eh_proj"] = nn.Linear(2 * WIDTH, WIDTH, bias=False)
            layer_class = type(decoder.layers[-1])
            parts["block"] = nn.ModuleList(layer_class(block_config, i) for i in range(released.num_layers_in_block))
            self.parts.append(nn.ModuleDict(parts))
        self.block_kind = released.block.get("layer_types", ["full_attention"])[0]
        self.eval()
        randomise(self)

    @torch.no_grad()
    def logits(self, ids: Tensor) -> list[Tensor]:
        """Next-token logits [B, T, V], then those of depth k = 1.. at positions 0..T-1-k."""
        normed = self.trunk.model(ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        logits, state = [self.trunk.lm_head(normed)], normed
        if not self.released.trunk_post_norm:
            state = self._before_final_norm(ids)
        for depth, parts in enumerate(self.parts, start=1):
            length = ids.shape[1] - depth
            inputs = [parts["enorm"](self.embed(ids[:, depth:])), parts["hnorm"](state[:, :length])]
            joined = torch.cat(inputs[::-1] if self.released.hidden_first else inputs, dim=-1)
            out = self._block(parts["block"], parts["eh_proj"](joined))
            normed = (parts["norm"] if self.released.own_norm else self.norm)(out)
            logits.append(self.trunk.lm_head(normed))
            state = normed if self.released.carry_post_norm else out
        return logits

    def _before_final_norm(self, ids: Tensor) -> Tensor:
        seen = []
        hook = self.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        self.trunk.model(ids, attention_mask=torch.ones_like(ids))
        hook.remove()
        return seen[0]

    def _block(self, layers: nn.ModuleList, hidden: Tensor) -> Tensor:
        length = hidden.shape[1]
        positions = torch.arange(length)[None]
        by_kind = (self.block_kind,) if self.trunk.config.model_type == "mimo_v2_flash" else ()
        rotary = {}
        if self.trunk.config.model_type != "nemotron_h":
            rotary["position_embeddings"] = self.trunk.model.rotary_emb(hidden, positions, *by_kind)
        seen = torch.ones(length, length, dtype=torch.bool).tril()
        if self.block_kind == "sliding_attention":
            seen &= torch.ones(length, length, dtype=torch.bool).triu(1 - self.trunk.config.sliding_window)
        mask = torch.zeros(1, 1, length, length).masked_fill(~seen, torch.finfo(torch.float32).min)
        for layer in layers:
            hidden = layer(hidden, attention_mask=mask, position_ids=positions, **rotary)
        return hidden

    def save(self, folder: Path) -> Path:
        """Write the checkpoint as the family releases it: the trunk by transformers, the modules' names by hand."""
        self.trunk.save_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        for number, parts in enumerate(self.parts):
            places = {"module": number, "layer": LAYERS + number}
            for part, template in self.released.names.items():
                prefix = template.format(**places)
                if part == "embedding":
                    tensors[f"{prefix}.weight"] = self.embed.weight.detach().clone()
                elif part == "head":
                    tensors[f"{prefix}.weight"] = self.trunk.lm_head.weight.detach().clone()
                elif part == "block":
                    block = parts[part] if self.released.num_layers_in_block > 1 else parts[part][0]
                    tensors |= {f"{prefix}.{name}": t for name, t in _released_block(block, self.released)}
                else:
                    tensors |= {f"{prefix}.{name}": t for name, t in parts[part].state_dict().items()}
        save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
        config = json.loads((folder / "config.json").read_text()) | self.released.declared
        (folder / "config.json").write_text(json.dumps(config))
        return folder


def _released_block(block: nn.Module, released: Released) -> list[tuple[str, Tensor]]:
    named = []
    for name, tensor in block.state_dict().items():
        for ours, theirs in released.rename_in_block.items():
            name = name.replace(ours, theirs)
        if name.endswith("experts.gate_up_proj"):
            for index, matrix in enumerate(tensor):
                gate, up = matrix.chunk(2)
                named.append((name.replace("gate_up_proj", f"{index}.gate_proj.weight"), gate))
                named.append((name.replace("gate_up_proj", f"{index}.up_proj.weight"), up))
        elif name.endswith((".experts.up_proj", ".experts.down_proj")):
            kind = name.rpartition(".")[2]
            named += [(name.replace(kind, f"{i}.{kind}.weight"), matrix) for i, matrix in enumerate(tensor)]
        else:
            named.append((name, tensor))
    return named
