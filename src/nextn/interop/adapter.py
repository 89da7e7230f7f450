"""A transformers causal language model as a `Trunk`: its own decoder layers, run one by one.

The layers stay what they are (`nextn.interop.layers`); the adapter hands them the rotary factors and masks that the
model's own forward would.

A family that computes more than its layers, final norm and head is refused: by its settings (caps, scales, rotary
factors that change), and where a new trunk differs from the model's own forward on a few tokens by more than rounding.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nextn.errors import ConfigError
from nextn.interop.families import family_of
from nextn.interop.hf_layout import TransformersLayout
from nextn.interop.layer_cost import layer_flops, num_unchosen
from nextn.interop.layers import (
    ATTENTION,
    RECURRENT,
    KeyValueSlots,
    TransformersBlock,
    TransformersContext,
    additive,
    check_settings,
    has_experts,
    layer_kinds,
    run_layer,
)
from nextn.model import Cache, LayerCache
from nextn.model.balancing import ExpertUsage
from nextn.model.context import cached_mask, document_mask

FINAL_NORMS = ("norm", "norm_f", "final_layernorm")


class TransformersTrunk(nn.Module):
    """Any transformers causal language model that is a stack of decoder layers, a final norm and a linear head.

    Layers that are recurrent (linear attention) carry a state that overwriting cannot roll back. While decoding such a
    layer is computed again over the row's whole prefix: the same numbers, at a cost that grows with the prefix.

    Args:
        model: from `AutoModelForCausalLM`, with weights.
        block_settings: fields of the model's config that differ for `new_block`; a list is for the block's layers,
            `layer_types` says how many. None: one, like the trunk's last layer that attends.
        layout: how the model lies in a folder; None: as its family does.

    Raises:
        ConfigError: the model has no such parts, a kind of layer or a setting that nextn cannot run, or computes
            something else with the parts than the adapter does.
    """

    def __init__(
        self,
        model: nn.Module,
        block_settings: Mapping[str, Any] | None = None,
        layout: TransformersLayout | None = None,
    ):
        super().__init__()
        self.model = model
        self.layout = layout or TransformersLayout(family_of(model.config.to_dict()))  # type: ignore[operator, union-attr]
        self.name = type(model).__name__
        self._norm_name = _check_parts(model)
        self.config = self._decoder.config
        check_settings(self.name, model.config, self.config)
        self._block_settings = dict(block_settings or {})
        self.hidden_size, self.vocab_size = self._head.in_features, self._head.out_features
        self.num_layers = len(self._decoder.layers)
        self.max_position_embeddings = int(getattr(self.config, "max_position_embeddings", 0)) or 2**31 - 1
        self._kinds = layer_kinds(self.config, self.num_layers, self.name)
        self._block_kinds = self._block_settings.get("layer_types") or [self._kinds[self._last_attending()]]
        self._rotary_by_kind = _takes_layer_type(getattr(self._decoder, "rotary_emb", None))
        self._widths = self._examine()

    @property
    def _decoder(self) -> Any:  # a property, so that its weights have one name
        return self.model.get_decoder()  # type: ignore[operator]

    @property
    def _head(self) -> nn.Linear:
        return self.model.get_output_embeddings()  # type: ignore[operator]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._head.weight.device

    @property
    def final_norm(self) -> nn.Module:
        """The norm before the output head, [..., C] -> [..., C]."""
        return getattr(self._decoder, self._norm_name)

    @property
    def output_head(self) -> nn.Linear:
        """Logits of normed states, [..., C] -> [..., V]."""
        return self._head

    @property
    def layers(self) -> list[nn.Module]:
        """The model's own decoder layers."""
        return list(self._decoder.layers)

    def block_flops(self, block: nn.Module, sequence_length: int) -> float:
        """Forward FLOPs per token of a layer or of a block of them; see `nextn.interop.layer_cost`."""
        return sum(layer_flops(layer, kind, self.config, sequence_length) for layer, kind in self._parts(block))

    def num_unchosen_parameters(self, block: nn.Module) -> int:
        """Weights of routed experts that a token does not choose."""
        return sum(num_unchosen(layer, self.config) for layer, _ in self._parts(block))

    def _parts(self, block: nn.Module) -> list[tuple[nn.Module, str]]:
        """The layers of a block, or a layer of the model's own, each with what it remembers."""
        if isinstance(block, TransformersBlock):
            return list(zip(block.layers, block.kinds, strict=True))
        return [(layer, kind) for layer, kind in zip(self.layers, self._kinds, strict=True) if layer is block]

    def embed(self, token_ids: Tensor) -> Tensor:
        """int64 [B, M] -> [B, M, C]."""
        return self.model.get_input_embeddings()(token_ids)  # type: ignore[operator]

    def context(
        self, num_positions: int, document_ids: Tensor | None = None, usage: ExpertUsage | None = None
    ) -> TransformersContext:
        """For whole rows of M positions; `usage` stays empty, since the model's experts do not report.

        Raises ConfigError for several documents in a row where a layer is recurrent: its state would leak.
        """
        if document_ids is not None and RECURRENT & set(self._kinds) and (document_ids != document_ids[:, :1]).any():
            raise ConfigError(
                f"{self.name} has recurrent layers, whose state passes from one packed document to the next; "
                "give it one document per row"
            )
        positions = torch.arange(num_positions, device=self.device)[None]
        visible = None if document_ids is None else document_mask(document_ids)
        return self._context(positions, positions[:, None, :], visible, None, None)

    def cached_context(self, positions: Tensor, num_keys: int | None = None) -> TransformersContext:
        """For positions int64 [B, M] after cached ones; `num_keys` = largest position + 1, if known."""
        num_keys = int(positions.max()) + 1 if num_keys is None else num_keys
        slots = torch.arange(num_keys, device=positions.device)[None, None]
        return self._context(positions, slots, cached_mask(positions, num_keys), positions, num_keys)

    def hidden_states(
        self, token_ids: Tensor, context: TransformersContext | None = None, cache: Cache | None = None
    ) -> Tensor:
        """State after the last layer, before the final norm: int64 [B, M] -> [B, M, C]; no context: whole rows."""
        context = self.context(token_ids.shape[1]) if context is None else context
        hidden = self.embed(token_ids)
        for index, (layer, kind) in enumerate(zip(self._decoder.layers, self._kinds, strict=True)):
            layer_cache = None if cache is None else cache.layers[index]
            if layer_cache is not None and kind in RECURRENT:
                hidden = self._rerun(layer, kind, hidden, context, layer_cache)
            else:
                remembers = layer_cache is not None and kind in ATTENTION
                hidden = run_layer(
                    layer, kind, hidden, context, KeyValueSlots(layer_cache, context) if remembers else None
                )
        return hidden

    def forward(self, token_ids: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Next-token logits: int64 [B, T] -> [B, T, V]."""
        hidden = self.hidden_states(token_ids, self.context(token_ids.shape[1], document_ids))
        return self.output_head(self.final_norm(hidden))

    def new_cache(self, num_rows: int, capacity: int, num_layers: int | None = None) -> Cache:
        """An empty cache for `num_layers` blocks (None: the trunk's own layers)."""
        if num_layers is None:
            widths = self._widths
            if RECURRENT & set(self._kinds):
                warnings.warn(
                    f"{self.name} has recurrent layers, which nextn computes again over the whole row for every "
                    "forward while decoding: the text is right, the speed says nothing about this model",
                    stacklevel=2,
                )
        else:
            by_kind = dict(zip(self._kinds, self._widths, strict=True))
            kinds = [kind for kind in self._block_kinds if kind in ATTENTION]
            if absent := [kind for kind in kinds if kind not in by_kind]:
                raise ConfigError(f"{self.name} has no {absent[0]} layer, so nextn cannot tell what one remembers")
            widths = [sum(by_kind[kind] for kind in kinds)] * num_layers
        dtype = self._head.weight.dtype
        shapes = ((num_rows, capacity, width) for width in widths)
        return Cache(tuple(LayerCache(torch.zeros(shape, dtype=dtype, device=self.device)) for shape in shapes))

    def new_block(self, dense: bool = False) -> TransformersBlock:
        """Fresh layers of the model's own class; see `block_settings`.

        Raises ConfigError for a dense one where the family has none.
        """
        config = copy.deepcopy(self.config)
        for name, value in self._block_settings.items():
            setattr(config, name, value)
        first = 0 if self._block_settings else self._last_attending(dense)
        layer_class = type(self._decoder.layers[-1])
        layers = [layer_class(config, first + number) for number in range(len(self._block_kinds))]
        if dense and any(has_experts(layer) for layer in layers):
            raise ConfigError(f"{self.name} has no layer with a dense feed-forward to build an MTP block from")
        return TransformersBlock(layers, self._block_kinds)

    def new_norm(self) -> nn.Module:
        """A fresh norm like the final one."""
        norm = copy.deepcopy(self.final_norm)
        _forget_loading(norm)
        self.model._init_weights(norm)  # type: ignore[operator]
        return norm

    @torch.no_grad()
    def initialize(self, module: nn.Module, generator: torch.Generator) -> None:
        """Fresh weights by the model's own rules, for this trunk itself or a module built with `new_block`."""
        seed = int(torch.randint(2**62, (), generator=generator))
        _forget_loading(module)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for child in module.modules():
                self.model._init_weights(child)  # type: ignore[operator]

    def _context(
        self,
        positions: Tensor,
        keys: Tensor,
        visible: Tensor | None,
        slots: Tensor | None,
        num_keys: int | None,
    ) -> TransformersContext:
        """`visible` bool [B or 1, 1, M, S], None: every earlier key; `keys` are the keys' positions, [1, 1, S]."""
        weight = self._head.weight
        masks: dict[str, Tensor | None] = {}
        for kind in {*self._kinds, *self._block_kinds} & ATTENTION:
            allowed = visible
            window = self.config.sliding_window if kind == "sliding_attention" else None
            if allowed is None and (window is not None or self.config._attn_implementation != "sdpa"):
                allowed = (keys <= positions[..., None])[:, None]
            if window is not None:
                allowed = allowed & (keys > positions[..., None] - window)[:, None]
            masks[kind] = None if allowed is None else additive(allowed, weight.dtype)
        rotary_emb = getattr(self._decoder, "rotary_emb", None)
        rotary: dict[str, tuple[Tensor, Tensor]] = {}
        if rotary_emb is not None:
            like = weight.new_empty(0)
            if self._rotary_by_kind:
                rotary = {kind: rotary_emb(like, positions, kind) for kind in masks}
            else:
                rotary = dict.fromkeys({*self._kinds, *self._block_kinds}, rotary_emb(like, positions))
        return TransformersContext(positions, rotary, masks, slots, num_keys)

    def _rerun(
        self, layer: nn.Module, kind: str, hidden: Tensor, context: TransformersContext, layer_cache: LayerCache
    ) -> Tensor:
        """A recurrent layer over slots 0..num_keys-1, which hold its inputs; its outputs at the context's positions.

        Slots behind a row's own position are stale, and no output that is taken has seen them.
        """
        assert context.positions is not None, "a cache needs positions"
        assert context.num_keys is not None, "a cache needs the number of keys"
        layer_cache.write(context.positions, hidden)
        outputs = run_layer(
            layer, kind, layer_cache.read(context.num_keys).to(hidden.dtype), self.context(context.num_keys), None
        )
        return outputs.gather(1, context.positions[..., None].expand_as(hidden))

    def _last_attending(self, dense: bool = False) -> int:
        """The last layer that attends, if `dense` the last of those with a dense feed-forward, where there is one."""
        attending = [index for index, kind in enumerate(self._kinds) if kind in ATTENTION]
        plain = [index for index in attending if not has_experts(self._decoder.layers[index])]
        return (plain or attending)[-1] if dense else attending[-1]

    @torch.no_grad()
    def _examine(self) -> list[int]:
        """What each layer remembers of a token (numbers). Raises ConfigError if the parts do not make up the model."""
        was_training = self.model.training
        self.model.eval()
        ids = torch.arange(8, device=self.device)[None] % self.vocab_size
        theirs = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float()
        context, hidden, widths = self.context(ids.shape[1]), self.embed(ids), []
        for layer, kind in zip(self._decoder.layers, self._kinds, strict=True):
            memory = KeyValueSlots(None, context) if kind in ATTENTION else None
            hidden = run_layer(layer, kind, hidden, context, memory)
            widths.append(memory.width if memory else self.hidden_size if kind in RECURRENT else 0)
        ours = self.output_head(self.final_norm(hidden)).float()
        self.model.train(was_training)
        tolerance = 1e-3 if self._head.weight.dtype in (torch.float32, torch.float64) else 5e-2
        difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        if not difference <= tolerance:
            raise ConfigError(
                f"{self.name} computes more than its layers, final norm and head (logits differ by {difference:.1e} of "
                "the largest): nextn has no trunk for this family"
            )
        return widths


def _check_parts(model: nn.Module) -> str:
    """The name of the final norm, which families differ in. Raises ConfigError for a model without the parts."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()  # type: ignore[operator]
    norm = next((name for name in FINAL_NORMS if isinstance(getattr(decoder, name, None), nn.Module)), None)
    missing = [
        what
        for what, found in (
            ("`layers`", isinstance(getattr(decoder, "layers", None), nn.ModuleList)),
            ("final norm", norm is not None),
            ("linear output head", isinstance(head, nn.Linear)),
        )
        if not found
    ]
    if norm is None or missing:
        raise ConfigError(
            f"{type(model).__name__} has no {' and no '.join(missing)}: nextn has no trunk for this family"
        )
    return norm


def _takes_layer_type(rotary_emb: nn.Module | None) -> bool:
    """Rotary factors differ between kinds of layers."""
    return rotary_emb is not None and "layer_type" in inspect.signature(rotary_emb.forward).parameters


def _forget_loading(module: nn.Module) -> None:
    """Take off the marks by which transformers keeps loaded weights from being initialised again."""
    for tensor in (*module.parameters(), *module.buffers()):
        if hasattr(tensor, "_is_hf_initialized"):
            del tensor._is_hf_initialized
