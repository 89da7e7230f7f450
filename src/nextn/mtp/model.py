"""A trunk with multi-token prediction: one forward gives the logits and losses of every depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nextn.alignment import align, count_labels
from nextn.config import ModelConfig, MTPConfig, ObjectiveConfig
from nextn.model import Transformer, Trunk
from nextn.model.blocks import DecoderLayer
from nextn.mtp.scheme import Scheme
from nextn.mtp.sequential import Sequential
from nextn.objective import denominators as default_denominators
from nextn.objective import depth_weights as default_depth_weights
from nextn.objective import summed_cross_entropy, total_loss

if TYPE_CHECKING:
    from nextn.data import Tokenizer


SCHEMES: dict[str, Callable[[Trunk, MTPConfig], Scheme]] = {"sequential": Sequential}
"""Schemes by their name in `mtp.scheme`."""


@dataclass(frozen=True)
class MTPOutput:
    """What one forward computed.

    Attributes:
        loss: main + sum over k of weight_k * L_k, scalar in nats.
        loss_per_depth: L_0..L_K in nats, float32 [K+1], detached; NaN for a depth that was not computed.
        logits_per_depth: depth k's logits [B, T-k, V], one entry per computed depth, depth 0 first.
    """

    loss: Tensor
    loss_per_depth: Tensor
    logits_per_depth: tuple[Tensor, ...]

    @property
    def logits(self) -> Tensor:
        """Next-token logits, [B, T, V]."""
        return self.logits_per_depth[0]


class MTPModel(nn.Module):
    """Trunk and scheme. `scheme` is None iff K = 0, which is a plain language model."""

    def __init__(self, config: ModelConfig, mtp_config: MTPConfig):
        super().__init__()
        self.config, self.mtp_config = config, mtp_config
        self.trunk = Transformer(config)
        self.scheme: Scheme | None = None
        if mtp_config.num_depths:
            self.scheme = SCHEMES[mtp_config.scheme](self.trunk, mtp_config)
        self.tokenizer: Tokenizer | None = None

    def initialize(self, seed: int) -> MTPModel:
        """Fresh weights, the same for the same seed on every device; the trunk's do not depend on K."""
        generator = torch.Generator().manual_seed(seed)
        self.trunk.initialize(self.trunk, generator)
        if self.scheme is not None:
            self.trunk.initialize(self.scheme, generator)
        return self

    @property
    def num_depths(self) -> int:
        """K, extra tokens predicted in training."""
        return self.mtp_config.num_depths

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        document_ids: Tensor | None = None,
        depth_weights: Sequence[float] | None = None,
        denominators: Tensor | None = None,
    ) -> MTPOutput:
        """Logits and losses of depths 0..K.

        In training mode the chain stops at the deepest depth with a weight, so that weight 0 costs nothing and changes
        nothing; in evaluation mode every depth is computed.

        Args:
            input_ids: int64 [B, T].
            labels: int64 [B, T], unshifted, `-100` not counted; None: `input_ids` themselves.
            document_ids: int64 [B, T], documents packed into a row; `-1` is padding.
            depth_weights: K weights of L_1..L_K; None: 0.3 / K each.
            denominators: what each depth's summed loss is divided by, [K+1]; None: this batch's valid labels. Pass
                those of the whole global batch when this is one of its micro-batches.
        """
        weights = default_depth_weights(ObjectiveConfig(), self.num_depths) if depth_weights is None else depth_weights
        if len(weights) != self.num_depths:
            raise ValueError(f"depth_weights has {len(weights)} values, the model has {self.num_depths} depths")
        if denominators is None:
            counts = count_labels(input_ids, self.num_depths, labels, document_ids)
            denominators = default_denominators(ObjectiveConfig(), counts)
        num_computed = self.num_depths
        if self.training:
            num_computed = max((depth for depth, weight in enumerate(weights, start=1) if weight), default=0)

        hidden = self.trunk.hidden_states(input_ids, self.trunk.context(input_ids.shape[1], document_ids))
        logits = [self.trunk.output_head(self.trunk.final_norm(hidden))]
        if self.scheme is not None and num_computed:
            head_inputs = self.scheme(self.trunk, hidden, input_ids, document_ids, num_computed)
            logits += [self.scheme.logits(self.trunk, depth, x) for depth, x in enumerate(head_inputs, start=1)]

        losses = [
            summed_cross_entropy(depth_logits, align(input_ids, depth, labels, document_ids).labels)
            / denominators[depth]
            for depth, depth_logits in enumerate(logits)
        ]
        absent: list[Tensor | None] = [None] * (self.num_depths - num_computed)
        loss_per_depth = denominators.new_full((self.num_depths + 1,), float("nan"))
        loss_per_depth[: num_computed + 1] = torch.stack([loss.detach() for loss in losses])
        return MTPOutput(total_loss(losses[0], [*losses[1:], *absent], weights), loss_per_depth, tuple(logits))

    def compile_layers(self) -> None:
        """Compile every transformer layer in place; layers of one kind share one compilation."""
        modules = [self.trunk] if self.scheme is None else [self.trunk, self.scheme]
        for module in modules:
            for layer in module.modules():
                if isinstance(layer, DecoderLayer):
                    layer.compile()
