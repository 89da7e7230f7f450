"""What stood beside the weights in the folder that a model was read from, and is written back as it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nextn.files import PICKLE_SUFFIXES, write_bytes

if TYPE_CHECKING:
    from nextn.data import Tokenizer

MAX_COMPANION_BYTES = 256 << 20
"""A larger file beside the weights is not carried along."""

_WEIGHT_SUFFIXES = (*PICKLE_SUFFIXES, ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx")
_WRITTEN_ANEW = ("config.json", "recipe.json", "provenance.json")
_OF_THE_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "vocab.json"),
    *("merges.txt", "tokenizer.model", "added_tokens.json", "generation_config.json"),
)
"""Files that a tokenizer put in the place of the folder's own makes untrue."""


@dataclass(frozen=True)
class Origin:
    """A folder without its weights.

    Attributes:
        table: its config.json.
        companions: every other file at its top, by name: tokenizer, chat template, generation settings, licence, ...
        tokenizer: as it was attached to the model; None: the folder has none.
    """

    table: Mapping[str, Any] = field(default_factory=dict, repr=False)
    companions: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    tokenizer: Tokenizer | None = None

    @staticmethod
    def read(folder: Path, table: Mapping[str, Any], tokenizer: Tokenizer | None) -> Origin:
        """Keep what lies in the folder beside the weights."""
        companions = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if _is_companion(path)}
        return Origin(table, companions, tokenizer)

    def write(self, folder: Path, tokenizer: Tokenizer | None) -> None:
        """Write the companions into a folder, without those of its tokenizer if `tokenizer` is another one."""
        replaced = _OF_THE_TOKENIZER if tokenizer is not self.tokenizer else ()
        for name, content in self.companions.items():
            if name not in replaced:
                write_bytes(folder / name, content)


def _is_companion(path: Path) -> bool:
    """True for a file that belongs to the model and is neither weights nor written anew."""
    if not path.is_file() or path.name.startswith(".") or path.stat().st_size > MAX_COMPANION_BYTES:
        return False
    return path.suffix not in _WEIGHT_SUFFIXES and path.name not in _WRITTEN_ANEW and ".index.json" not in path.name
