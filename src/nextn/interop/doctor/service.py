"""Which engines run an examined checkpoint with its MTP modules, and the command for each."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nextn.config import ModelConfig, MTPConfig
from nextn.data.tokenizers import load_tokenizer
from nextn.errors import NextnError
from nextn.interop import export
from nextn.interop.canonical import canonical_config
from nextn.interop.doctor.diagnosis import Diagnosis
from nextn.interop.engines import ENGINES, launch_line, reasons_against
from nextn.interop.gguf_layout import ARCHITECTURE, tokenizer_settings

FORMATS = {engine: name for name, engine in export.FORMATS.items()}
"""What `nextn export --to` calls each engine's files."""

LONGEST_DRAFT = 3
"""N in launch lines is the number of trained depths, and at most this."""


@dataclass(frozen=True)
class Service:
    """Whether one engine runs the checkpoint, and the commands for it.

    Attributes:
        engine: a name of ENGINES.
        runs_mtp: whether it runs the MTP modules; None: not known.
        reasons: why not, or why that is not known; empty if it does.
        export: the command to run first, empty where the engine reads the checkpoint as it is.
        launch_line: the command that serves it, after the export if there is one; empty unless `runs_mtp`.
    """

    engine: str
    runs_mtp: bool | None
    reasons: tuple[str, ...] = ()
    export: str = ""
    launch_line: str = ""

    def to_table(self) -> dict[str, Any]:
        """For JSON."""
        return vars(self) | {"reasons": list(self.reasons)}


def services(diagnosis: Diagnosis) -> tuple[Service, ...]:
    """One `Service` per engine; none where the checkpoint has no MTP modules to run."""
    if not diagnosis.is_healthy:
        return tuple(Service(engine, False, (diagnosis.verdict,)) for engine in ENGINES)
    if not diagnosis.num_stored:
        return ()
    return tuple(_service(engine, diagnosis) for engine in ENGINES)


def _service(engine: str, diagnosis: Diagnosis) -> Service:
    if diagnosis.kind == "gguf":
        return _service_of_gguf(engine, diagnosis)
    if diagnosis.kind == "safetensors":
        return Service(engine, None, ("it reads a folder with config.json and weights; this is a file alone",))
    if diagnosis.settings is None:
        known = (
            diagnosis.detail_of("settings unread")
            or f"nextn knows the engines' needs for DeepSeek-V3's layout, and this is {diagnosis.model_type}"
        )
        return Service(engine, None, (known,))
    if reasons := reasons_against(engine, *diagnosis.settings):
        return Service(engine, False, tuple(reasons))
    if unread := diagnosis.detail_of("weights unread"):
        return Service(engine, None, (f"nextn cannot export it: {unread}",))
    config, mtp_config = canonical_config(*diagnosis.settings)
    path, draft_length, first = diagnosis.path, min(mtp_config.num_depths, LONGEST_DRAFT), ""
    if engine == "llamacpp" or (config, mtp_config) != diagnosis.settings:
        if reason := _reason_against_tokenizer(engine, path, config):
            return Service(engine, False, (reason,))
        place = path if path.name not in ("", "..") else path.resolve()
        out = place.parent / (place.name + (".gguf" if engine == "llamacpp" else f"-{FORMATS[engine]}"))
        first = shlex.join(["nextn", "export", str(path), "--to", FORMATS[engine], "--out", str(out)])
        path = out
    return Service(engine, True, (), first, launch_line(engine, path, config, mtp_config, draft_length))


def _reason_against_tokenizer(engine: str, folder: Path, config: ModelConfig) -> str:
    """Why `nextn export` would stop at the checkpoint's tokenizer; empty where it would not."""
    if not (folder / "tokenizer.json").exists():
        return "its files hold the tokenizer, and the checkpoint has no tokenizer.json" if engine == "llamacpp" else ""
    try:
        tokenizer = load_tokenizer(folder)
        if tokenizer.vocab_size > config.vocab_size:
            return f"tokenizer.json has {tokenizer.vocab_size} tokens and the model knows {config.vocab_size}"
        if engine == "llamacpp":
            tokenizer_settings(tokenizer, config.vocab_size)
    except NextnError as error:
        return str(error)
    return ""


def _service_of_gguf(engine: str, diagnosis: Diagnosis) -> Service:
    if engine != "llamacpp":
        return Service(engine, False, ("it does not read GGUF files; export the checkpoint this one was made from",))
    if diagnosis.detail_of("one shard"):
        return Service(engine, None, ("this is one part of a split file; all parts must lie beside it",))
    if diagnosis.model_type != ARCHITECTURE:
        return Service(engine, None, (f"nextn knows {ARCHITECTURE} alone, and this is {diagnosis.model_type}",))
    if diagnosis.num_stored > 1:
        return Service(engine, False, (f"it takes exactly one MTP module, and this file has {diagnosis.num_stored}",))
    config = replace(ModelConfig(), max_position_embeddings=diagnosis.context or ModelConfig().max_position_embeddings)
    return Service(engine, True, (), "", launch_line(engine, diagnosis.path, config, MTPConfig(), 2))
