"""nextn: multi-token prediction for language models, from training to lossless decoding."""

from nextn.config import ModelConfig, MTPConfig, Recipe, load_recipe
from nextn.decoding import GenerationResult, generate
from nextn.errors import NextnError
from nextn.mtp import MTPModel, MTPOutput
from nextn.mtp import load_model as load

__version__ = "0.1.0"

__all__ = [
    "GenerationResult",
    "MTPConfig",
    "MTPModel",
    "MTPOutput",
    "ModelConfig",
    "NextnError",
    "Recipe",
    "generate",
    "load",
    "load_recipe",
]
