"""Read the special tokens around a text from a checkpoint's tokenizer files.

nextn's own tokenizers put nothing around texts; those of others may open every text with a token, and a benchmark's
scores depend on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from nextn.errors import DataError
from nextn.files import read_json


@dataclass(frozen=True)
class TextMarks:
    """The special tokens around texts, as transformers would use them with the same files.

    Attributes:
        opening: ids put before every text; empty for nextn's own tokenizers.
        prefix: id that stands before a text without context: the beginning of text if there is one, else its end.
        special: ids of special tokens by their spelling.
    """

    opening: tuple[int, ...]
    prefix: int
    special: Mapping[str, int]

    @classmethod
    def read(cls, folder: Path, eos_token_id: int) -> TextMarks:
        """From `tokenizer.json`, whose post-processor alone says what opens a text, and the settings beside it.

        `add_bos_token` in the settings has no effect, as in transformers 5.23 (`tokenization_utils_base.py`: it counts
        only where there is no `tokenizer.json`).

        Raises:
            DataError: `tokenizer.json` is missing, or no tokenizer.
        """
        path = folder / "tokenizer.json"
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises exactly this class
            raise DataError(f"{path} cannot be read ({error}); tasks are texts, and need a tokenizer") from None
        settings: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            settings |= read_json(folder / name) if (folder / name).exists() else {}
        bos = settings.get("bos_token")
        bos_id = None if bos is None else tokenizer.token_to_id(bos["content"] if isinstance(bos, dict) else bos)
        encoded = tokenizer.encode("a")
        opening = encoded.ids[: encoded.special_tokens_mask.index(0)]
        special = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        return cls(tuple(opening), eos_token_id if bos_id is None else bos_id, special)
