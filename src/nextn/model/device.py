"""Resolve devices by name, and require a compiler where compiled code is to run."""

from __future__ import annotations

import os
import re
import shutil

import torch

from nextn.errors import DeviceError


def resolve_device(name: str) -> torch.device:
    """The device called `name`: `cpu`, `cuda`, `cuda:N` (N 0-based), or `auto`: the first CUDA device, else the CPU.

    Raises:
        DeviceError: the name is unknown or the device is absent; the message names the devices that are here.
    """
    num_cuda_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda", 0) if num_cuda_devices else torch.device("cpu")
    if name == "cpu":
        return torch.device("cpu")
    here = ", ".join(["cpu", *(f"cuda:{index}" for index in range(num_cuda_devices))])
    match = re.fullmatch(r"cuda(?::(\d+))?", name)
    if match is None:
        raise DeviceError(f"unknown device {name!r}: use auto, cpu, cuda or cuda:N; this machine has: {here}")
    index = int(match[1] or 0)
    if index >= num_cuda_devices:
        raise DeviceError(f"device {name!r} is not here: this machine has: {here}")
    return torch.device("cuda", index)


def require_compiler(device: torch.device, what: str, instead: str) -> None:
    """Raise DeviceError unless torch.compile has the C++ compiler it needs on a CPU (`CXX`, g++, clang++ or c++).

    Args:
        device: where compiled code is to run.
        what: the thing that needs it, for the message.
        instead: how to do without.
    """
    candidates = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    if device.type == "cpu" and not any(shutil.which(candidate) for candidate in candidates if candidate):
        raise DeviceError(
            f"on a CPU {what} needs a C++ compiler, and none of $CXX, g++, clang++, c++ was found; "
            f"install one (Debian: apt-get install g++) or {instead}"
        )
