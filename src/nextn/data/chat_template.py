"""Fill in a chat model's own template: from a question to the tokens of a prompt."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nextn.errors import DataError
from nextn.files import read_json


@dataclass(frozen=True)
class ChatTemplate:
    """A chat model's template for prompts, read from its tokenizer files.

    The template is filled in as transformers 5.23 does it (`utils/chat_template_utils.py`: trimmed blocks, loop
    controls, `tojson`, `raise_exception`), but for the day's date, which would change the prompts from day to day:
    templates that ask whether there is one take their own.
    """

    template: jinja2.Template
    special_tokens: dict[str, str]
    tokenizer: tokenizers.Tokenizer

    @classmethod
    def read(cls, folder: Path) -> ChatTemplate | None:
        """From a checkpoint; None if it has no chat template. Raises DataError for one that jinja cannot read."""
        path = folder / "chat_template.jinja"
        settings: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            settings |= read_json(folder / name) if (folder / name).exists() else {}
        stored = path.read_text(encoding="utf-8") if path.exists() else settings.get("chat_template")
        if isinstance(stored, list):
            stored = next((one["template"] for one in stored if one["name"] == "default"), None)
        if stored is None:
            return None
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value, **settings: json.dumps(value, ensure_ascii=False, **settings)
        environment.globals["raise_exception"] = _refuse
        try:
            template = environment.from_string(stored)
        except jinja2.TemplateError as error:
            raise DataError(f"{folder}: the chat template cannot be read: {error}") from None
        special_tokens = {
            key: token["content"] if isinstance(token, dict) else token
            for key, token in settings.items()
            if key.endswith("_token") and isinstance(token, str | dict)
        }
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return cls(template, special_tokens, tokenizer)

    def token_ids(self, question: str) -> list[int]:
        """The question as a user's turn, up to where the model's answer begins."""
        messages = [{"role": "user", "content": question}]
        try:
            text = self.template.render(messages=messages, add_generation_prompt=True, **self.special_tokens)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise DataError(f"the model's chat template cannot be filled in with a question: {error}") from None
        return self.tokenizer.encode(text, add_special_tokens=False).ids


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
