"""`[data]`, `[optimizer]`, `[training]` and `[evaluation]`: one run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nextn.config.fields import require, setting
from nextn.errors import ConfigError


@dataclass(frozen=True)
class DataConfig:
    """The training text, and how it becomes rows of tokens."""

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
    balance_mtp_blocks: bool = setting(
        True, "auxiliary-loss-free balancing also in MTP blocks; false leaves their routing biases as they are"
    )
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
