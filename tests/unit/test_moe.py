"""Experts: every fast form equals the formula; balancing moves biases only, by the whole batch's load."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nextn.config import ModelConfig
from nextn.model.balancing import ExpertUsage, balance_loss, update_routing_biases
from nextn.model.moe import Experts, MixtureOfExperts, Router
from tests.e2e.tiny_run import recipe_with, trainer

SMALL = ModelConfig(vocab_size=11, hidden_size=16, moe_intermediate_size=12, n_routed_experts=6, num_experts_per_tok=2)


def random_experts(num_experts: int = 6, dtype: torch.dtype = torch.float64) -> Experts:
    torch.manual_seed(0)
    experts = Experts(num_experts, 16, 12).to(dtype)
    torch.nn.init.normal_(experts.gate_up_proj)
    torch.nn.init.normal_(experts.down_proj)
    return experts


def random_choice(num_tokens: int, num_experts: int = 6, top_k: int = 2, dtype: torch.dtype = torch.float64):
    torch.manual_seed(1)
    hidden = torch.randn(num_tokens, 16, dtype=dtype)
    gates = torch.rand(num_tokens, top_k, dtype=dtype)
    experts = torch.rand(num_tokens, num_experts).topk(top_k).indices
    return hidden, gates, experts


@pytest.mark.parametrize("num_tokens", [1, 5, 40])
def test_sorted_and_dense_forms_equal_the_formula(num_tokens: int):
    experts = random_experts()
    hidden, gates, chosen = random_choice(num_tokens)
    expected = experts.reference(hidden, gates, chosen)
    torch.testing.assert_close(experts._run_sorted(hidden, gates, chosen), expected)
    torch.testing.assert_close(experts._run_all(hidden, gates, chosen), expected)


def test_gradients_equal_those_of_the_formula_also_for_an_expert_without_tokens():
    experts = random_experts()
    hidden, gates, chosen = random_choice(9, num_experts=5)  # expert 5 gets nothing
    results = []
    for run in (experts.reference, experts._run_sorted):
        leaves = [hidden.clone().requires_grad_(), gates.clone().requires_grad_()]
        experts.zero_grad()
        run(*leaves, chosen).square().sum().backward()
        results.append([leaf.grad for leaf in leaves] + [w.grad.clone() for w in experts.parameters()])
    for ours, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, expected)
    assert not results[1][2][5].any()


def test_the_routing_bias_changes_the_choice_but_not_the_gate():
    torch.manual_seed(2)
    router = Router(replace(SMALL, num_experts_per_tok=1, norm_topk_prob=False))
    torch.nn.init.normal_(router.weight)
    hidden = torch.randn(20, 16)
    before = router(hidden).experts
    router.e_score_correction_bias[3] = 10.0
    _, gates, after = router(hidden)
    assert (after == 3).all()
    assert not (before == 3).all()
    torch.testing.assert_close(gates[:, 0], (hidden @ router.weight[3]).sigmoid())


def test_a_token_chooses_only_inside_its_best_groups():
    torch.manual_seed(3)
    config = replace(SMALL, n_routed_experts=8, n_group=4, topk_group=1, num_experts_per_tok=2)
    router = Router(config)
    torch.nn.init.normal_(router.weight)
    experts = router(torch.randn(50, 16)).experts
    assert (experts[:, 0] // 2 == experts[:, 1] // 2).all()


def test_biases_move_by_gamma_against_the_load_of_the_whole_batch():
    layer = MixtureOfExperts(SMALL)
    update_routing_biases(layer, {"": torch.tensor([9, 1, 5, 5, 5, 5])}, speed=0.01)
    expected = torch.tensor([-0.01, 0.01, 0, 0, 0, 0])
    torch.testing.assert_close(layer.gate.e_score_correction_bias, expected)


def load_of(layer: MixtureOfExperts, hidden: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    usage = ExpertUsage(mask, with_balance=False)
    layer(hidden, usage)
    return usage.loads[layer]


def test_load_is_the_same_for_any_split_into_micro_batches_and_leaves_padding_out():
    torch.manual_seed(4)
    layer = MixtureOfExperts(SMALL)
    torch.nn.init.normal_(layer.gate.weight)
    hidden, mask = torch.randn(4, 7, 16), torch.rand(4, 7) < 0.7
    whole = load_of(layer, hidden, mask)
    rows = [load_of(layer, hidden[row : row + 1], mask[row : row + 1]) for row in range(4)]
    assert torch.equal(torch.stack(rows).sum(0), whole)
    assert whole.sum() == 2 * mask.sum()
    assert not torch.equal(load_of(layer, hidden), whole), "counting padding must be noticed"


def test_a_layer_that_runs_again_in_one_context_is_counted_once():
    layer, usage = MixtureOfExperts(SMALL), ExpertUsage(None, with_balance=True)
    for _ in range(2):
        layer(torch.ones(1, 5, 16), usage)
    assert usage.loads[layer].sum() == 2 * 5
    torch.testing.assert_close(usage.balances[layer], torch.tensor(1.0))


def test_speed_zero_and_layers_without_tokens_leave_the_biases_alone():
    layer = MixtureOfExperts(SMALL)
    update_routing_biases(layer, {"": torch.tensor([9, 1, 5, 5, 5, 5])}, speed=0.0)
    update_routing_biases(layer, {"": torch.zeros(6, dtype=torch.int64)}, speed=0.1)
    assert not layer.gate.e_score_correction_bias.any()


def biases_after_training(run_folder: Path, balance_mtp_blocks: bool) -> dict[str, list[float]]:
    """Routing biases by layer after three steps."""
    run = trainer(run_folder, recipe_with(training={"balance_mtp_blocks": balance_mtp_blocks}))
    run.model.train()
    for _ in range(3):
        run.step()
    return {name: b.tolist() for name, b in run.model.named_buffers() if name.endswith("e_score_correction_bias")}


def check_only_the_trunk_is_balanced(biases: dict[str, list[float]]) -> None:
    assert {name.split(".")[0] for name in biases} == {"trunk", "scheme"}
    for name, values in biases.items():
        assert any(values) == name.startswith("trunk."), name


def test_mtp_blocks_that_are_not_to_be_balanced_keep_their_biases_while_the_trunks_move(tmp_path: Path):
    check_only_the_trunk_is_balanced(biases_after_training(tmp_path, balance_mtp_blocks=False))
    with pytest.raises(AssertionError, match="scheme"):
        check_only_the_trunk_is_balanced(biases_after_training(tmp_path, balance_mtp_blocks=True))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(2, 6))
def test_the_sequence_wise_balance_loss_is_equations_17_to_20_written_out(seed: int, top_k: int, num_experts: int):
    generator = torch.Generator().manual_seed(seed)
    top_k = min(top_k, num_experts)
    scores = torch.rand(2, 5, num_experts, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, 5, generator=generator) < 0.8
    expected = []
    for row in range(2):
        tokens = [scores[row, t] for t in range(5) if mask[row, t]]
        total = 0.0
        for expert in range(num_experts):
            chosen = sum(expert in sorted(range(num_experts), key=lambda e: -t[e])[:top_k] for t in tokens)
            share = sum(float(t[expert] / t.sum()) for t in tokens)
            if tokens:
                total += num_experts / (top_k * len(tokens)) * chosen * share / len(tokens)
        expected.append(total)
    torch.testing.assert_close(balance_loss(scores, top_k, mask), torch.tensor(expected, dtype=torch.float64))


def test_the_balance_loss_pushes_probability_away_from_busy_experts():
    logits = torch.tensor([[[2.0, 0.0, 0.0], [1.5, 0.0, 0.5]]], requires_grad=True)
    balance_loss(logits.sigmoid(), top_k=1).sum().backward()
    assert (logits.grad[..., 0] > 0).all(), "descending the gradient lowers the busy expert's score"
    assert (logits.grad[..., 1] < 0).all()


def test_balancing_evens_out_a_skewed_router():
    torch.manual_seed(5)
    layer = MixtureOfExperts(SMALL).train()
    torch.nn.init.normal_(layer.gate.weight)
    hidden = torch.randn(1, 512, 16) + torch.randn(16)
    shares = []
    for _ in range(300):
        with torch.no_grad():
            load = load_of(layer, hidden)
        update_routing_biases(layer, {"": load}, speed=0.01)
        shares.append((load.max() / load.float().mean()).item())
    assert shares[0] > 1.5
    assert shares[-1] < 1.2


def test_nothing_of_a_layers_second_run_in_one_context_is_kept_alive():
    layer, usage = MixtureOfExperts(SMALL), ExpertUsage(None, with_balance=True)
    layer(torch.ones(1, 5, 16), usage)
    first = usage.loads[layer], usage.balances[layer]
    layer(torch.ones(1, 5, 16), usage)
    assert (usage.loads[layer] is first[0], usage.balances[layer] is first[1]) == (True, True)
