"""Export a model for an engine: a Hugging Face folder, or a GGUF file for llama.cpp.

A model that the engine cannot serve is refused with every reason; nothing is left out to make it fit.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextn.errors import ExportError
from nextn.files import MAX_SHARD_BYTES, atomic_folder, write_json
from nextn.interop.canonical import canonical
from nextn.interop.engines import launch_line, reasons_against
from nextn.interop.gguf import write_gguf
from nextn.interop.load import load
from nextn.mtp.config_file import NATIVE
from nextn.mtp.model import MTPModel
from nextn.mtp.store import ModelFolder, save_model

FORMATS = {"hf": "transformers", "vllm": "vllm", "sglang": "sglang", "gguf": "llamacpp"}
"""What `--to` takes, and the engine that reads it."""

FOLDER_DTYPES = ("float32", "bfloat16", "float16")

CARRIED_ALONG = ("recipe.json",)
"""Files of the checkpoint that go with an exported folder unchanged."""


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    Attributes:
        path: the folder or file.
        engine: which reads it.
        launch_line: the command that serves it.
    """

    path: Path
    engine: str
    launch_line: str


def export_model(
    path: str | Path,
    to: str,
    out: Path,
    *,
    dtype: str | None = None,
    draft_length: int = 2,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    provenance: Mapping[str, Any] | None = None,
) -> Exported:
    """Write a model for an engine.

    Args:
        path: a checkpoint, or a run folder, whose newest one is taken. hf takes any family, the others DeepSeek-V3's.
        to: hf, vllm, sglang or gguf.
        out: the folder or, for gguf, the file to write; it must not exist.
        dtype: of the weights. Folders: float32, bfloat16 or float16; None: float32. GGUF: f32, bf16 or q8_0; None: f32.
        draft_length: N in the launch line; a model without MTP modules always has 0.
        max_shard_bytes: folders: larger models are split into files of at most this size.
        provenance: written beside the weights of a folder as provenance.json.

    Raises:
        ExportError: the engine cannot serve the model (all reasons are named), `out` exists, or an unknown format.
        CheckpointError: the checkpoint cannot be read, or `out` cannot be written.
    """
    if to not in FORMATS:
        raise ExportError(f"unknown format {to!r}; known: {', '.join(FORMATS)}")
    if out.exists():
        raise ExportError(f"{out} exists already; name another place, or remove it first")
    if to != "gguf" and dtype not in (None, *FOLDER_DTYPES):
        raise ExportError(f"unknown dtype {dtype!r} for --to {to}; known: {', '.join(FOLDER_DTYPES)}")
    engine, folder = FORMATS[to], ModelFolder.open(path)
    computed = "float32" if to == "gguf" else dtype or "float32"
    if folder.table.get("model_type") != NATIVE and to != "hf":
        raise ExportError(
            f"nextn writes DeepSeek-V3's layout for {engine}, and {folder.path} is of model_type "
            f"{folder.table.get('model_type')!r}; --to hf writes it in its own layout, which engines read without MTP"
        )
    model = load(folder.path, dtype=computed)
    if folder.table.get("model_type") != NATIVE:
        _write_folder(model, folder.path, out, max_shard_bytes, provenance)
        return Exported(out, engine, f"nextn generate {shlex.quote(str(out))} -p TEXT")
    model = canonical(model)
    if reasons := reasons_against(engine, model.config, model.mtp_config):
        what = " with its MTP modules" if model.num_depths else ""
        raise ExportError(f"{engine} cannot serve {folder.path}{what}: {'; '.join(reasons)}")
    if to == "gguf":
        write_gguf(model, out, dtype or "f32")
    else:
        _write_folder(model, folder.path, out, max_shard_bytes, provenance)
    line = launch_line(engine, out, model.config, model.mtp_config, draft_length if model.num_depths else 0, computed)
    return Exported(out, engine, line)


def _write_folder(
    model: MTPModel, source: Path, out: Path, max_shard_bytes: int, provenance: Mapping[str, Any] | None
) -> None:
    """Write the whole model as a folder, also where the checkpoint keeps the trunk elsewhere."""
    with atomic_folder(out) as temporary:
        save_model(model, temporary, max_shard_bytes)
        write_json(temporary / "provenance.json", dict(provenance or {}))
        for name in CARRIED_ALONG:
            if (source / name).exists():
                shutil.copyfile(source / name, temporary / name)
