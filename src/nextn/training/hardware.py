"""Which number format a run uses, and why."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch

from nextn.errors import DeviceError


@dataclass(frozen=True)
class Precision:
    """The number format of the matrix products in a run; weights and optimizer state are float32 in every case.

    Attributes:
        name: float32 or bfloat16.
        reason: why this one, for people.
    """

    name: Literal["float32", "bfloat16"]
    reason: str

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """A context in which matrix products on `device` run in this format."""
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.name == "bfloat16")


def resolve_precision(name: Literal["auto", "float32", "bfloat16"], device: torch.device) -> Precision:
    """The precision called `name` on `device`; `auto` is bfloat16 where the hardware multiplies it natively.

    Raises:
        DeviceError: bfloat16 asked of a CUDA device that cannot multiply it. (A CPU without it emulates it, slowly;
            that is allowed when asked for by name, and the reason says so.)
    """
    native = _multiplies_bfloat16(device)
    if name == "float32":
        return Precision("float32", "asked for")
    if name == "bfloat16":
        if not native and device.type == "cuda":
            raise DeviceError(
                f"training.precision = 'bfloat16', but {torch.cuda.get_device_name(device)} does not multiply it; "
                "use training.precision = 'float32'"
            )
        return Precision("bfloat16", "asked for" if native else "asked for; emulated, so float32 may be faster")
    if native:
        return Precision("bfloat16", f"this {device.type} device multiplies it natively")
    return Precision("float32", f"this {device.type} device does not multiply bfloat16 natively")


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    # AMX and AVX512-BF16 are the x86 instructions that multiply bfloat16; torch has had these two queries since 2.5.
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
