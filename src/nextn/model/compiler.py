"""Functions with special treatment by torch.compile. Importing this module imports the compiler, which takes seconds.

So only code that is being compiled imports it, inside `if torch.compiler.is_compiling()`. An eager run never does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


@torch.compiler.disable
def call_uncompiled(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call `function(*args, **kwargs)` eagerly, in the middle of compiled code."""
    return function(*args, **kwargs)


@torch.compiler.nested_compile_region
def call_compiled_once(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call `function(*args, **kwargs)`; calls that differ in tensors' values only share one compilation."""
    return function(*args, **kwargs)
