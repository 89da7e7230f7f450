"""Devices by the name a user gives."""

from __future__ import annotations

import re

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
