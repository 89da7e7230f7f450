"""Read and write safetensors and JSON: clear errors, and files that are written whole or not at all.

Everything is written under a temporary name in the same folder and renamed when complete. So a crash, a full disk or a
kill leaves the old state or the new one, never half. Pickle files are refused: reading one can run any code.
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
    """Yield a temporary folder that becomes `path` if the block succeeds, and is removed if it fails.

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
    """Make a folder and those above it. Raises CheckpointError when that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot make the folder {path}: {error.strerror}") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_bytes(content)
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
        path.chmod(0o644)  # safetensors writes for its owner alone; servers run as others
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises CheckpointError when missing, truncated, foreign or a pickle."""
    file = _open(path)
    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


# ------------------------------------------------------------------------------------------------- weights of a model

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000


def write_weights(folder: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write a model's tensors: one file, or shards of at most `max_shard_bytes` and the index that names them.

    A tensor larger than that has a shard of its own. Use inside `atomic_folder`.
    """
    shards: list[dict[str, Tensor]] = [{}]
    num_bytes = 0
    for name, tensor in tensors.items():
        if shards[-1] and num_bytes + tensor.nbytes > max_shard_bytes:
            shards.append({})
            num_bytes = 0
        shards[-1][name] = tensor
        num_bytes += tensor.nbytes
    if len(shards) == 1:
        write_tensors(folder / WEIGHTS_FILE, tensors)
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / file, shard)
        places |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": places})


def add_weights(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Add tensors to a model's files as a further shard, and name all of them in the index.

    Use inside `atomic_folder`. The first files keep what they hold; their names count one shard more.
    """
    if (folder / INDEX_FILE).exists():
        index = read_json(folder / INDEX_FILE)
        slots, num_bytes = dict(index["weight_map"]), index.get("metadata", {}).get("total_size", 0)
    else:
        opened = TensorFiles.open(folder)
        slots = dict.fromkeys(opened.names, WEIGHTS_FILE)
        num_bytes = sum(opened.read(name).nbytes for name in opened.names)
    files = sorted(set(slots.values()))
    names = [f"model-{number:05d}-of-{len(files) + 1:05d}.safetensors" for number in range(1, len(files) + 2)]
    renamed = dict(zip(files, names, strict=False))
    for old, new in renamed.items():
        (folder / old).rename(folder / new)
    write_tensors(folder / names[-1], tensors)
    slots = {name: renamed[file] for name, file in slots.items()} | dict.fromkeys(tensors, names[-1])
    total = num_bytes + sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": slots})


class TensorFiles:
    """The tensors of a model's files, known by their headers and read one at a time.

    >>> files = TensorFiles.open(Path("runs/demo/checkpoints/step-00000400"))  # doctest: +SKIP
    >>> files.shape("lm_head.weight"), files.dtype("lm_head.weight")  # doctest: +SKIP
    ((257, 192), 'F32')
    """

    def __init__(self, files: Mapping[Path, Any]) -> None:
        self._files = dict(files)
        self._places = {name: path for path, file in files.items() for name in file.keys()}  # noqa: SIM118

    @classmethod
    def open(cls, path: Path) -> TensorFiles:
        """Read the headers of a safetensors file, or of those of a folder: one file, or what its index names.

        Raises:
            CheckpointError: nothing there, only pickle files, a truncated or foreign file, a shard missing, a tensor
                that the index places where it is not, or one that it does not name.
        """
        if not path.is_dir():
            return cls({path: _open(path)})
        has_index = (path / INDEX_FILE).exists()
        if (path / WEIGHTS_FILE).exists() and not (has_index and _index_names(path, WEIGHTS_FILE)):
            return cls({path / WEIGHTS_FILE: _open(path / WEIGHTS_FILE)})
        if not has_index:
            pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLE_SUFFIXES)
            found = f"only pickle files ({', '.join(pickles)}), which are refused" if pickles else "none"
            raise CheckpointError(f"{path} should hold weights as {WEIGHTS_FILE} or {INDEX_FILE}; found {found}")
        index = read_json(path / INDEX_FILE)
        places = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
            raise CheckpointError(f"{path / INDEX_FILE} has no 'weight_map' from tensors to files")
        if outside := sorted({file for file in places.values() if Path(file).name != file}):
            raise CheckpointError(f"{path / INDEX_FILE} names a file outside its folder: {outside[0]}")
        if absent := sorted({file for file in places.values() if not (path / file).is_file()}):
            raise CheckpointError(
                f"{path}: {len(absent)} of the files that {INDEX_FILE} names are missing: {absent[0]}"
            )
        opened = cls({path / file: _open(path / file) for file in sorted(set(places.values()))})
        stored = {name: file.name for name, file in opened._places.items()}
        if wrong := sorted(name for name in places.keys() | stored.keys() if places.get(name) != stored.get(name)):
            raise CheckpointError(
                f"{path}: {INDEX_FILE} and the files disagree about {len(wrong)} tensors, for example {wrong[0]}: "
                f"{places.get(wrong[0], 'not named')} in the index, {stored.get(wrong[0], 'nowhere')} in the files"
            )
        return opened

    def __deepcopy__(self, _: Any) -> TensorFiles:
        """Itself: open files cannot be copied, and nothing changes them."""
        return self

    def together_with(self, others: TensorFiles) -> TensorFiles:
        """The tensors of both, which have no name in common."""
        return TensorFiles(self._files | others._files)

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor's name, sorted."""
        return tuple(sorted(self._places))

    @property
    def num_bytes(self) -> int:
        """Size of all files, in bytes."""
        return sum(path.stat().st_size for path in self._files)

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._places[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape, from the header."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Its dtype in safetensors' words: F32, BF16, F8_E4M3, ..."""
        return str(self._slice(name).get_dtype())

    def read(self, name: str) -> Tensor:
        """The tensor itself, on the CPU."""
        return self._files[self._places[name]].get_tensor(name)

    def _slice(self, name: str) -> Any:
        return self._files[self._places[name]].get_slice(name)


def _index_names(folder: Path, file: str) -> bool:
    """The folder's index names that file: it is one shard among others, not a whole model beside an old index."""
    index = read_json(folder / INDEX_FILE)
    slots = index.get("weight_map") if isinstance(index, dict) else None
    return isinstance(slots, dict) and file in slots.values()


def _open(path: Path) -> Any:
    """A safetensors file, its header read. Raises CheckpointError when missing, truncated, foreign or a pickle."""
    if path.suffix in PICKLE_SUFFIXES:
        raise CheckpointError(
            f"{path} is a pickle file, which can run any code when read; nextn reads safetensors only. Convert it, for "
            "example with safetensors' convert tool, in a place you trust"
        )
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    try:
        return safe_open(path, framework="pt")
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
