"""All settings: frozen dataclasses, read from TOML, each field with its meaning and unit.

A recipe is a TOML file whose tables are the fields of `Recipe`. An unknown key is an error that names the nearest known
one; a value of the wrong type is an error that names the type wanted. Settings never change after they are read.
"""

from __future__ import annotations

import itertools
import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nextn.errors import ConfigError
from nextn.tables import from_table, override


def setting(default: Any, doc: str) -> Any:
    """A dataclass field with a default and a one-line meaning (unit included), which reports show."""
    return field(default=default, metadata={"doc": doc})


def require(settings: Any, table: str, minimum: float, *names: str) -> None:
    """Raise ConfigError unless the named fields are at least `minimum` (None is left alone)."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value >= minimum:
            raise ConfigError(f"{table}.{name} must be at least {minimum:g}, got {value:g}")


# --------------------------------------------------------------------------------------------------------------- model


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding, under the name `rope_parameters` as in transformers.

    `rope_type = "yarn"` (arXiv 2309.00071) needs `factor` and `original_max_position_embeddings`.
    """

    rope_type: Literal["default", "yarn"] = setting("default", "default or yarn")
    rope_theta: float = setting(10000.0, "base of the geometric series of wavelengths")
    factor: float | None = setting(None, "yarn: context extension factor")
    original_max_position_embeddings: int | None = setting(None, "yarn: context trained on, in tokens")
    beta_fast: float | None = setting(None, "yarn: rotations above which a dimension is not interpolated (32)")
    beta_slow: float | None = setting(None, "yarn: rotations below which a dimension is fully interpolated (1)")
    mscale: float | None = setting(None, "yarn: attention temperature coefficient of cos and sin")
    mscale_all_dim: float | None = setting(None, "yarn: attention temperature coefficient of the softmax scale")
    truncate: bool | None = setting(None, "yarn: round the correction range to whole dimensions (true)")

    def __post_init__(self) -> None:
        if self.rope_theta <= 1:
            raise ConfigError(f"model.rope_parameters.rope_theta must be above 1, got {self.rope_theta:g}")
        require(self, "model.rope_parameters", 1, "factor", "original_max_position_embeddings")
        if self.rope_type == "default" and (self.factor, self.original_max_position_embeddings) != (None, None):
            raise ConfigError(
                "model.rope_parameters: factor and original_max_position_embeddings need rope_type = 'yarn'"
            )
        if self.rope_type == "yarn" and (self.factor is None or self.original_max_position_embeddings is None):
            raise ConfigError(
                "model.rope_parameters: rope_type = 'yarn' needs factor and original_max_position_embeddings, "
                f"got factor = {self.factor} and {self.original_max_position_embeddings}"
            )


@dataclass(frozen=True)
class ModelConfig:
    """The trunk, with the field names of transformers' `DeepseekV3Config`."""

    vocab_size: int = setting(0, "tokens in the vocabulary (V); 0 takes the tokenizer's")
    hidden_size: int = setting(256, "width of the residual stream (C)")
    intermediate_size: int = setting(768, "hidden width of a dense feed-forward layer")
    moe_intermediate_size: int = setting(128, "hidden width of one expert")
    num_hidden_layers: int = setting(8, "trunk layers, MTP modules not counted")
    num_attention_heads: int = setting(4, "attention heads (H)")
    n_shared_experts: int = setting(1, "experts every token uses")
    n_routed_experts: int = setting(8, "experts to choose from (E)")
    num_experts_per_tok: int = setting(2, "routed experts a token uses")
    n_group: int = setting(1, "groups the routed experts form")
    topk_group: int = setting(1, "groups a token may choose experts from")
    norm_topk_prob: bool = setting(True, "gates of the chosen experts sum to routed_scaling_factor")
    routed_scaling_factor: float = setting(1.0, "scale of the routed experts' sum")
    first_k_dense_replace: int = setting(1, "leading layers with a dense feed-forward instead of experts")
    q_lora_rank: int | None = setting(None, "rank of the query projection; none for a full one")
    kv_lora_rank: int = setting(64, "width of the cached key-value latent")
    qk_nope_head_dim: int = setting(32, "query/key width per head without position")
    qk_rope_head_dim: int = setting(16, "query/key width with rotary position; the key's is shared by all heads")
    v_head_dim: int = setting(32, "value width per head")
    rope_parameters: RopeConfig = field(default_factory=RopeConfig, metadata={"doc": "rotary position embedding"})
    rope_interleave: bool = setting(True, "rotary pairs are (x0, x1), (x2, x3), ... as in DeepSeek's weights")
    max_position_embeddings: int = setting(1024, "longest context, in tokens")
    rms_norm_eps: float = setting(1e-6, "epsilon of the layer norms")
    initializer_range: float = setting(0.02, "standard deviation of fresh weights")
    tie_word_embeddings: bool = setting(False, "output head is the embedding matrix")
    attention_bias: bool = setting(False, "biases in the low-rank down-projections and the output projection")

    def __post_init__(self) -> None:
        if self.qk_rope_head_dim % 2:
            raise ConfigError(f"model.qk_rope_head_dim must be even (rotary pairs), got {self.qk_rope_head_dim}")
        require(self, "model", 1, "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers")
        require(self, "model", 1, "num_attention_heads", "q_lora_rank", "kv_lora_rank", "v_head_dim")
        require(self, "model", 1, "qk_nope_head_dim", "qk_rope_head_dim", "max_position_embeddings")
        require(self, "model", 1, "n_group", "topk_group", "num_experts_per_tok")
        require(self, "model", 0, "vocab_size", "n_routed_experts", "n_shared_experts", "first_k_dense_replace")
        require(self, "model", 0, "rms_norm_eps", "initializer_range")
        if self.has_experts:
            self._check_routing()

    def _check_routing(self) -> None:
        if self.n_routed_experts % self.n_group:
            raise ConfigError(
                f"model.n_routed_experts = {self.n_routed_experts} does not divide into n_group = {self.n_group} groups"
            )
        experts_per_group = self.n_routed_experts // self.n_group
        if self.n_group > 1 and experts_per_group < 2:
            raise ConfigError("model.n_group: a group is scored by its best two experts, so it needs at least two")
        if not 1 <= self.topk_group <= self.n_group:
            raise ConfigError(f"model.topk_group must lie in 1..n_group = {self.n_group}, got {self.topk_group}")
        if not 1 <= self.num_experts_per_tok <= self.topk_group * experts_per_group:
            raise ConfigError(
                f"model.num_experts_per_tok = {self.num_experts_per_tok}, but a token may choose among "
                f"{self.topk_group * experts_per_group} experts (topk_group x experts per group)"
            )

    @property
    def has_experts(self) -> bool:
        """True iff some trunk layer is a mixture of experts."""
        return self.n_routed_experts > 0 and self.first_k_dense_replace < self.num_hidden_layers

    @property
    def qk_head_dim(self) -> int:
        """Query and key width per head, position part included."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Numbers the attention cache holds per token and layer."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def is_moe_layer(self, layer_index: int) -> bool:
        """True iff trunk layer `layer_index` (0-based) is a mixture of experts; MTP blocks follow the last layer."""
        return self.n_routed_experts > 0 and layer_index >= self.first_k_dense_replace


@dataclass(frozen=True)
class MTPConfig:
    """Multi-token prediction: the scheme and the conventions in which implementations differ.

    A field that the scheme does not read must keep its default (`nextn.mtp.check_scheme`).
    """

    scheme: str = setting("sequential", "sequential, independent, shared_module or parallel")
    num_depths: int = setting(1, "extra tokens predicted per position in training (K); 0 is plain next-token training")
    share_weights: bool = setting(False, "sequential: one module used at every depth")
    num_layers: int = setting(1, "shared_module: layers of the one module that all depths share; 0 is heads alone")
    dense_blocks: bool = setting(False, "MTP blocks have a dense feed-forward even where the trunk has experts")
    concat: Literal["embed_first", "hidden_first"] = setting("embed_first", "order of eh_proj's two inputs")
    trunk_hidden: Literal["post_norm", "pre_norm"] = setting(
        "post_norm", "h[0]: the trunk's state after or before its final norm"
    )
    carry: Literal["post_norm", "pre_norm"] = setting(
        "post_norm", "sequential: what depth k+1 receives, after or before depth k's head norm"
    )
    head_norm: Literal["own", "shared"] = setting(
        "own", "norm before the output head: the module's own or the trunk's final norm"
    )

    def __post_init__(self) -> None:
        require(self, "mtp", 0, "num_depths", "num_layers")


# ----------------------------------------------------------------------------------------------------------- objective


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


# ---------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class DataConfig:
    """What to train on and how it becomes rows of tokens."""

    corpus: str = setting(
        "python-stdlib", "python-stdlib, python-installed, a file, folder or .jsonl path, or hf:NAME[:SPLIT]"
    )
    text_field: str = setting("text", "field of a JSONL record or data set row that holds the text")
    tokenizer: str = setting("bytes", "bytes, bpe:SIZE (trained on the corpus), or the path of a saved tokenizer")
    sequence_length: int = setting(256, "tokens in a training row (T)")
    validation_share: float = setting(0.05, "share of the files held out, chosen by a hash of their name")
    max_bytes: int | None = setting(None, "stop reading the corpus after this many bytes of text; none reads all")
    isolate_documents: bool = setting(True, "documents packed into one row do not see each other")

    def __post_init__(self) -> None:
        if self.sequence_length < 2:
            raise ConfigError(
                f"data.sequence_length must be at least 2 (a token and its label), got {self.sequence_length}"
            )
        require(self, "data", 1, "max_bytes")
        if not 0.0 < self.validation_share < 1.0:
            raise ConfigError(f"data.validation_share must lie between 0 and 1, got {self.validation_share}")


# ------------------------------------------------------------------------------------------------------------ training


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, or Muon for hidden matrices with AdamW for embeddings, head, norms and routers."""

    name: Literal["adamw", "muon"] = setting("adamw", "adamw or muon")
    learning_rate: float = setting(1e-3, "peak learning rate of AdamW")
    muon_learning_rate: float = setting(0.02, "peak learning rate of Muon")
    betas: tuple[float, float] = setting((0.9, 0.95), "AdamW's decay rates of first and second moment")
    eps: float = setting(1e-8, "AdamW's epsilon")
    muon_momentum: float = setting(0.95, "Muon's momentum")
    weight_decay: float = setting(0.1, "decoupled weight decay of matrices; norms and biases have none")
    max_grad_norm: float = setting(1.0, "clip the global gradient norm to this; 0 never clips")
    schedule: Literal["cosine", "wsd", "constant"] = setting(
        "cosine", "after warm-up: cosine, wsd (warm-up-stable-decay) or constant"
    )
    num_warmup_steps: int = setting(20, "optimizer steps of linear warm-up")
    decay_share: float = setting(0.4, "wsd: share of all steps spent in the final linear decay")
    final_learning_rate_ratio: float = setting(0.05, "last learning rate relative to the peak")

    def __post_init__(self) -> None:
        for name in ("learning_rate", "muon_learning_rate", "eps"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"optimizer.{name} must be above 0, got {getattr(self, name)}")
        require(self, "optimizer", 0, "weight_decay", "max_grad_norm", "num_warmup_steps")
        for name in ("decay_share", "final_learning_rate_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"optimizer.{name} must lie in 0..1, got {getattr(self, name)}")
        for decay_rate in (*self.betas, self.muon_momentum):
            if not 0 <= decay_rate < 1:
                raise ConfigError(f"optimizer.betas and muon_momentum must lie in 0..1 (1 excluded), got {decay_rate}")


@dataclass(frozen=True)
class TrainingConfig:
    """One run: length, batch, numerics, checkpoints."""

    num_steps: int = setting(1000, "optimizer steps")
    batch_size: int = setting(16, "rows per optimizer step (B)")
    micro_batch_size: int | None = setting(None, "rows per forward; none takes the whole batch at once")
    seed: int = setting(0, "seed of weights and data order")
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")
    precision: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "bfloat16 autocast, float32, or auto: bfloat16 where the hardware multiplies it natively"
    )
    compile: bool = setting(False, "compile the layers with torch.compile (needs a C++ compiler on a CPU)")
    recompute: bool = setting(False, "keep only each layer's input for the backward pass and compute the layer again")
    bias_update_speed: float = setting(0.001, "gamma of auxiliary-loss-free balancing; 0 freezes the biases")
    log_every: int = setting(10, "steps between lines of metrics.jsonl")
    evaluate_every: int = setting(200, "steps between evaluations; 0 evaluates at the end only")
    checkpoint_every: int = setting(200, "steps between checkpoints; 0 writes the last one only")
    num_kept_checkpoints: int = setting(2, "how many of the latest checkpoints stay on disk")
    tensorboard: bool = setting(False, "also write TensorBoard event files (needs the tensorboard extra)")

    def __post_init__(self) -> None:
        require(self, "training", 1, "num_steps", "batch_size", "log_every", "num_kept_checkpoints")
        require(self, "training", 0, "seed", "bias_update_speed", "evaluate_every", "checkpoint_every")
        if self.seed >= 2**64:
            raise ConfigError(f"training.seed must lie in 0..2**64 - 1 (torch takes 64 bits), got {self.seed}")
        if self.compile and self.recompute:
            raise ConfigError("training.compile and training.recompute exclude each other: set one of them to false")
        if self.micro_batch_size is not None and not 1 <= self.micro_batch_size <= self.batch_size:
            raise ConfigError(
                f"training.micro_batch_size must lie in 1..batch_size = {self.batch_size}, got {self.micro_batch_size}"
            )


@dataclass(frozen=True)
class EvaluationConfig:
    """How much held-out text each evaluation reads and decodes."""

    num_rows: int = setting(32, "held-out rows for losses, teacher-forced accuracy and main agreement")
    num_prompts: int = setting(8, "held-out prompts decoded for acceptance; 0 decodes none")
    prompt_length: int = setting(128, "tokens in a prompt")
    max_new_tokens: int = setting(128, "tokens decoded per prompt")
    draft_length: int = setting(3, "tokens drafted per cycle (N)")

    def __post_init__(self) -> None:
        require(self, "evaluation", 1, "num_rows", "prompt_length", "max_new_tokens")
        require(self, "evaluation", 0, "num_prompts", "draft_length")


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a training run; one TOML table per field."""

    model: ModelConfig = field(default_factory=ModelConfig)
    mtp: MTPConfig = field(default_factory=MTPConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        if self.data.sequence_length > self.model.max_position_embeddings:
            raise ConfigError(
                f"data.sequence_length = {self.data.sequence_length} exceeds "
                f"model.max_position_embeddings = {self.model.max_position_embeddings}"
            )
        if self.mtp.num_depths > self.data.sequence_length - 2:
            raise ConfigError(
                f"mtp.num_depths = {self.mtp.num_depths} leaves no position with a label: data.sequence_length = "
                f"{self.data.sequence_length} allows at most {self.data.sequence_length - 2}"
            )
        self.objective.check_depths(self.mtp.num_depths)
        if self.optimizer.num_warmup_steps > self.training.num_steps:
            raise ConfigError(
                f"optimizer.num_warmup_steps = {self.optimizer.num_warmup_steps} exceeds "
                f"training.num_steps = {self.training.num_steps}"
            )
        context = self.evaluation.prompt_length + self.evaluation.max_new_tokens
        if self.evaluation.num_prompts and context > self.model.max_position_embeddings:
            raise ConfigError(
                f"evaluation.prompt_length + evaluation.max_new_tokens = {context} exceeds "
                f"model.max_position_embeddings = {self.model.max_position_embeddings}"
            )


# ------------------------------------------------------------------------------------------------------------- reading


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from TOML and apply `table.key=value` overrides.

    Raises ConfigError when the file is missing, is not TOML, or holds an unknown key or a value of the wrong type.
    """
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"recipe not found: {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"recipe {path} cannot be read as TOML: {error}") from None
    return from_table(Recipe, override(table, overrides))
