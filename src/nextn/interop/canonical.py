"""Rewrite a model in the conventions of the released weights, the one form for all engines.

The rewritten model computes the same function.

Some conventions concern the layout alone. They are rewritten without loss:

    concat = hidden_first       the two halves of eh_proj's columns change places
    head_norm = shared          each module gets a copy of the trunk's final norm
    rope_interleave = false     rotary rows (a0 a1 .. b0 b1 ..) become pairs (a0 b0 a1 b1 ..)
    tie_word_embeddings         the head is written out, since vLLM reads one of its own in any case
    no experts                  first_k_dense_replace says that every layer is dense, where engines look

Others (`trunk_hidden`, `carry`, `dense_blocks`, the scheme) are behaviour: they stay, and an engine that computes
something else refuses (`nextn.interop.engines`).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from nextn.config import ModelConfig, MTPConfig
from nextn.mtp import MTPModel


def canonical_config(config: ModelConfig, mtp_config: MTPConfig) -> tuple[ModelConfig, MTPConfig]:
    """The settings of the rewritten model.

    A single module never hands its state on in training, so its `carry` is free: it becomes what engines recycle.
    """
    num_dense = config.first_k_dense_replace if config.has_experts else config.num_hidden_layers
    config = dataclasses.replace(
        config, rope_interleave=True, tie_word_embeddings=False, first_k_dense_replace=num_dense
    )
    if mtp_config.scheme != "sequential":
        return config, mtp_config
    changes = {"concat": "embed_first", "head_norm": "own"}
    if mtp_config.num_depths == 1:
        changes["carry"] = "post_norm"
    return config, dataclasses.replace(mtp_config, **changes)  # type: ignore[arg-type]


@torch.no_grad()
def canonical(model: MTPModel) -> MTPModel:
    """The same model with the layout of the released weights; itself if it has that already. Tokenizer included."""
    config, mtp_config = canonical_config(model.config, model.mtp_config)
    if (config, mtp_config) == (model.config, model.mtp_config):
        return model
    state = dict(model.state_dict())
    is_sequential = mtp_config.scheme == "sequential"
    for name, tensor in state.items():
        if is_sequential and name.endswith(".eh_proj.weight") and model.mtp_config.concat == "hidden_first":
            state[name] = torch.cat(tensor.chunk(2, dim=1)[::-1], dim=1)
        elif not model.config.rope_interleave:
            state[name] = _interleaved(name, tensor, config)
    rewritten = MTPModel(config, mtp_config).to(next(model.parameters()).dtype)
    for buffer_name, buffer in model.named_buffers():  # routing biases stay float32
        if buffer_name in rewritten.state_dict():
            rewritten.get_buffer(buffer_name).data = buffer.detach().clone()
    for name in rewritten.state_dict().keys() - state.keys():  # a norm that had been the trunk's
        assert name.endswith("shared_head.norm.weight"), name
        state[name] = state["trunk.model.norm.weight"]
    rewritten.load_state_dict(state)
    rewritten.tokenizer, rewritten.origin = model.tokenizer, model.origin
    return rewritten.train(model.training)


def _interleaved(name: str, weight: Tensor, config: ModelConfig) -> Tensor:
    """Rows of a query or key projection with rotary halves as rows with rotary pairs; others as they are."""
    rotary = config.qk_rope_head_dim
    if name.endswith(("self_attn.q_proj.weight", "self_attn.q_b_proj.weight")):
        heads = weight.unflatten(0, (config.num_attention_heads, config.qk_head_dim))
        plain, rotated = heads.split((config.qk_nope_head_dim, rotary), dim=1)
        return torch.cat((plain, _pairs(rotated, 1)), dim=1).flatten(0, 1)
    if name.endswith(("self_attn.kv_a_proj_with_mqa.weight", "self_attn.kv_a_proj_with_mqa.bias")):
        latent, rotated = weight.split((config.kv_lora_rank, rotary), dim=0)
        return torch.cat((latent, _pairs(rotated, 0)), dim=0)
    return weight


def _pairs(rotated: Tensor, dim: int) -> Tensor:
    """(a0 a1 .. b0 b1 ..) -> (a0 b0 a1 b1 ..) along `dim`.

    >>> _pairs(torch.tensor([0, 1, 2, 10, 11, 12]), 0).tolist()
    [0, 10, 1, 11, 2, 12]
    """
    first, second = rotated.chunk(2, dim=dim)
    return torch.stack((first, second), dim=dim + 1).flatten(dim, dim + 1)
