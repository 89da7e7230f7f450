"""What a model and its MTP depths cost: parameters, and floating-point operations of training."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from nextn.alignment import num_final_positions
from nextn.config import DetachConfig, ModelConfig, MTPConfig, ObjectiveConfig, Recipe
from nextn.errors import ConfigError
from nextn.model.flops import head_flops, trunk_flops
from nextn.mtp.model import MTPModel
from nextn.mtp.routing import NO_DETACH
from nextn.objective import Progress, depth_weights


@dataclass(frozen=True)
class ModelCost:
    """Sizes; a parameter shared by several modules counts once.

    Attributes:
        num_parameters: trunk and MTP modules.
        num_active_parameters: of the trunk, without the routed experts that a token does not choose.
        num_mtp_parameters: of the MTP modules' own weights; shared embedding and head are not among them.
        trunk_flops_per_token: forward pass of the trunk and its head, in floating-point operations.
        mtp_flops_per_token: forward pass of all trained depths and their heads.
    """

    num_parameters: int
    num_active_parameters: int
    num_mtp_parameters: int
    trunk_flops_per_token: float
    mtp_flops_per_token: float

    @property
    def mtp_flops_overhead(self) -> float:
        """Extra training cost of MTP, relative to the trunk alone: 0.25 is a quarter more per token."""
        return self.mtp_flops_per_token / self.trunk_flops_per_token


def model_cost(model: MTPModel, sequence_length: int) -> ModelCost:
    """Parameters, and FLOPs per token in rows of `sequence_length` tokens (T).

    Where no gradient is detached and all depths are on, a step takes three times the forward's operations, so that
    ratios of forward FLOPs are ratios of training FLOPs; otherwise see `step_flops`. `nextn.model.flops` says what is
    counted.
    """
    trunk, scheme = model.trunk, model.scheme
    num_parameters = sum(p.numel() for p in model.parameters())
    num_mtp = 0 if scheme is None else sum(p.numel() for p in scheme.parameters())
    num_unchosen = sum(trunk.num_unchosen_parameters(layer) for layer in trunk.layers)
    return ModelCost(
        num_parameters=num_parameters,
        num_active_parameters=num_parameters - num_mtp - num_unchosen,
        num_mtp_parameters=num_mtp,
        trunk_flops_per_token=trunk_flops(trunk, sequence_length),
        mtp_flops_per_token=0.0 if scheme is None else scheme.flops_per_token(trunk, sequence_length),
    )


def weightless_model(config: ModelConfig, mtp_config: MTPConfig) -> MTPModel:
    """A model of which only the shapes exist (on torch's meta device): enough to count, of any size.

    Raises ConfigError for a `vocab_size` of 0, which stands for the tokenizer's.
    """
    if config.vocab_size == 0:
        raise ConfigError(
            "model.vocab_size = 0 stands for the tokenizer's number of tokens, without which nothing can be counted; "
            "resolve it first (nextn.training.fit_vocabulary)"
        )
    with torch.device("meta"):
        return MTPModel(config, mtp_config)


def step_flops(
    model: MTPModel,
    sequence_length: int,
    active_depths: Sequence[int] | None = None,
    detach: DetachConfig = NO_DETACH,
) -> float:
    """FLOPs of a training step, forward and backward, per token of a row; `nextn.model.flops` says what is counted.

    A product takes as much again for the gradient of each of its operands. Left out is what no gradient reaches: the
    head of a depth that is computed only because others build on it, its module too if they read it detached; the
    weight of a detached head; the input of heads that read the detached trunk directly; in a trunk that is frozen
    everything but the forward pass, and with low-rank factors the gradients of its weights.

    Args:
        model: from `weightless_model`, or with weights.
        sequence_length: T.
        active_depths: those with a weight, in growing order; None: 1..K.
        detach: where the gradients of L_1..L_K stop.

    Raises:
        ValueError: a depth that the model does not have.

    >>> model = weightless_model(ModelConfig(vocab_size=256), MTPConfig(num_depths=2))
    >>> round(step_flops(model, 128, active_depths=()) / 1e6, 1)  # the trunk alone
    23.1
    >>> round(step_flops(model, 128) / 1e6, 1)
    30.6
    """
    all_depths = range(1, model.num_depths + 1)
    active = list(all_depths if active_depths is None else active_depths)
    if not set(active) <= set(all_depths):
        raise ValueError(f"active_depths = {active}, but the model has depths 1..{model.num_depths}")
    trunk, scheme, head = model.trunk, model.scheme, head_flops(model.trunk)
    weights = dict(cast(nn.Module, trunk).named_parameters())
    trained = {name for name, parameter in weights.items() if parameter.requires_grad}
    only_factors = all(".lora_" in name for name in trained)
    # One product forward; one more for the gradient of its input, and one for that of its weight.
    total = (1 + bool(trained) + (not only_factors)) * trunk_flops(trunk, sequence_length)
    if scheme is None:
        return total
    head_is_trained = trunk.output_head.weight.requires_grad
    depths, learning = scheme.required_depths(active), scheme.trained_depths(active, detach)
    modules = {depth: scheme.depth_flops(trunk, depth, sequence_length) - head for depth in depths}
    reads_constant = (detach.trunk or not trained) and not any(modules.values())
    for depth in depths:
        is_shared = scheme.head(trunk, depth) is trunk.output_head
        constant_head = is_shared and (detach.head or not head_is_trained)
        head_gradients = 2 - constant_head - reads_constant if depth in active else 0
        flops = modules[depth] * (3 if depth in learning else 1) + head * (1 + head_gradients)
        total += flops * num_final_positions(sequence_length, depth) / sequence_length
    return total


def active_depths(objective: ObjectiveConfig, num_depths: int, progress: Progress) -> tuple[int, ...]:
    """The depths 1..K with a weight at the step about to be taken.

    >>> from nextn.config import CurriculumConfig
    >>> forward = ObjectiveConfig(curriculum=CurriculumConfig("forward"))
    >>> [active_depths(forward, 2, Progress(step, num_steps=3)) for step in range(3)]
    [(), (1,), (1, 2)]
    """
    weights = depth_weights(objective, num_depths, progress)
    return tuple(depth for depth, weight in enumerate(weights, 1) if weight)


def active_depths_by_step(recipe: Recipe) -> Iterator[tuple[int, ...]]:
    """`active_depths` of every step of a run."""
    training = recipe.training
    num_tokens = training.batch_size * recipe.data.sequence_length
    for step in range(training.num_steps):
        moment = Progress(step, step * num_tokens, training.num_steps)
        yield active_depths(recipe.objective, recipe.mtp.num_depths, moment)


def phases(recipe: Recipe) -> list[tuple[tuple[int, ...], int]]:
    """The sets of active depths that occur in a run, in order of first appearance, each with its number of steps.

    >>> from nextn.config import CurriculumConfig, TrainingConfig
    >>> forward = ObjectiveConfig(curriculum=CurriculumConfig("forward"))
    >>> phases(Recipe(mtp=MTPConfig(num_depths=2), objective=forward, training=TrainingConfig(num_steps=100)))
    [((), 34), ((1,), 33), ((1, 2), 33)]
    """
    return list(Counter(active_depths_by_step(recipe)).items())


def training_flops(recipe: Recipe) -> list[float]:
    """FLOPs of a run up to and including its first, second, ... step: `num_steps` growing sums of `step_flops`.

    Schedules and curricula count: a depth that is off costs nothing. The optimizer's own work does not.

    Raises ConfigError for a `vocab_size` of 0, or an objective that does not fit K.

    >>> from nextn.config import DataConfig, TrainingConfig
    >>> model, data = ModelConfig(vocab_size=256), DataConfig(sequence_length=128)
    >>> sums = training_flops(Recipe(model=model, data=data, training=TrainingConfig(batch_size=4)))
    >>> [round(flops / 1e9, 2) for flops in sums[:3]]
    [13.75, 27.51, 41.26]
    """
    model, sequence_length = weightless_model(recipe.model, recipe.mtp), recipe.data.sequence_length
    num_tokens = recipe.training.batch_size * sequence_length

    @functools.cache
    def flops_of(active: tuple[int, ...]) -> float:
        return num_tokens * step_flops(model, sequence_length, active, recipe.objective.detach)

    return list(itertools.accumulate(flops_of(active) for active in active_depths_by_step(recipe)))
