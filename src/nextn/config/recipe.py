"""A recipe: all tables together, checked against each other, and read from TOML."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nextn.config.model import ModelConfig
from nextn.config.mtp import MTPConfig
from nextn.config.objective import ObjectiveConfig
from nextn.config.training import DataConfig, EvaluationConfig, OptimizerConfig, TrainingConfig
from nextn.config.trunk import TrunkConfig
from nextn.errors import ConfigError
from nextn.tables import from_table, override


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a training run; one TOML table per field."""

    trunk: TrunkConfig = field(default_factory=TrunkConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    mtp: MTPConfig = field(default_factory=MTPConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        if self.trunk.from_ is not None:
            self._check_loaded()
        else:
            self.check_context(self.model.max_position_embeddings, "model.max_position_embeddings")
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

    def check_context(self, longest: int, name: str) -> None:
        """Raise ConfigError where rows or decoded prompts exceed the context of `longest` tokens, called `name`."""
        if self.data.sequence_length > longest:
            raise ConfigError(f"data.sequence_length = {self.data.sequence_length} exceeds {name} = {longest}")
        context = self.evaluation.prompt_length + self.evaluation.max_new_tokens
        if self.evaluation.num_prompts and context > longest:
            raise ConfigError(
                f"evaluation.prompt_length + evaluation.max_new_tokens = {context} exceeds {name} = {longest}"
            )

    def _check_loaded(self) -> None:
        if self.model != ModelConfig():
            raise ConfigError(
                f"[model] describes a fresh trunk, and trunk.from = {self.trunk.from_!r} loads one; leave one out"
            )
        if self.trunk.train == "none" and self.mtp.num_depths == 0:
            raise ConfigError("trunk.train = 'none' and mtp.num_depths = 0 leave nothing to train")


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
