"""Run decoder layers of transformers' models one at a time: their context, their cache, and settings that are refused.

The layers are the model's own. While decoding they get an object with the one method of a transformers cache that
attention calls, over a `LayerCache` with the semantics of `nextn.model.cache`: preallocated, written at positions,
rolled back by overwriting, rows at different positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nextn.errors import ConfigError
from nextn.model import LayerCache

ATTENTION = frozenset({"full_attention", "sliding_attention"})
RECURRENT = frozenset({"linear_attention"})
WITHOUT_MEMORY = frozenset({"moe", "mlp"})
"""Kinds of layers by transformers' `layer_types`: what a layer remembers of earlier positions."""

CAPS = ("final_logit_softcapping", "attn_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
SCALES = (
    *("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier", "logits_mup_width_multiplier"),
    *("embedding_multiplier", "mup_enabled"),
)
"""Settings of transformers' configs that change logits or embeddings: caps unless None, scales unless None, 1, False.

Small logits pass through a cap unchanged, within any tolerance, so running the model cannot rule one out.
"""


@dataclass(frozen=True)
class TransformersContext:
    """The context that all layers of one forward share; built by `TransformersTrunk.context` and `cached_context`.

    Attributes:
        position_ids: of the queries, int64 [B or 1, M].
        rotary: cos and sin as the model computes them, by kind of layer; empty without rotary positions.
        masks: added to attention's scores, [B or 1, 1, M, S] in the model's dtype, by kind of layer; None: causal.
        positions: cache slots to write, int64 [B, M]; None without a cache.
        num_keys: slots 0..num_keys-1 are attended to (S); None without a cache.
    """

    position_ids: Tensor
    rotary: Mapping[str, tuple[Tensor, Tensor]]
    masks: Mapping[str, Tensor | None]
    positions: Tensor | None = None
    num_keys: int | None = None


class KeyValueSlots:
    """One layer's `LayerCache` in the shape of a transformers cache: keys and values side by side in every slot.

    Several attentions, of one layer or of a block's layers, use the slot's columns in the order in which they ask.
    """

    def __init__(self, layer_cache: LayerCache | None, context: TransformersContext):
        self._cache, self._context = layer_cache, context
        self.width = 0
        """Columns used so far."""

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store [B, H, M, D] of this forward; give back those of slots 0..num_keys-1. Without a cache only count."""
        start, middle = self.width, self.width + key.shape[1] * key.shape[3]
        self.width = middle + value.shape[1] * value.shape[3]
        if self._cache is None:
            return key, value
        context = self._context
        assert context.positions is not None, "a cache needs positions"
        assert context.num_keys is not None, "a cache needs the number of keys"
        slots = LayerCache(self._cache.latent[..., start : self.width])
        slots.write(context.positions, torch.cat([part.transpose(1, 2).flatten(2) for part in (key, value)], dim=-1))
        stored = slots.read(context.num_keys).to(key.dtype).split((middle - start, self.width - middle), dim=-1)
        return (
            stored[0].unflatten(-1, (key.shape[1], key.shape[3])).transpose(1, 2),
            stored[1].unflatten(-1, (value.shape[1], value.shape[3])).transpose(1, 2),
        )


def run_layer(
    layer: nn.Module,
    kind: str,
    hidden: Tensor,
    context: TransformersContext,
    memory: KeyValueSlots | None,
) -> Tensor:
    """One of the model's decoder layers, [B, M, C] -> [B, M, C].

    A layer marked with `recompute` keeps only its input for the backward pass, and is computed again there.
    """
    if getattr(layer, "recompute", False) and memory is None and torch.is_grad_enabled():
        return checkpoint(_run, layer, kind, hidden, context, None, use_reentrant=False)
    return _run(layer, kind, hidden, context, memory)


def _run(
    layer: nn.Module, kind: str, hidden: Tensor, context: TransformersContext, memory: KeyValueSlots | None
) -> Tensor:
    rotary = {"position_embeddings": context.rotary[kind]} if kind in context.rotary else {}
    out = layer(
        hidden,
        attention_mask=context.masks.get(kind),
        position_ids=context.position_ids,
        past_key_values=memory,
        use_cache=memory is not None,
        **rotary,
    )
    return out[0] if isinstance(out, tuple) else out


class TransformersBlock(nn.Module):
    """Fresh decoder layers, mostly one, as the block of an MTP module. Weights lie under `layers.0.`, ..."""

    def __init__(self, layers: Sequence[nn.Module], kinds: Sequence[str]):
        super().__init__()
        self.layers, self.kinds = nn.ModuleList(layers), tuple(kinds)

    def forward(self, hidden: Tensor, context: TransformersContext, cache: LayerCache | None = None) -> Tensor:
        """[B, M, C] -> [B, M, C]; with a cache, this forward's keys and values are written to it first."""
        memory = None if cache is None else KeyValueSlots(cache, context)
        for layer, kind in zip(self.layers, self.kinds, strict=True):
            hidden = run_layer(layer, kind, hidden, context, memory if kind in ATTENTION else None)
        return hidden


def layer_kinds(config: Any, num_layers: int, name: str) -> list[str]:
    """Each layer's kind of memory, from the config. Raises ConfigError for a kind nextn does not know."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"]
        kinds = kinds * num_layers
    if unknown := sorted(set(kinds) - ATTENTION - RECURRENT - WITHOUT_MEMORY):
        raise ConfigError(f"{name} has layers of kind {', '.join(unknown)}, which nextn does not know")
    if not ATTENTION & set(kinds):
        raise ConfigError(f"{name} has no attention layer; nextn's MTP blocks are built like one")
    return list(kinds)


def check_settings(name: str, *configs: Any) -> None:
    """Refuse what comparing a few tokens need not show: caps, scales, rotary factors that change with the length.

    Args:
        name: the model's, for the message.
        configs: its own, and its language model's.

    Raises:
        ConfigError: such a setting, named with its value.
    """
    for config in configs:
        for key in (*CAPS, *SCALES):
            value = getattr(config, key, None)
            if value is not None and (key in CAPS or value not in (1, False)):
                raise ConfigError(
                    f"{name} sets {key} = {value!r}, and nextn neither caps nor scales logits and embeddings: it has "
                    "no trunk for this model"
                )
        rope = getattr(config, "rope_parameters", None) or {}
        nested = (part for part in rope.values() if isinstance(part, Mapping))  # one per kind of layer
        for part in (rope, *nested):
            _check_rotary(name, part, getattr(config, "max_position_embeddings", math.inf))


def _check_rotary(name: str, parameters: Mapping[str, Any], longest: float) -> None:
    """Raise ConfigError if rotary factors would change within `longest` positions."""
    kind = str(parameters.get("rope_type"))
    same = parameters.get("original_max_position_embeddings", 0) if kind == "longrope" else 0
    if "dynamic" in kind or (kind == "longrope" and longest > same):
        raise ConfigError(
            f"{name} has rope_type {kind!r}: once a text is long, the rotary factors of all its positions change and "
            "cached keys keep the old ones, so decoding would not be lossless"
            + (f". Up to max_position_embeddings = {same} they stay" if same else "")
        )


def has_experts(layer: nn.Module) -> bool:
    """The layer's feed-forward is a mixture of experts."""
    return any(name.endswith("experts") for name, _ in layer.named_modules())


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where attention may look, the dtype's lowest number elsewhere: what any attention of transformers takes."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, torch.finfo(dtype).min)
