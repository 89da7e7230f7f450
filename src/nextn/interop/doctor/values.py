"""Check that stored values are those of a trained module: statistics of one tensor at a time, and invariants on them.

An invariant takes the statistics of an MTP module's tensors, by name, and gives the findings that they call for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nextn.interop.doctor.finding import Finding, Severity, some
from nextn.interop.doctor.invariants import SCALE_TAILS
from nextn.mtp.layout import LARGEST_PLAUSIBLE

TINY = 1e-30
"""Trained weights are zero or larger than this; random memory read as floats is often smaller."""

LARGEST_SHARE_TINY = 0.1

PLAUSIBLE_NORM = (1e-3, 1e2)
"""Root mean square of a trained norm's weights."""

SMALLEST_HALF = 1e-3
"""Root mean square of one half of eh_proj relative to the other below which it hardly reads that input."""

_CHUNK = 1 << 22
_RETRAIN = "take these tensors from the original checkpoint, or train the modules again"


@dataclass(frozen=True)
class TensorStatistics:
    """A tensor in a few numbers.

    Attributes:
        shape: its shape.
        num_not_finite: NaNs and infinities.
        smallest, largest: of the finite values; 0 where there are none.
        rms: root of the mean square of the finite values.
        share_tiny: share of values that are not zero and below `TINY` in size (subnormal, or near it).
    """

    shape: tuple[int, ...]
    num_not_finite: int
    smallest: float
    largest: float
    rms: float
    share_tiny: float

    @classmethod
    def of(cls, tensor: Tensor) -> TensorStatistics:
        """Of a tensor of any float dtype, FP8 included, by pieces of some million values."""
        num_finite, num_tiny, squares = 0, 0, 0.0
        smallest, largest = math.inf, -math.inf
        for piece in tensor.reshape(-1).split(_CHUNK):
            values = piece.double() if piece.dtype == torch.float64 else piece.float()
            values = values[values.isfinite()]
            if not values.numel():
                continue
            num_finite += values.numel()
            num_tiny += int(((values != 0) & (values.abs() < TINY)).sum())
            squares += float(values.double().square().sum())
            smallest, largest = min(smallest, float(values.min())), max(largest, float(values.max()))
        if not num_finite:
            smallest = largest = 0.0
        count = max(num_finite, 1)
        missing = tensor.numel() - num_finite
        return cls(tuple(tensor.shape), missing, smallest, largest, math.sqrt(squares / count), num_tiny / count)

    @property
    def is_constant(self) -> bool:
        """Two values or more, and all the same."""
        return self.smallest == self.largest and math.prod(self.shape) > 1

    @property
    def is_zero(self) -> bool:
        """Nothing but zeros."""
        return self.smallest == self.largest == 0.0 and not self.num_not_finite

    @property
    def reach(self) -> float:
        """Largest absolute value."""
        return max(abs(self.smallest), abs(self.largest))


ZERO_CENTRED_NORMS = ("qwen3_next", "qwen3_5")
"""Beginnings of the model types whose norms multiply by 1 + weight (transformers, modeling_qwen3_next.py)."""

Statistics = Mapping[str, TensorStatistics]


def is_norm(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a norm's weight, by its name and shape."""
    return len(shape) == 1 and name.endswith("norm.weight")


def is_bias(name: str) -> bool:
    """Whether zeros are a usual value of this tensor."""
    return name.endswith(("bias", "bias.weight"))


def is_router(name: str) -> bool:
    """Whether a tensor scores experts; zeros choose among them by bias alone."""
    return name.endswith((".gate.weight", "ffn_gate_inp.weight"))


def not_finite(statistics: Statistics) -> list[Finding]:
    """NaN or infinity anywhere, routing biases included."""
    names = [name for name, found in statistics.items() if found.num_not_finite]
    return _group(names, statistics, "problem", "MTP not finite", "NaN or infinite values in {names}", _RETRAIN)


def uninitialised(statistics: Statistics) -> list[Finding]:
    """Values that no training gives: beyond `LARGEST_PLAUSIBLE`, or many near the smallest floats."""
    names = [
        name
        for name, found in statistics.items()
        if found.reach > LARGEST_PLAUSIBLE or found.share_tiny > LARGEST_SHARE_TINY
    ]
    reach = max((statistics[name].reach for name in names), default=0.0)
    share = max((statistics[name].share_tiny for name in names), default=0.0)
    if reach > LARGEST_PLAUSIBLE:
        detail = f"values up to {reach:.0e} in {{names}}: memory that nobody initialised, not weights"
    else:
        detail = f"up to {share:.0%} of the values lie next to zero (below {TINY:g}) in {{names}}: not weights"
    return _group(names, statistics, "problem", "MTP uninitialised", detail, _RETRAIN)


def zeroed(statistics: Statistics, norms_are_zero_centred: bool = False) -> list[Finding]:
    """Weights that are all zeros. A router of zeros is a warning: a model made of a dense one may have it.

    Args:
        statistics: by name.
        norms_are_zero_centred: the family's norms multiply by 1 + weight, so that zeros change nothing.
    """
    names = [
        name
        for name, found in statistics.items()
        if found.is_zero and not is_bias(name) and not (norms_are_zero_centred and is_norm(name, found.shape))
    ]
    routers = [name for name in names if is_router(name)]
    weights = [name for name in names if name not in routers]
    return _group(
        weights, statistics, "problem", "MTP zeroed", "nothing but zeros in {names}", _RETRAIN
    ) + _group(
        routers,
        statistics,
        "warning",
        "router of zeros",
        "{names}: experts are chosen by their biases alone, whatever the token",
        "right for experts that are always on (a dense model stored as one with experts); otherwise train again",
    )  # fmt: skip


def constant(statistics: Statistics) -> list[Finding]:
    """Matrices of one value other than zero. The factors of a quantised matrix may well be equal."""
    matrices = {n: found for n, found in statistics.items() if len(found.shape) > 1 and not n.endswith(SCALE_TAILS)}
    names = [name for name, found in matrices.items() if found.is_constant and not found.is_zero]
    return _group(names, statistics, "problem", "MTP constant", "one value everywhere in {names}", _RETRAIN)


def norms(statistics: Statistics, norms_are_zero_centred: bool = False) -> list[Finding]:
    """Norms of a size that training does not give. Those not finite, uninitialised or zeros have their own findings."""
    if norms_are_zero_centred:
        return []
    smallest, largest = PLAUSIBLE_NORM
    found = {name: one for name, one in statistics.items() if is_norm(name, one.shape)}
    odd = [n for n, one in found.items() if 0 < one.rms < smallest or largest < one.rms <= LARGEST_PLAUSIBLE]
    detail = f"root mean square outside {smallest:g}..{largest:g} in {{names}}"
    return _group(odd, found, "warning", "norms odd", detail, "compare them with the original checkpoint")


def norms_as_initialised(modules: Mapping[int, Statistics], norms_are_zero_centred: bool = False) -> list[Finding]:
    """Modules (by number) none of whose norms has moved from where training begins."""
    fresh = 0.0 if norms_are_zero_centred else 1.0
    untouched = []
    for module, statistics in modules.items():
        found = [one for name, one in statistics.items() if is_norm(name, one.shape)]
        if found and all(one.smallest == one.largest == fresh for one in found):
            untouched.append(f"module {module}")
    if not untouched:
        return []
    detail = f"every norm of {some(untouched)} is exactly {fresh:g} everywhere: was it ever trained?"
    fix = "`nextn doctor --measure` shows whether it predicts anything"
    return [Finding("warning", "norms as initialised", detail, fix)]


def fusion_halves(
    name: str, first: TensorStatistics, second: TensorStatistics, order: tuple[str, str]
) -> list[Finding]:
    """The two halves of eh_proj's columns: one that is zero leaves half of the input unread.

    Args:
        name: of eh_proj's weight, [C, 2C].
        first, second: of its columns 0..C-1 and C..2C-1.
        order: what they read, such as ("embedding", "hidden state").
    """
    halves = ((order[0], first, second), (order[1], second, first))
    for read, half, other in halves:
        if half.is_zero and not other.is_zero:
            return [Finding("problem", "MTP half blind", f"{name}: the half that reads the {read} is zeros", _RETRAIN)]
        if 0 < half.rms < SMALLEST_HALF * other.rms:
            ratio = f"{half.rms / other.rms:.0e} of the other's size"
            return [
                Finding(
                    "warning",
                    "MTP half blind",
                    f"{name}: the half that reads the {read} has {ratio}",
                    "compare it with the original checkpoint; `nextn doctor --measure` shows what it costs",
                )
            ]
    return []


def copy_of_trunk(is_copy: bool, module: int, layer: int) -> list[Finding]:
    """A block whose matrix is the trunk's, bit for bit: put there and never trained."""
    if not is_copy:
        return []
    return [
        Finding(
            "warning",
            "MTP copies the trunk",
            f"the block of module {module} is a bit-for-bit copy of trunk layer {layer}: grafted and never trained?",
            "train it; `nextn doctor --measure` shows whether it predicts anything",
        )
    ]


def _group(
    names: list[str], statistics: Statistics, severity: Severity, what: str, detail: str, how_to_fix: str
) -> list[Finding]:
    """One finding for all the tensors concerned, none where there are none."""
    if not names:
        return []
    share = f"{len(names)} of {len(statistics)} tensors ({some(names)})" if len(names) > 1 else names[0]
    return [Finding(severity, what, detail.format(names=share), how_to_fix)]
