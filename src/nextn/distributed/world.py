"""What the trainer asks about the processes of a run, and its answer for one process."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor


class World(Protocol):
    """The processes of one run; every process asks its own.

    What is summed must be a share of a sum over the whole batch, so that the result does not depend on how many
    processes there are.
    """

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        ...

    @property
    def is_writer(self) -> bool:
        """True in the one process that writes metrics, checkpoints and progress."""
        ...

    def rows(self, num_rows: int) -> slice:
        """This process's rows of a batch of `num_rows` rows; those of all processes are the batch, in order."""
        ...

    def sum(self, share: Tensor) -> Tensor:
        """The sum over all processes of what each of them has, the same in each: any shape and dtype."""
        ...

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Put the sum over all processes in the place of each parameter's gradient, where there is one."""
        ...

    def global_norm(self, gradients: Iterable[Tensor]) -> Tensor:
        """Euclidean norm of the gradients of the whole model taken as one vector, float scalar."""
        ...


class OneProcess:
    """A run in one process on one device.

    >>> world = OneProcess(torch.device("cpu"))
    >>> world.rows(8), world.is_writer, world.sum(torch.tensor(3)).item()
    (slice(0, 8, None), True, 3)
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_writer = True

    def rows(self, num_rows: int) -> slice:
        """All of them."""
        return slice(0, num_rows)

    def sum(self, share: Tensor) -> Tensor:
        """The share itself: it is the whole."""
        return share

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """They are sums already."""

    def global_norm(self, gradients: Iterable[Tensor]) -> Tensor:
        """Euclidean norm of all of them taken as one vector."""
        return torch.nn.utils.get_total_norm(list(gradients))
