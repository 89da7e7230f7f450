"""The chunked loss never holds the logits of a whole batch, forward or backward, however many depths there are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nextn.mtp import MTPModel
from nextn.objective import HeadInput, StepObjective, chunked_losses

from .test_chunked_loss import Case, plain_losses
from .test_mtp_laws import TINY, VARIANTS, tokens


class LargestTensor(TorchDispatchMode):
    """Notes the size, in elements, of the largest storage behind any tensor that an operation returns."""

    num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                size = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.num_elements = max(self.num_elements, size)
        return out


@pytest.mark.parametrize("num_depths", [0, 4])
def test_no_tensor_of_the_chunked_loss_is_larger_than_a_chunk_of_logits(num_depths: int):
    num_rows, length, width, vocab_size, chunk_size = 4, 48, 8, 97, 24
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocab_size, width, generator=generator).requires_grad_()
    shape = (num_rows, length)
    hidden = [torch.randn(*shape, width, generator=generator).requires_grad_() for _ in range(num_depths + 1)]
    ids = torch.randint(0, vocab_size, shape, generator=generator)
    coefficients = torch.full(shape, 0.01)
    weights = (1.0,) * (num_depths + 1)
    case = Case(
        [HeadInput(h, weight) for h in hidden], [ids] * len(weights), [coefficients] * len(weights), weights, []
    )
    limit = max(chunk_size * vocab_size, vocab_size * width, num_rows * length * width)

    def check(losses: Callable[[], tuple[Tensor, Tensor]]) -> None:
        with LargestTensor() as largest:
            losses()[0].backward()
        assert 0 < largest.num_elements <= limit, "all logits were held"

    check(lambda: chunked_losses(case.inputs, case.labels, case.coefficients, weights, chunk_size))
    with pytest.raises(AssertionError, match="all logits"):
        check(lambda: plain_losses(case))
    with pytest.raises(AssertionError, match="all logits"):
        check(lambda: chunked_losses(case.inputs, case.labels, case.coefficients, weights, num_rows * length))


@pytest.mark.parametrize("variant", VARIANTS)
def test_in_no_scheme_does_a_training_step_hold_the_logits_of_a_depth(variant: str):
    model = MTPModel(replace(TINY, vocab_size=1500), VARIANTS[variant]).initialize(seed=1).train()
    ids = tokens(4, 32)

    def largest(chunk_size: int | None) -> int:
        with LargestTensor() as mode:
            model(ids, objective=StepObjective((0.1,) * 3, chunk_size=chunk_size)).loss.backward()
        return mode.num_elements

    smallest_logits = 4 * (32 - 3) * 1500
    assert largest(8) < smallest_logits / 2
    assert largest(None) >= smallest_logits
