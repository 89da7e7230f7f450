"""GGUF files, which llama.cpp serves: write a model with its MTP module, read headers and single tensors.

llama.cpp runs DeepSeek-V3 as architecture `deepseek2` and drafts with its MTP block under `--spec-type draft-mtp`; its
own converter leaves that block out. `nextn.interop.gguf_layout` has the names. The `gguf` package does the encoding; it
is optional (`pip install gguf`) and imported when it is needed.
"""

from __future__ import annotations

import os
from collections import Counter
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from nextn.errors import CheckpointError, ExportError, NextnError
from nextn.interop.canonical import canonical
from nextn.interop.gguf_layout import ARCHITECTURE, named_tensors, settings, tokenizer_settings
from nextn.interop.requirements import reasons_against_llamacpp
from nextn.mtp import MTPModel
from nextn.mtp.config_file import num_released_modules
from nextn.mtp.released import load_model

FILE_TYPES = {"f32": 0, "bf16": 32, "q8_0": 7}
"""Types of matrices written here, with llama.cpp's number of a file that holds mostly these."""

# ------------------------------------------------------------------------------------------------------------- writing


def write_gguf(source: MTPModel | Path, file: Path, dtype: str = "bf16") -> dict[str, int]:
    """Write a model as one GGUF file for llama.cpp, MTP module and tokenizer included, in its canonical form.

    Vectors and routers are float32 always. Q8_0 has blocks of 32 numbers: matrices whose rows are no multiple of that
    are bf16 instead, and the returned counts show them.

    Args:
        source: a float32 model with its tokenizer; or a checkpoint, or a run folder, whose newest one is taken.
        file: to write; it appears complete or not at all.
        dtype: of the matrices: f32 (exact), bf16 or q8_0.

    Returns:
        How many tensors of each type were written, for example `{"BF16": 180, "F32": 64}`.

    Raises:
        ExportError: llama.cpp cannot serve this model (every reason is named); no tokenizer, or one it does not know;
            an unknown dtype; the `gguf` package is missing.
        CheckpointError: the checkpoint cannot be read, or the file cannot be written.
    """
    if dtype not in FILE_TYPES:
        raise ExportError(f"unknown GGUF dtype {dtype!r}; known: {', '.join(FILE_TYPES)}")
    gguf = _gguf(ExportError)
    model = canonical(source if isinstance(source, MTPModel) else load_model(source))
    if reasons := reasons_against_llamacpp(model.config, model.mtp_config):
        raise ExportError(f"llama.cpp cannot serve this model: {'; '.join(reasons)}")
    if model.tokenizer is None:
        raise ExportError("llama.cpp needs a tokenizer, and the model has no tokenizer.json beside its weights")
    table = settings(model.config, num_released_modules(model.mtp_config))
    tokens = tokenizer_settings(model.tokenizer, model.config.vocab_size)

    writer = gguf.GGUFWriter(None, ARCHITECTURE)
    general = {"type": "model", "name": "nextn", "quantization_version": gguf.GGML_QUANT_VERSION}
    general["file_type"] = FILE_TYPES[dtype]
    described = {f"general.{key}": value for key, value in general.items()}
    for key, value in (described | {f"{ARCHITECTURE}.{key}": value for key, value in table.items()} | tokens).items():
        writer.add_key_value(key, value, _value_type(gguf, value))
    counts: Counter[str] = Counter()
    for name, tensor in named_tensors(model.state_dict(), model.config):
        kind = gguf.GGMLQuantizationType[_stored_type(name, tensor, dtype)]
        writer.add_tensor(name, gguf.quantize(tensor.detach().contiguous().numpy(), kind), raw_dtype=kind)
        counts[kind.name] += 1
    _write_whole(writer, file)
    return dict(counts)


def _stored_type(name: str, tensor: Tensor, dtype: str) -> str:
    if tensor.dim() == 1 or name.endswith("ffn_gate_inp.weight"):
        return "F32"
    if dtype == "q8_0" and tensor.shape[-1] % 32:
        return "BF16"
    return dtype.upper()


def _value_type(gguf: ModuleType, value: Any) -> Any:
    types = gguf.GGUFValueType
    by_type = {bool: types.BOOL, int: types.UINT32, float: types.FLOAT32, str: types.STRING, list: types.ARRAY}
    return by_type[type(value)]


def _write_whole(writer: Any, file: Path) -> None:
    """Under a temporary name beside its place, then renamed."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            writer.write_header_to_file(temporary)
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot write {file}: {error.strerror or error}") from error


# ------------------------------------------------------------------------------------------------------------- reading


class GgufFile:
    """A GGUF file: settings and tensors' names, shapes and types from its header; tensors one at a time.

    >>> file = GgufFile(Path("demo.gguf"))  # doctest: +SKIP
    >>> file.metadata["deepseek2.nextn_predict_layers"], file.shape("output.weight")  # doctest: +SKIP
    (1, (257, 192))
    """

    def __init__(self, path: Path) -> None:
        """Map the file and read its header.

        Raises:
            CheckpointError: missing, truncated, or no GGUF file; or the `gguf` package is missing.
        """
        self.path = path
        self._gguf = _gguf(CheckpointError)
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist")
        with path.open("rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise CheckpointError(f"{path} is not a GGUF file: it begins with {magic!r}, wanted b'GGUF'")
        try:
            self._reader = self._gguf.GGUFReader(path)
        except (ValueError, IndexError, KeyError, OSError, OverflowError, MemoryError) as error:
            raise CheckpointError(
                f"{path} is truncated or damaged ({error}); it has {path.stat().st_size} bytes. Copy or export it again"
            ) from None
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """All settings, by full name, for example `deepseek2.block_count`; arrays are lists."""
        fields = self._reader.fields.items()
        return {key: field.contents() for key, field in fields if not key.startswith("GGUF.")}

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor's name, sorted."""
        return tuple(sorted(self._tensors))

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape in torch's order: [out, in] for a matrix, [E, out, in] for experts."""
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def dtype(self, name: str) -> str:
        """Its type in GGUF's words: F32, BF16, Q8_0, Q4_K, ..."""
        return str(self._tensors[name].tensor_type.name)

    def read(self, name: str) -> Tensor:
        """The tensor, float32 whatever its type. Raises CheckpointError for a type the `gguf` package cannot decode."""
        tensor = self._tensors[name]
        try:
            values = self._gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise CheckpointError(f"{self.path}: {name} has type {self.dtype(name)}, which cannot be decoded") from None
        return torch.tensor(values, dtype=torch.float32).reshape(self.shape(name))


def _gguf(error_class: type[NextnError]) -> ModuleType:
    try:
        import gguf
    except ImportError:
        raise error_class("GGUF files need the package gguf: pip install gguf") from None
    return gguf
