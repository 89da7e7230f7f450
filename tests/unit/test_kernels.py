"""The training kernels equal their plain references, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nextn.model import kernels
from nextn.model.context import document_mask
from nextn.model.kernels import MaterialisedAttention, MaterialisedRMSNorm


def gradients(run, *inputs: torch.Tensor) -> list[torch.Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = run(*leaves)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("query_block", [1, 4, 9, 64])
@pytest.mark.parametrize("masked", [False, True])
def test_materialised_attention_equals_the_stock_kernel_in_blocks_of_any_size(
    masked: bool, query_block: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(kernels, "QUERY_BLOCK", query_block)
    torch.manual_seed(0)
    query, key = torch.randn(2, 2, 3, 9, 8, dtype=torch.float64)
    value = torch.randn(2, 3, 9, 5, dtype=torch.float64)
    documents = torch.tensor([[0] * 4 + [1] * 5, [0] * 7 + [-1] * 2]) if masked else torch.zeros(2, 9)
    mask = document_mask(documents)
    bias = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, float("-inf"))
    ours = gradients(lambda q, k, v: MaterialisedAttention.apply(q, k, v, bias, 0.3), query, key, value)
    stock = gradients(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask, scale=0.3), query, key, value)
    for mine, expected in zip(ours, stock, strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_materialised_norm_equals_the_stock_norm(dtype: torch.dtype):
    torch.manual_seed(1)
    hidden, weight = 3 * torch.randn(4, 6, 16, dtype=dtype), torch.rand(16, dtype=dtype) + 0.5
    ours = gradients(lambda x, w: MaterialisedRMSNorm.apply(x, w, 1e-5), hidden, weight)
    stock = gradients(lambda x, w: F.rms_norm(x, (16,), w, 1e-5), hidden, weight)
    tolerance = {"rtol": 0.03, "atol": 0.06} if dtype == torch.bfloat16 else {}
    for mine, expected in zip(ours, stock, strict=True):
        torch.testing.assert_close(mine, expected, **tolerance)


def test_a_forgotten_scale_in_the_backward_would_be_noticed():
    torch.manual_seed(2)
    query, key, value = torch.randn(3, 1, 1, 4, 4, dtype=torch.float64)
    bias = torch.zeros(4, 4, dtype=torch.float64)
    stock = gradients(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3), query, key, value)

    class Broken(MaterialisedAttention):
        @staticmethod
        def backward(ctx, grad):
            ctx.scale = 1.0
            return MaterialisedAttention.backward(ctx, grad)

    broken = gradients(lambda q, k, v: Broken.apply(q, k, v, bias, 0.3), query, key, value)
    torch.testing.assert_close(broken[0], stock[0])
    assert not torch.allclose(broken[1], stock[1])
