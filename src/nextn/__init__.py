"""nextn: multi-token prediction for language models, from training to lossless decoding."""

from nextn.config import ModelConfig, MTPConfig, Recipe, load_recipe
from nextn.decoding import Decoder, GenerationResult, generate
from nextn.errors import NextnError
from nextn.interop.load import load
from nextn.mtp import MTPModel, MTPOutput

__version__ = "0.1.0"

__all__ = [
    "Decoder",
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
