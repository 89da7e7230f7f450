"""Files that survive: safetensors and JSON, read with clear errors, written whole or not at all.

Everything is written under a temporary name beside its place and renamed when complete, so that a crash, a full disk or
a kill leaves the old state or the new one, never half. Pickle files are refused: reading one can run any code.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nextn.errors import CheckpointError

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends well, and vanishes when it does not.

    An existing folder at `path` is moved aside and removed once the new one stands in its place; a kill between those
    two renames leaves both whole, under names that begin with a dot. Raises CheckpointError when the disk is full or
    the place is not writable.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        temporary.chmod(0o755)
        yield temporary
        for written in (*temporary.rglob("*"), temporary):
            _flush_to_disk(written)
        old = None
        if path.exists():
            old = temporary.with_name(f"{temporary.name}.old")
            path.rename(old)
        try:
            temporary.rename(path)
        except BaseException:
            if old is not None:
                old.rename(path)
            raise
        _flush_to_disk(path.parent)
        if old is not None:
            shutil.rmtree(old)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)


def make_folder(path: Path) -> None:
    """Make a folder and those above it. Raises CheckpointError when that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot make the folder {path}: {error.strerror}") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_text(text, encoding="utf-8")
            _flush_to_disk(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; NaN and infinities are refused, since they are not JSON."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON. Raises CheckpointError when missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file; use inside `atomic_folder`."""
    try:
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, path, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises CheckpointError when missing, truncated, foreign or a pickle."""
    if path.suffix in PICKLE_SUFFIXES:
        raise CheckpointError(
            f"{path} is a pickle file, which can run any code when read; nextn reads safetensors only. Convert it, for "
            "example with safetensors' convert tool, in a place you trust"
        )
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file ({error})") from None


# ---------------------------------------------------------------------------------------------- checkpoints of a run


def checkpoint_folder(run_folder: Path, step: int) -> Path:
    """RUN/checkpoints/step-XXXXXXXX."""
    return run_folder / "checkpoints" / f"step-{step:08d}"


def list_checkpoints(run_folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    folder = run_folder / "checkpoints"
    names = [p.name for p in folder.iterdir() if re.fullmatch(r"step-\d{8,}", p.name)] if folder.is_dir() else []
    return [folder / name for name in sorted(names, key=lambda name: int(name.removeprefix("step-")))]


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
