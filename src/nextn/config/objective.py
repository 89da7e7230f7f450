"""`[objective]`: the weights of the depths over training, and the routing of their gradients."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Literal

from nextn.config.fields import require, setting
from nextn.errors import ConfigError


def _check_boundaries(where: str, boundaries: tuple[float, ...], unit: str) -> None:
    """Raise ConfigError unless the boundaries grow, from 0 or more, and end within 0..1 if they are shares."""
    if any(not 0 <= boundary < math.inf for boundary in boundaries):
        raise ConfigError(f"{where}.boundaries must be 0 or more and finite, got {list(boundaries)}")
    if any(b <= a for a, b in itertools.pairwise(boundaries)):
        raise ConfigError(f"{where}.boundaries must grow, got {list(boundaries)}")
    if unit == "share" and any(boundary > 1 for boundary in boundaries):
        raise ConfigError(
            f"{where}.boundaries must lie in 0..1 with unit = 'share', got {list(boundaries)}; "
            "use unit = 'steps' or 'tokens' to count these"
        )


@dataclass(frozen=True)
class ScheduleConfig:
    """A quantity over training; `nextn.objective.value_at` says what each kind means.

    Number of values and boundaries: `constant` 1 and 0, `piecewise` n + 1 and n, `linear` n and n (2 or more),
    `polynomial` 2 and 2. A `product` has nothing but `factors`, which are schedules themselves.
    """

    kind: Literal["constant", "piecewise", "linear", "polynomial", "product"] = setting(
        "constant", "constant, piecewise, linear, polynomial or product"
    )
    values: tuple[float, ...] = setting(
        (), "one value (0.3 if none is given), one per piece or point, or start and end"
    )
    boundaries: tuple[float, ...] = setting(
        (), "piecewise: where the next value starts; linear: where the points are; polynomial: from and to"
    )
    unit: Literal["steps", "tokens", "share"] = setting(
        "steps", "what boundaries count: optimizer steps, trained tokens, or the share of all steps (0..1)"
    )
    power: float = setting(1.0, "polynomial: alpha of end + (start - end) * (1 - t) ** alpha")
    factors: tuple[ScheduleConfig, ...] = setting((), "product: the schedules that are multiplied")

    def __post_init__(self) -> None:
        where = "objective.mtp_lambda"
        if self.kind == "constant" and not self.values:
            object.__setattr__(self, "values", (0.3,))
        got = f"got values = {list(self.values)}, boundaries = {list(self.boundaries)}"
        num_values, num_boundaries = len(self.values), len(self.boundaries)
        fits, wanted = {
            "constant": ((num_values, num_boundaries) == (1, 0), "one value and no boundaries"),
            "piecewise": (num_values == num_boundaries + 1, "one value more than boundaries"),
            "linear": (num_values == num_boundaries >= 2, "a boundary for each value, and at least two of them"),
            "polynomial": ((num_values, num_boundaries) == (2, 2), "values = [start, end] and boundaries = [from, to]"),
            "product": (
                (num_values, num_boundaries, self.unit) == (0, 0, "steps"),
                "values, boundaries and unit in its factors only",
            ),
        }[self.kind]
        if not fits:
            raise ConfigError(f"{where}: a {self.kind} schedule takes {wanted}, {got}, unit = {self.unit!r}")
        if self.kind == "product" and not self.factors:
            raise ConfigError(f"{where}.factors: a product schedule needs at least one factor, got none")
        if self.kind != "product" and self.factors:
            raise ConfigError(f"{where}.factors need kind = 'product', got kind = {self.kind!r}")
        if any(not 0 <= value < math.inf for value in self.values):
            raise ConfigError(f"{where}.values must be 0 or more and finite, got {list(self.values)}")
        _check_boundaries(where, self.boundaries, self.unit)
        if not 0 < self.power < math.inf:
            raise ConfigError(f"{where}.power must be above 0 and finite, got {self.power:g}")
        if self.kind != "polynomial" and self.power != 1:
            raise ConfigError(f"{where}.power needs kind = 'polynomial', got kind = {self.kind!r}")


@dataclass(frozen=True)
class CurriculumConfig:
    """Which depths are trained when (arXiv 2505.22757): a sequence of stages, each a set of depths.

    `forward` goes from next-token to multi-token prediction: no depth, depth 1, depths 1 and 2, ..., all K. `reverse`
    is that backwards. `stages` lists them.
    """

    kind: Literal["none", "forward", "reverse", "stages"] = setting(
        "none", "none (all depths always), forward, reverse or stages"
    )
    stages: tuple[tuple[int, ...], ...] = setting((), "stages: the depths (1-based) of each stage")
    boundaries: tuple[float, ...] = setting((), "where the next stage starts; empty: equal parts of the run")
    unit: Literal["steps", "tokens", "share"] = setting(
        "steps", "what boundaries count: optimizer steps, trained tokens, or the share of all steps (0..1)"
    )

    def __post_init__(self) -> None:
        where = "objective.curriculum"
        if (self.kind == "stages") != bool(self.stages):
            raise ConfigError(
                f"{where}.stages lists the stages of kind = 'stages' and of no other, "
                f"got kind = {self.kind!r}, stages = {_lists(self.stages)}"
            )
        if any(depth < 1 for stage in self.stages for depth in stage):
            raise ConfigError(f"{where}.stages names depths from 1 on, got {_lists(self.stages)}")
        if any(len(set(stage)) < len(stage) for stage in self.stages):
            raise ConfigError(f"{where}.stages names a depth once per stage, got {_lists(self.stages)}")
        _check_boundaries(where, self.boundaries, self.unit)

    def stages_for(self, num_depths: int) -> tuple[tuple[int, ...], ...]:
        """The depths (1-based) of each stage, for K = `num_depths`.

        Raises:
            ConfigError: a stage names a depth beyond K, or there is not one boundary between every two stages.

        >>> CurriculumConfig("forward").stages_for(2)
        ((), (1,), (1, 2))
        """
        where, depths = "objective.curriculum", tuple(range(1, num_depths + 1))
        growing = tuple(depths[:length] for length in range(num_depths + 1))
        stages = {"none": (depths,), "forward": growing, "reverse": growing[::-1], "stages": self.stages}[self.kind]
        if any(depth > num_depths for stage in stages for depth in stage):
            raise ConfigError(
                f"{where}.stages may name depths 1..mtp.num_depths = {num_depths}, got {_lists(self.stages)}"
            )
        if self.boundaries and len(self.boundaries) != len(stages) - 1:
            raise ConfigError(
                f"{where}.boundaries: kind = {self.kind!r} has {len(stages)} stages with mtp.num_depths = {num_depths} "
                f"and so it takes {len(stages) - 1} boundaries (or none: equal parts), got {list(self.boundaries)}"
            )
        return stages


def _lists(stages: tuple[tuple[int, ...], ...]) -> list[list[int]]:
    return [list(stage) for stage in stages]


@dataclass(frozen=True)
class DetachConfig:
    """Gradient routing: where the gradients of the MTP losses L_1..L_K stop. The main loss is never touched."""

    trunk: bool = setting(False, "h[0] is a constant: MTP trains its own modules, not the trunk's layers")
    embedding: bool = setting(False, "embeddings of future tokens are constants")
    head: bool = setting(False, "the trunk's output head, and its final norm as a depth's head norm, are constants")
    between_depths: bool = setting(False, "what depth k passes to depth k+1 is a constant")


@dataclass(frozen=True)
class ObjectiveConfig:
    """total = main + sum over k of weight_k(step) * L_k."""

    mtp_lambda: ScheduleConfig = field(
        default_factory=ScheduleConfig, metadata={"doc": "lambda of eq. 25 over training"}
    )
    average_over_depths: bool = setting(True, "weight lambda / K per depth (DeepSeek) instead of lambda each (sum)")
    depth_weights: tuple[float, ...] = setting((), "relative weights of depths 1..K; empty: 1 each")
    depth_decay: float = setting(1.0, "beta: depth k is weighted by beta ** (k - 1)")
    curriculum: CurriculumConfig = field(
        default_factory=CurriculumConfig, metadata={"doc": "which depths are trained when"}
    )
    denominator: Literal["depth", "sequence"] = setting(
        "depth", "L_k is divided by its own valid positions, or by the main loss's (eq. 24)"
    )
    importance: Literal["uniform", "inverse_frequency", "content_words"] = setting(
        "uniform", "which labels of L_k weigh more: none, those of rare tokens, or those in content words"
    )
    importance_power: float = setting(1.0, "inverse_frequency: weight ~ (1 / share of the training tokens) ** power")
    importance_max: float = setting(10.0, "inverse_frequency: largest weight, where the mean is 1")
    content_weight: float = setting(2.0, "content_words: weight of a token in a content word, where all others have 1")
    detach: DetachConfig = field(default_factory=DetachConfig, metadata={"doc": "where gradients of MTP losses stop"})
    sequence_balance_alpha: float = setting(1e-4, "weight of the sequence-wise balance loss (eq. 17); 0 leaves it out")
    loss_chunk_size: int = setting(1024, "positions whose logits are held at once; 0 holds all logits (the plain loss)")

    def __post_init__(self) -> None:
        require(self, "objective", 0, "depth_decay", "sequence_balance_alpha", "loss_chunk_size")
        require(self, "objective", 0, "importance_power")
        require(self, "objective", 1, "importance_max")
        if not self.content_weight > 0:
            raise ConfigError(f"objective.content_weight must be above 0, got {self.content_weight:g}")
        if any(not 0 <= weight < math.inf for weight in self.depth_weights):
            raise ConfigError(f"objective.depth_weights must be 0 or more and finite, got {list(self.depth_weights)}")

    def check_depths(self, num_depths: int) -> None:
        """Raise ConfigError unless depth_weights and curriculum fit K = `num_depths`; 0 has no depths to fit."""
        if num_depths == 0:
            return
        if self.depth_weights and len(self.depth_weights) != num_depths:
            raise ConfigError(
                f"objective.depth_weights needs one value per depth, mtp.num_depths = {num_depths} (or none: 1 each), "
                f"got {list(self.depth_weights)}"
            )
        self.curriculum.stages_for(num_depths)
