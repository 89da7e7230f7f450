"""Gradient routing: the trunk as MTP depths see it, with some of its parameters taken as constants.

Values are those of the trunk; only gradients stop. What flows from the trunk's states into the depths is cut where the
states are handed over (`Scheme.forward`), not here.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from torch.func import functional_call

from nextn.config import DetachConfig
from nextn.model import Trunk

NO_DETACH = DetachConfig()
"""Every gradient flows."""


def routed(trunk: Trunk, detach: DetachConfig) -> Trunk:
    """The trunk itself, or a view of it whose embedding, final norm or head receive no gradient."""
    return cast(Trunk, _RoutedTrunk(trunk, detach)) if detach.embedding or detach.head else trunk


class _Constant:
    """A module whose parameters are constants: gradients pass through it to its input alone."""

    def __init__(self, module: nn.Module):
        self._module = module
        self._parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}

    def __call__(self, hidden: Tensor) -> Tensor:
        return functional_call(self._module, self._parameters, (hidden,))


class _RoutedTrunk:
    def __init__(self, trunk: Trunk, detach: DetachConfig):
        self._trunk, self._detach = trunk, detach

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trunk, name)

    def embed(self, token_ids: Tensor) -> Tensor:
        embedded = self._trunk.embed(token_ids)
        return embedded.detach() if self._detach.embedding else embedded

    @property
    def final_norm(self) -> Any:
        return _Constant(self._trunk.final_norm) if self._detach.head else self._trunk.final_norm
