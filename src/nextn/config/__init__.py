"""All settings: frozen dataclasses, read from TOML, each field with its meaning and unit.

A recipe is a TOML file whose tables are the fields of `Recipe`. An unknown key is an error that names the nearest known
one; a value of the wrong type is an error that names the type wanted. Settings never change after they are read.
"""

from nextn.config.fields import require, setting
from nextn.config.model import ModelConfig, RopeConfig
from nextn.config.mtp import MTPConfig
from nextn.config.objective import CurriculumConfig, DetachConfig, ObjectiveConfig, ScheduleConfig
from nextn.config.recipe import Recipe, load_recipe
from nextn.config.training import DataConfig, EvaluationConfig, OptimizerConfig, TrainingConfig
from nextn.config.trunk import LoraConfig, TrunkConfig

__all__ = [
    "CurriculumConfig",
    "DataConfig",
    "DetachConfig",
    "EvaluationConfig",
    "LoraConfig",
    "MTPConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "Recipe",
    "RopeConfig",
    "ScheduleConfig",
    "TrainingConfig",
    "TrunkConfig",
    "load_recipe",
    "require",
    "setting",
]
