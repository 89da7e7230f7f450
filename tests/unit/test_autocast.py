"""Under bfloat16 autocast the products run in bfloat16; routing and cross-entropy stay in float32."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nextn.config import ModelConfig, MTPConfig
from nextn.model.context import document_mask
from nextn.model.kernels import attention
from nextn.model.moe import Experts, GroupedLinear, Router, Routing
from nextn.mtp import MTPModel
from nextn.objective import StepObjective, summed_cross_entropy

SMALL = ModelConfig(
    vocab_size=29,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    n_routed_experts=6,
    num_experts_per_tok=2,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    max_position_embeddings=64,
    initializer_range=0.2,
)
RELATIVE_TOLERANCE = 0.025
"""Norm of the error over norm of the result that a few rounded products may come to: bfloat16 keeps 8 bits (0.4 %)."""


def bfloat16_autocast() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def relative_error(ours: Tensor, exact: Tensor) -> float:
    """Norm of the difference over norm of the exact value."""
    return ((ours.double() - exact.double()).norm() / exact.double().norm()).item()


# -------------------------------------------------------------------------------------------------------------- router


class RouterInBfloat16(Router):
    """Broken: its scores are computed in whatever autocast says."""

    def forward(self, hidden: Tensor) -> Routing:
        scores = F.linear(hidden, self.weight).sigmoid()
        experts = (scores.detach() + self.e_score_correction_bias).topk(self.top_k, dim=-1).indices
        return Routing(scores, scores.gather(1, experts) * self.scaling, experts)


def random_router(router_class: type[Router], **settings) -> Router:
    torch.manual_seed(0)
    router = router_class(ModelConfig(**{**vars(SMALL), **settings}))
    torch.nn.init.normal_(router.weight, std=0.3)
    router.e_score_correction_bias.normal_(std=0.1)
    return router


def gates_with_and_without_autocast(router: Router, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """A dense table [N, E] of the gates each token gives, 0 for unchosen experts: under autocast, and in float32."""
    tables = []
    with torch.no_grad():
        with bfloat16_autocast():
            choices = [router(hidden)]
        choices.append(router(hidden.float()))
    for _, gates, experts in choices:
        tables.append(gates.new_zeros(len(hidden), SMALL.n_routed_experts).scatter_(1, experts, gates))
    return tables[0], tables[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [{"num_experts_per_tok": 6, "norm_topk_prob": False}, {"routed_scaling_factor": 1.7}],
    ids=["scores_of_all_experts", "normalised_gates_of_two"],
)
def test_router_scores_and_gates_are_float32_and_unchanged_by_autocast(dtype: torch.dtype, settings: dict):
    hidden = torch.randn(50, SMALL.hidden_size, generator=torch.Generator().manual_seed(1)).to(dtype)
    router = random_router(Router, **settings)
    under_autocast, without = gates_with_and_without_autocast(router, hidden)
    assert under_autocast.dtype == torch.float32
    assert torch.equal(under_autocast, without)
    exact = (hidden.double() @ router.weight.detach().double().T).sigmoid()
    if router.normalise:
        exact = exact * (without > 0)
        exact = 1.7 * exact / exact.sum(-1, keepdim=True)
    torch.testing.assert_close(under_autocast.double(), exact, rtol=1e-5, atol=0)


def test_a_router_that_lets_autocast_round_its_scores_is_noticed():
    hidden = torch.randn(50, SMALL.hidden_size, generator=torch.Generator().manual_seed(1))
    router = random_router(RouterInBfloat16, num_experts_per_tok=6)
    rounded, exact = gates_with_and_without_autocast(router, hidden)
    assert rounded.dtype == torch.bfloat16
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(rounded.float(), exact, rtol=1e-5, atol=0)


# ------------------------------------------------------------------------------------------------------- cross-entropy


def exact_cross_entropy(logits: Tensor, labels: Tensor) -> float:
    """Sum of -log softmax(logits)[label] over counted labels, one by one in Python's own floats."""
    total = 0.0
    for row, label in zip(logits.double().flatten(0, -2).tolist(), labels.flatten().tolist(), strict=True):
        if label != -100:
            largest = max(row)
            total += largest + math.log(sum(math.exp(value - largest) for value in row)) - row[label]
    return total


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cross_entropy_is_computed_in_float32_from_logits_of_any_dtype(dtype: torch.dtype, autocast: bool):
    generator = torch.Generator().manual_seed(2)
    logits = (4 * torch.randn(3, 40, 29, generator=generator)).to(dtype)
    labels = torch.randint(0, 29, (3, 40), generator=generator)
    labels[1, ::3] = -100
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = summed_cross_entropy(logits, labels)
    exact = exact_cross_entropy(logits, labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact, rel=1e-6)
    in_bfloat16 = F.cross_entropy(logits.bfloat16().flatten(0, 1), labels.flatten(), reduction="sum")
    assert in_bfloat16.item() != pytest.approx(exact, rel=1e-4), "a sum in bfloat16 must be noticed"


def test_the_losses_of_a_model_under_autocast_are_float32_sums_over_its_bfloat16_logits():
    model = MTPModel(SMALL, MTPConfig(num_depths=2)).initialize(0).train()
    ids = torch.randint(0, SMALL.vocab_size, (3, 20), generator=torch.Generator().manual_seed(3))
    with bfloat16_autocast():
        out = model(ids, objective=StepObjective((0.5, 0.25)))
    assert {logits.dtype for logits in out.logits_per_depth} == {torch.bfloat16}
    assert out.loss.dtype == out.loss_per_depth.dtype == torch.float32
    exact = []
    for depth, logits in enumerate(out.logits_per_depth):
        labels = ids[:, depth + 1 :]
        exact.append(exact_cross_entropy(logits[:, : labels.shape[1]], labels) / labels.numel())
    assert out.loss_per_depth.tolist() == pytest.approx(exact, rel=1e-6)
    assert out.loss.item() == pytest.approx(exact[0] + 0.5 * exact[1] + 0.25 * exact[2], rel=1e-6)
    out.loss.backward()
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}


# ------------------------------------------------------------------------------------------------------------- experts


def expert_case() -> tuple[Experts, Tensor, Tensor, Tensor]:
    torch.manual_seed(4)
    experts = Experts(6, 32, 24)
    for weight in experts.parameters():
        torch.nn.init.normal_(weight, std=32**-0.5)
    return experts, torch.randn(30, 32), torch.rand(30, 2), torch.rand(30, 6).topk(2).indices


def test_grouped_experts_multiply_in_bfloat16_and_agree_with_the_float32_formula_and_its_gradients():
    experts, hidden, gates, chosen = expert_case()
    towards = torch.randn(30, 32)
    results = []
    for in_bfloat16 in (True, False):
        leaves = [hidden.clone().requires_grad_(), gates.clone().requires_grad_()]
        experts.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=in_bfloat16):
            out = (experts if in_bfloat16 else experts.reference)(*leaves, chosen)
        (out.float() * towards).sum().backward()
        grads = [leaf.grad for leaf in leaves] + [weight.grad.clone() for weight in experts.parameters()]
        results.append([out.detach(), *grads])
    ours, exact = results
    assert ours[0].dtype == torch.bfloat16
    assert {grad.dtype for grad in ours[1:]} == {torch.float32}
    for mine, expected in zip(ours, exact, strict=True):
        assert 1e-5 < relative_error(mine, expected) < RELATIVE_TOLERANCE  # above 0: it was computed in bfloat16


def test_one_grouped_product_is_that_of_operands_rounded_to_bfloat16():
    torch.manual_seed(6)
    rows, weight, num_rows = torch.randn(40, 32), torch.randn(3, 24, 32), [16, 0, 24]
    with bfloat16_autocast():
        out = GroupedLinear.apply(rows, weight, num_rows)
    assert out.dtype == torch.bfloat16
    assert GroupedLinear.apply(rows, weight, num_rows).dtype == torch.float32, "without autocast nothing is rounded"
    cast, matrices = rows.bfloat16().double(), weight.bfloat16().double()
    rounded = torch.cat([cast[:16] @ matrices[0].T, cast[16:] @ matrices[2].T])
    torch.testing.assert_close(out.double(), rounded, rtol=2**-8, atol=1e-5)


def test_a_few_tokens_in_evaluation_multiply_in_bfloat16_too():
    experts, hidden, gates, chosen = expert_case()
    few = slice(0, 8)
    with torch.no_grad():
        exact = experts.reference(hidden[few], gates[few], chosen[few])
        with bfloat16_autocast():
            ours = experts(hidden[few], gates[few], chosen[few])
    assert ours.dtype == torch.bfloat16
    assert relative_error(ours, exact) < RELATIVE_TOLERANCE


@pytest.mark.parametrize("mistake", ["gates forgotten", "next expert"])
def test_a_broken_dispatch_is_far_outside_the_tolerance(mistake: str):
    experts, hidden, gates, chosen = expert_case()
    wrong_gates = torch.ones_like(gates) if mistake == "gates forgotten" else gates
    wrong_choice = (chosen + 1) % 6 if mistake == "next expert" else chosen
    with bfloat16_autocast():
        wrong = experts(hidden, wrong_gates, wrong_choice)
    assert relative_error(wrong, experts.reference(hidden, gates, chosen)) > 10 * RELATIVE_TOLERANCE


# ----------------------------------------------------------------------------------------------------------- attention

SCALE = 16**-0.5
DOCUMENTS = torch.tensor([[0] * 10 + [1] * 14 + [2] * 8, [3] * 25 + [-1] * 7])


def attention_errors(masked: bool, scale: float = SCALE, ignore_mask: bool = False) -> list[float]:
    """Relative errors of the bfloat16 output and of the gradients of query, key and value, against float64."""
    generator = torch.Generator().manual_seed(5)
    query, key = torch.randn(2, 2, 3, 32, 16, generator=generator).bfloat16()
    value = torch.randn(2, 3, 32, 12, generator=generator).bfloat16()
    towards = torch.randn(2, 3, 32, 12, generator=generator).bfloat16()
    mask = document_mask(DOCUMENTS) if masked else None

    exact_leaves = [x.double().requires_grad_() for x in (query, key, value)]
    visible = torch.ones(32, 32, dtype=torch.bool).tril() if mask is None else mask
    scores = SCALE * exact_leaves[0] @ exact_leaves[1].transpose(-1, -2)
    exact = scores.masked_fill(~visible, -math.inf).softmax(-1) @ exact_leaves[2]
    exact.backward(towards.double())

    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    given_mask = torch.ones(1, 1, 32, 32, dtype=torch.bool) if ignore_mask else mask
    ours = attention(*leaves, given_mask, scale)
    assert ours.dtype == torch.bfloat16
    assert type(ours.grad_fn).__name__ == "MaterialisedAttentionBackward", "the kernel under test was not used"
    ours.backward(towards)
    pairs = [(ours, exact), *((leaf.grad, other.grad) for leaf, other in zip(leaves, exact_leaves, strict=True))]
    return [relative_error(mine.detach(), expected.detach()) for mine, expected in pairs]


@pytest.mark.parametrize("masked", [False, True])
def test_materialised_attention_in_bfloat16_agrees_with_float64_in_values_and_gradients(masked: bool):
    assert max(attention_errors(masked)) < RELATIVE_TOLERANCE


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mistake", [{"scale": 1.0}, {"ignore_mask": True}])
def test_attention_with_a_wrong_scale_or_without_its_mask_is_outside_the_tolerance(masked: bool, mistake: dict):
    assert min(attention_errors(masked, **mistake)) > 2 * RELATIVE_TOLERANCE
