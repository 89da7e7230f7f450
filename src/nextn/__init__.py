"""nextn: multi-token prediction for language models, from training to lossless decoding.

`import nextn` imports neither torch nor any package of nextn: a name is imported when it is first used (PEP 562).
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from nextn.errors import NextnError

if TYPE_CHECKING:
    from nextn.config import ModelConfig, MTPConfig, Recipe, load_recipe
    from nextn.decoding import Decoder, DraftSettings, GenerationResult, Request, generate
    from nextn.interop.load import load
    from nextn.mtp import MTPModel, MTPOutput

__version__ = "0.1.0"

__all__ = [
    "Decoder",
    "DraftSettings",
    "GenerationResult",
    "MTPConfig",
    "MTPModel",
    "MTPOutput",
    "ModelConfig",
    "NextnError",
    "Recipe",
    "Request",
    "generate",
    "load",
    "load_recipe",
]

_MODULES = {
    "Decoder": "nextn.decoding",
    "DraftSettings": "nextn.decoding",
    "GenerationResult": "nextn.decoding",
    "MTPConfig": "nextn.config",
    "MTPModel": "nextn.mtp",
    "MTPOutput": "nextn.mtp",
    "ModelConfig": "nextn.config",
    "Recipe": "nextn.config",
    "Request": "nextn.decoding",
    "generate": "nextn.decoding",
    "load": "nextn.interop.load",
    "load_recipe": "nextn.config",
}
"""Where each public name is defined."""


def __getattr__(name: str) -> Any:
    """A public name or a package of nextn, imported on first use."""
    if name in _MODULES:
        value = getattr(importlib.import_module(_MODULES[name]), name)
        globals()[name] = value
        return value
    if not name.startswith("_") and importlib.util.find_spec(f"nextn.{name}") is not None:
        return importlib.import_module(f"nextn.{name}")
    raise AttributeError(f"module 'nextn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
