"""A trunk with multi-token prediction: one forward gives the logits and losses of every depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from nextn.alignment import PADDING_DOCUMENT, DepthAlignment, align_depths
from nextn.config import DetachConfig, ModelConfig, MTPConfig, ObjectiveConfig
from nextn.errors import ConfigError
from nextn.model import LayerContext, Transformer, Trunk
from nextn.model.balancing import ExpertUsage
from nextn.mtp.origin import Origin
from nextn.mtp.registry import check_scheme, scheme_class
from nextn.mtp.routing import NO_DETACH
from nextn.mtp.scheme import ContextFactory, Scheme
from nextn.objective import (
    BatchTotals,
    HeadInput,
    StepObjective,
    chunked_losses,
    depth_weights,
    label_counts,
    summed_cross_entropy,
    total_loss,
)

if TYPE_CHECKING:
    from nextn.data import Tokenizer


class TrunkStates(NamedTuple):
    """What the trunk computed at every position of some rows, [B, T, C] each, whoever ran it.

    Attributes:
        hidden: before its final norm.
        normed: after it.
    """

    hidden: Tensor
    normed: Tensor


@dataclass(frozen=True)
class MTPOutput:
    """What one forward computed.

    Attributes:
        loss: main + sum over k of weight_k * L_k + alpha * balance_loss, scalar in nats.
        loss_per_depth: L_0..L_K in nats, float32 [K+1], detached; NaN for a depth that was not computed.
        logits_per_depth: depth k's logits [B, T-k, V], one entry per computed depth, depth 0 first; None when the loss
            was computed in chunks, which never holds them.
        balance_loss: sequence-wise balance loss, mean over rows, summed over layers with experts, scalar; 0 in
            evaluation and where its factor is 0. Detached.
        expert_loads: tokens each expert received in this forward, int64 [E], by name of the layer; in training only.
    """

    loss: Tensor
    loss_per_depth: Tensor
    logits_per_depth: tuple[Tensor, ...] | None
    balance_loss: Tensor
    expert_loads: dict[str, Tensor]

    @property
    def logits(self) -> Tensor | None:
        """Next-token logits, [B, T, V]; None after a chunked loss."""
        return None if self.logits_per_depth is None else self.logits_per_depth[0]


class MTPModel(nn.Module):
    """Trunk and scheme. `scheme` is None iff K = 0, which is a plain language model.

    Args:
        config: settings of nextn's own trunk; None with another one.
        mtp_config: scheme and conventions.
        trunk: a `Trunk` that is a module; None: nextn's own, fresh.

    Raises ConfigError for an unknown scheme, or a setting that it does not read.
    """

    def __init__(self, config: ModelConfig | None, mtp_config: MTPConfig, trunk: Trunk | None = None):
        super().__init__()
        check_scheme(mtp_config)
        self._config, self.mtp_config = config, mtp_config
        self.trunk: Trunk = Transformer(self.config) if trunk is None else trunk
        self.scheme: Scheme | None = None
        if mtp_config.num_depths:
            self.scheme = scheme_class(mtp_config)(self.trunk, mtp_config)
        self.tokenizer: Tokenizer | None = None
        self.origin = Origin()
        """What stood beside the weights in the folder that the model was read from."""
        self.adapter: Mapping[str, Any] | None = None
        """PEFT's settings of the LoRA factors in the trunk; None without any."""

    def initialize(self, seed: int) -> MTPModel:
        """Fresh weights, the same for the same seed on every device; the trunk's do not depend on K."""
        generator = torch.Generator().manual_seed(seed)
        self.trunk.initialize(cast(nn.Module, self.trunk), generator)
        if self.scheme is not None:
            self.trunk.initialize(self.scheme, generator)
        return self

    def initialize_modules(self, seed: int) -> MTPModel:
        """Fresh weights for the MTP modules alone, the same for the same seed; the trunk is not touched."""
        if self.scheme is not None:
            self.trunk.initialize(self.scheme, torch.Generator().manual_seed(seed))
        return self

    @property
    def config(self) -> ModelConfig:
        """Settings of nextn's own trunk. Raises ConfigError for another one, which they cannot describe."""
        if self._config is None:
            raise ConfigError(
                "this model's trunk is not nextn's own DeepSeek-V3, and nextn's settings cannot describe it"
            )
        return self._config

    @property
    def num_depths(self) -> int:
        """K, extra tokens predicted in training."""
        return self.mtp_config.num_depths

    def with_modules(self, mtp_config: MTPConfig) -> MTPModel:
        """A model on the same trunk with other MTP modules, which nobody has initialised yet."""
        model = MTPModel(self._config, mtp_config, self.trunk)
        model.tokenizer, model.origin, model.adapter = self.tokenizer, self.origin, self.adapter
        return model

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        document_ids: Tensor | None = None,
        *,
        label_weights: Tensor | None = None,
        objective: StepObjective | None = None,
        totals: BatchTotals | None = None,
        alignment: Sequence[DepthAlignment] | None = None,
        states: TrunkStates | None = None,
    ) -> MTPOutput:
        """Losses of depths 0..K, and their logits unless the objective works in chunks.

        In training mode only depths with a weight are computed, and those that they build on, so that weight 0 costs
        nothing and changes nothing; in evaluation mode every depth is computed.

        Args:
            input_ids: int64 [B, T].
            labels: int64 [B, T], unshifted, `-100` not counted; None: `input_ids` themselves.
            document_ids: int64 [B, T], documents packed into a row; `-1` is padding.
            label_weights: importance of each token as a label of depths 1..K, float32 [B, T], unshifted; None: equal.
            objective: weights of the depths and more; None: lambda = 0.3 averaged over depths, logits kept.
            totals: what losses are divided by; None: taken from this batch. Pass those of the whole global batch when
                this is one of its micro-batches.
            alignment: depths 0..K of these tokens, labels and documents, where somebody has it already; None: computed.
            states: of the trunk on these tokens, where somebody else's forward computed them; None: the trunk runs.
        """
        if objective is None:
            objective = StepObjective(depth_weights(ObjectiveConfig(), self.num_depths))
        weights = objective.depth_weights
        if len(weights) != self.num_depths:
            raise ValueError(f"depth_weights has {len(weights)} values, the model has {self.num_depths} depths")
        if alignment is None:
            alignment = align_depths(input_ids, self.num_depths, labels, document_ids)
        if totals is None:
            counts = label_counts(alignment, label_weights)
            totals = BatchTotals.of_counts(objective.denominator, counts, input_ids.shape[0])
        depths = list(range(1, self.num_depths + 1))
        trained = [0] if self.training else []
        if self.training and self.scheme is not None:
            wanted = [depth for depth in depths if weights[depth - 1]]
            depths = self.scheme.required_depths(wanted)
            trained += self.scheme.trained_depths(wanted, objective.detach)

        usages: list[ExpertUsage] = []

        def new_context(depth: int, num_positions: int, documents: Tensor | None) -> LayerContext:
            usage = None
            if depth in trained:
                mask = None if documents is None else documents != PADDING_DOCUMENT
                usages.append(usage := ExpertUsage(mask, objective.balance_alpha > 0))
            return self.trunk.context(num_positions, documents, usage)

        aligned = [alignment[depth] for depth in (0, *depths)]
        inputs = self.aligned_head_inputs(aligned, document_ids, objective.detach, new_context, states)
        denominators = totals.denominators[[0, *depths]]
        loss, losses, logits = _losses(
            inputs, aligned, label_weights, denominators, (1.0, *(weights[depth - 1] for depth in depths)), objective
        )
        balance = torch.zeros((), device=loss.device)
        if balances := [balance for usage in usages for balance in usage.balances.values()]:
            balance = torch.stack(balances).sum() / totals.num_rows
            loss = loss + objective.balance_alpha * balance
        loss_per_depth = losses.new_full((self.num_depths + 1,), float("nan"))
        loss_per_depth[[0, *depths]] = losses
        return MTPOutput(loss, loss_per_depth, logits, balance.detach(), self._loads(usages))

    def head_inputs(
        self, input_ids: Tensor, document_ids: Tensor | None = None, depths: Sequence[int] | None = None
    ) -> list[HeadInput]:
        """What the output heads of depth 0 and of `depths` (None: 1..K) read, and the heads; others as of `forward`."""
        alignment = align_depths(input_ids, self.num_depths, document_ids=document_ids)
        depths = range(1, self.num_depths + 1) if depths is None else depths
        return self.aligned_head_inputs([alignment[depth] for depth in (0, *depths)], document_ids)

    def aligned_head_inputs(
        self,
        aligned: Sequence[DepthAlignment],
        document_ids: Tensor | None = None,
        detach: DetachConfig = NO_DETACH,
        new_context: ContextFactory | None = None,
        states: TrunkStates | None = None,
    ) -> list[HeadInput]:
        """The same for depths that are aligned, depth 0 first; arguments as of `forward` and `Scheme.forward`."""
        trunk = self.trunk
        if states is None:
            main = aligned[0]
            context = (
                trunk.context(main.num_positions, document_ids)
                if new_context is None
                else new_context(0, main.num_positions, document_ids)
            )
            hidden = trunk.hidden_states(main.embedded_ids, context)
            states = TrunkStates(hidden, trunk.final_norm(hidden))
        hidden, normed = states
        inputs = [HeadInput(normed, trunk.output_head.weight, trunk.output_head.bias)]
        if self.scheme is None or len(aligned) == 1:
            return inputs
        heads_read = self.scheme(trunk, hidden, normed, aligned[1:], document_ids, detach, new_context)
        constant = [parameter.detach() for parameter in trunk.output_head.parameters()] if detach.head else None
        for one, state in zip(aligned[1:], heads_read, strict=True):
            head = self.scheme.head(trunk, one.depth)
            if constant and head is trunk.output_head:
                inputs.append(HeadInput(state, *constant))
            else:
                inputs.append(HeadInput(state, head.weight, head.bias))
        return inputs

    def _loads(self, usages: list[ExpertUsage]) -> dict[str, Tensor]:
        """Loads of all contexts together: a module used at several depths has one."""
        names = {module: name for name, module in self.named_modules()} if usages else {}
        loads: dict[str, Tensor] = {}
        for usage in usages:
            for layer, load in usage.loads.items():
                name = names[layer]
                loads[name] = loads[name] + load if name in loads else load
        return loads

    def compile_layers(self) -> None:
        """Compile every transformer layer in place; layers of one kind share one compilation."""
        for layer in self._layers():
            layer.compile()

    def recompute_layers(self) -> None:
        """From now on keep only each layer's input for the backward pass, and compute the layer again there."""
        for layer in self._layers():
            layer.recompute = True  # type: ignore[assignment]

    def _layers(self) -> list[nn.Module]:
        """The trunk's layers, and those of the same classes that MTP blocks are made of."""
        own = list(self.trunk.layers)
        classes = tuple({type(layer) for layer in own})
        modules = [] if self.scheme is None else [m for m in self.scheme.modules() if isinstance(m, classes)]
        return own + modules


def _losses(
    inputs: list[HeadInput],
    aligned: list[DepthAlignment],
    label_weights: Tensor | None,
    denominators: Tensor,
    weights_in_total: tuple[float, ...],
    objective: StepObjective,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...] | None]:
    """Total, losses of the computed depths (detached), and the logits if they were held; lists begin with depth 0."""
    weights = [None] + [
        None if label_weights is None else depth_alignment.at_labels(label_weights) for depth_alignment in aligned[1:]
    ]
    if objective.chunk_size is not None:
        coefficients = [
            (depth_alignment.valid.float() if weight is None else weight) / denominator
            for depth_alignment, weight, denominator in zip(aligned, weights, denominators, strict=True)
        ]
        total, losses = chunked_losses(
            inputs,
            [depth_alignment.labels for depth_alignment in aligned],
            coefficients,
            weights_in_total,
            objective.chunk_size,
        )
        return total, losses, None
    logits = [head_input.logits() for head_input in inputs]
    depth_losses = [
        summed_cross_entropy(depth_logits, depth_alignment.labels, weight) / denominator
        for depth_logits, depth_alignment, weight, denominator in zip(
            logits, aligned, weights, denominators, strict=True
        )
    ]
    total = total_loss(depth_losses[0], depth_losses[1:], weights_in_total[1:])
    return total, torch.stack([loss.detach() for loss in depth_losses]), tuple(logits)
