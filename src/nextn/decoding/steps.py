"""Decoding steps, eager or compiled. A step is a function of tensors whose shapes do not change while a batch decodes.

The eager step is the reference: compiled ones are the same functions through `torch.compile`, with CUDA graphs on a
GPU. Layers of one kind are compiled once (`nested_compile_region`), so a deep trunk takes hardly longer to compile than
a shallow one. What a step depends on besides its tensors is its key; under one key nothing changes but tensors' values
and the number of cached positions looked at. So nothing needs to be checked from call to call: the checks alone would
take a third of a small model's step.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from types import FunctionType, MethodType
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")

KEYS_MULTIPLE = {"cpu": 32, "cuda": 256}
"""Cached positions looked at are rounded up to a multiple: for every number of them a CUDA graph is recorded anew."""


class Steps:
    """Runs steps on a device, compiled if asked for.

    Args:
        device: where the model is.
        compiled: through `torch.compile`; the first call of each key then takes seconds to minutes.
        say: told what is being compiled.
    """

    def __init__(self, device: torch.device, compiled: bool, say: Callable[[str], None] = lambda _: None):
        self.compiled = compiled
        self._device, self._say = device, say
        self._functions: dict[Hashable, Callable[..., Any]] = {}

    def run(self, step: Callable[P, T], key: tuple[Hashable, ...], *args: P.args, **kwargs: P.kwargs) -> T:
        """step(*args, **kwargs); compiled, if that is asked for, once per `key` and step.

        Args:
            step: a bound method.
            key: all that the step depends on besides the values of its tensors and the length of `key_positions`.
            args, kwargs: its arguments.
        """
        if not self.compiled:
            return step(*args, **kwargs)
        name = getattr(step, "__name__", "step").strip("_")
        full_key = (id(getattr(step, "__self__", None)), name, *key)
        if full_key not in self._functions:
            self._say(f"compiling {name}")
            self._functions[full_key] = self._compile(step)
            # What differs from key to key must not be taken for something that varies under one key.
            with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
                return cast(T, self._functions[full_key](*args, **kwargs))
        return cast(T, self._functions[full_key](*args, **kwargs))

    def key_positions(self, all_positions: Tensor, num_keys: int) -> Tensor:
        """The first cached positions, at least `num_keys`: rounded up, and marked as the dimension that varies.

        Args:
            all_positions: 0..capacity-1, int64 [capacity].
            num_keys: positions that hold something.
        """
        if not self.compiled:
            return all_positions[:num_keys]
        multiple = KEYS_MULTIPLE.get(self._device.type, 256)
        positions = all_positions[: -(-num_keys // multiple) * multiple]
        if len(positions) > 1:
            torch._dynamo.maybe_mark_dynamic(positions, 0)
        return positions

    def _compile(self, step: Callable[..., Any]) -> Callable[..., Any]:
        options: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
        if self._device.type == "cuda":
            options["triton.cudagraphs"] = True
        return torch.compile(_own_code(step), fullgraph=True, options=options)


def _own_code(step: Callable[..., Any]) -> Callable[..., Any]:
    """The same bound method with a code object of its own: that is what compilations are found again by."""
    assert isinstance(step, MethodType), "a step is a bound method"
    function = cast(FunctionType, step.__func__)
    code = function.__code__.replace()
    own = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    own.__kwdefaults__ = function.__kwdefaults__
    return MethodType(own, step.__self__)
