"""Where a result comes from: code, libraries, machine, data, seed and command line, without naming anyone's computer.

Host names, user names and absolute paths are left out, so that a report can be shown to strangers.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("torch", "numpy", "tokenizers", "safetensors")
_PART = r"[^=,;:/\\]+"  # of a path; blanks belong to it
_ABSOLUTE_PATH = re.compile(
    rf"(?<![\w.~/\\])(?:[A-Za-z]:[\\/]|~?/)(?!/)(?:{_PART}[\\/]+)*?({_PART}|)[\\/]*(?=$|[=,;:])"
)


def collect(
    *, seed: int, device: torch.device | str = "cpu", corpus: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The provenance of a run that is going on now, as a table ready for JSON.

    Args:
        seed: the run's seed.
        device: where the run computes; a CUDA device is named by its model.
        corpus: facts of the data (name, hash, numbers of files), taken over as they are.

    Returns:
        `time_utc` (ISO 8601, whole seconds), `command` (arguments, absolute paths cut to their last part), `seed`,
        `nextn` (version, commit, whether the checkout has changes), `libraries`, `machine`, `corpus`.
        Unknown facts are None.
    """
    return {
        "time_utc": _now(),
        "command": [without_absolute_paths(argument) for argument in _command(sys.argv)],
        "seed": seed,
        "nextn": {"version": _version("nextn"), **git_state(Path(__file__).parent)},
        "libraries": {"python": platform.python_version(), **{name: _version(name) for name in LIBRARIES}},
        "machine": machine(torch.device(device)),
        "corpus": dict(corpus or {}),
    }


def measuring_moment() -> dict[str, Any]:
    """`time_utc` and `num_threads` of a measurement made now, for the provenance of the measured run."""
    return {"time_utc": _now(), "num_threads": torch.get_num_threads()}


def machine(device: torch.device) -> dict[str, Any]:
    """Hardware and operating system: cores usable by this process, memory of the whole machine in bytes."""
    return {
        "os": f"{platform.system()} {platform.release()}",
        "cpu": cpu_model(),
        "num_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None,
        "num_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
    }


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name as Linux gives it; elsewhere what Python's `platform` knows, at least the architecture."""
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def git_state(package_folder: Path) -> dict[str, Any]:
    """`commit` and `has_changes` of the checkout that this package runs from.

    Both are None outside a checkout, without git, and when the package merely lies inside some other project's checkout
    (installed into its virtual environment, say), whose commit says nothing about nextn.
    """
    unknown = {"commit": None, "has_changes": None}
    package_folder = package_folder.resolve()
    top = _git(package_folder, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() / "src" / "nextn" != package_folder:
        return unknown
    commit, changes = _git(package_folder, "rev-parse", "HEAD"), _git(Path(top), "status", "--porcelain")
    return unknown if commit is None or changes is None else {"commit": commit, "has_changes": bool(changes)}


def without_absolute_paths(text: str) -> str:
    """Cut every absolute path in `text` to its last part; relative paths stay.

    >>> without_absolute_paths("data.corpus=/home/ada/novels/emma.txt")
    'data.corpus=…/emma.txt'
    >>> without_absolute_paths("recipes/demo.toml")
    'recipes/demo.toml'
    """
    return _ABSOLUTE_PATH.sub(r"…/\1", text)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _command(arguments: Sequence[str]) -> list[str]:
    """The arguments as typed: the program by name alone, `nextn` for `python -m nextn`."""
    program = Path(arguments[0])
    name = program.parent.name if program.name == "__main__.py" else program.name
    return [name, *arguments[1:]]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):  # no git, not a checkout, or git does not answer
        return None
    return done.stdout.strip()
