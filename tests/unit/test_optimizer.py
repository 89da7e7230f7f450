from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from nextn.config import OptimizerConfig
from nextn.errors import CheckpointError
from nextn.mtp import MTPModel
from nextn.training.muon import BatchedMuon, orthogonalize
from nextn.training.optimizer import TrainingOptimizer, parameter_roles
from tests.e2e.tiny_run import RECIPE, recipe_with


def random_gradients(shape: tuple[int, ...], num_steps: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(num_steps)]


def step_with(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, gradients: list[Tensor]) -> None:
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()


def matrices_of(stack: Tensor, row_blocks: int) -> list[Tensor]:
    """Each expert's matrices, gate and up apart."""
    return [matrix for expert in stack for matrix in expert.chunk(row_blocks)]


@pytest.mark.parametrize(("shape", "row_blocks"), [((3, 10, 6), 2), ((3, 6, 10), 1), ((4, 32, 8), 2), ((1, 7, 7), 1)])
def test_stepping_stacked_experts_equals_torch_muon_on_separate_matrices(shape, row_blocks):
    start, *gradients = random_gradients(shape, 6)
    stacked = nn.Parameter(start.clone())
    ours = BatchedMuon([stacked], lr=0.02, momentum=0.9, weight_decay=0.1, row_blocks=row_blocks)
    step_with(ours, stacked, gradients)

    separate = [nn.Parameter(matrix.clone()) for matrix in matrices_of(start, row_blocks)]
    theirs = torch.optim.Muon(separate, lr=0.02, momentum=0.9, weight_decay=0.1)
    for gradient in gradients:
        for parameter, piece in zip(separate, matrices_of(gradient, row_blocks), strict=True):
            parameter.grad = piece.clone()
        theirs.step()

    for ours_matrix, theirs_matrix in zip(matrices_of(stacked.detach(), row_blocks), separate, strict=True):
        # The iteration runs in bfloat16, where two orders of summation may differ in the last of 8 bits.
        torch.testing.assert_close(ours_matrix, theirs_matrix.detach(), rtol=0, atol=5 * 0.02 * 2**-7)


def test_orthogonalising_gate_and_up_as_one_matrix_is_caught():
    start, *gradients = random_gradients((3, 10, 6), 6)
    right, wrong = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    step_with(BatchedMuon([right], row_blocks=2), right, gradients)
    step_with(BatchedMuon([wrong], row_blocks=1), wrong, gradients)
    assert (right - wrong).abs().max() > 5 * 0.02 * 2**-7


def test_matrices_of_several_parameters_step_as_each_alone():
    starts = [random_gradients((6, 4), 1, seed)[0] for seed in range(3)]
    gradients = [random_gradients((6, 4), 4, seed) for seed in range(3, 6)]
    together = [nn.Parameter(start.clone()) for start in starts]
    optimizer = BatchedMuon(together)
    for step in range(4):
        for parameter, own in zip(together, gradients, strict=True):
            parameter.grad = own[step].clone()
        optimizer.step()
    for start, own, parameter in zip(starts, gradients, together, strict=True):
        alone = nn.Parameter(start.clone())
        step_with(BatchedMuon([alone]), alone, own)
        torch.testing.assert_close(parameter, alone, rtol=0, atol=4 * 0.02 * 2**-7)


def test_orthogonalising_brings_singular_values_near_one_and_keeps_directions():
    matrices = torch.randn(5, 12, 30, generator=torch.Generator().manual_seed(0))
    result = orthogonalize(matrices).float()
    assert (torch.linalg.svdvals(result) - 1).abs().max() < 0.4
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    assert (result * (left @ right)).sum() / (result.norm() * (left @ right).norm()) > 0.95
    assert torch.equal(orthogonalize(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4, dtype=torch.bfloat16))


def test_muon_refuses_what_is_no_matrix():
    with pytest.raises(ValueError, match=r"shape \(5,\)"):
        BatchedMuon([nn.Parameter(torch.zeros(5))])
    with pytest.raises(ValueError, match="2 blocks of rows"):
        BatchedMuon([nn.Parameter(torch.zeros(3, 5, 4))], row_blocks=2)


def tiny_model(**mtp_or_model: dict) -> MTPModel:
    recipe = recipe_with(RECIPE, **mtp_or_model)
    return MTPModel(recipe.model, recipe.mtp).initialize(0)


def test_every_parameter_has_the_role_its_place_in_the_model_says():
    roles = parameter_roles(tiny_model())
    by_role = {role: sorted({name for name in roles if roles[name] == role}) for role in set(roles.values())}
    assert {name.rsplit(".", 2)[-2] for name in by_role["embedding"]} == {"embed_tokens", "lm_head"}
    assert all(name.endswith("mlp.gate.weight") for name in by_role["router"])
    assert all("norm" in name for name in by_role["vector"])
    expected = ("eh_proj.weight", "experts.gate_up_proj", "experts.down_proj", "kv_b_proj.weight", "gate_proj.weight")
    for ending in expected:
        assert any(name.endswith(ending) for name in by_role["matrix"]), ending


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_each_parameter_is_stepped_by_exactly_one_optimizer_even_when_shared(name):
    model = tiny_model(model={"tie_word_embeddings": True}, mtp={"share_weights": True})
    optimizer = TrainingOptimizer(model, OptimizerConfig(name=name), 10)
    stepped = [p for part, _ in optimizer._peaks for group in part.param_groups for p in group["params"]]
    assert len(stepped) == len({id(p) for p in stepped}) == len(list(model.parameters()))


def test_only_matrices_decay():
    model = tiny_model()
    optimizer = TrainingOptimizer(model, OptimizerConfig(weight_decay=0.5, num_warmup_steps=0, max_grad_norm=0.0), 10)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0, get_total_norm(optimizer.gradients()))
    for name, parameter in model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == (parameter.ndim >= 2), name


def test_gradients_are_clipped_to_the_norm_asked_for():
    model = nn.Linear(4, 4)
    optimizer = TrainingOptimizer(model, OptimizerConfig(max_grad_norm=1.0, num_warmup_steps=0), 10)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    norm = get_total_norm(optimizer.gradients())
    assert norm.item() == pytest.approx(3 * 20**0.5)
    optimizer.step(0, norm)
    assert get_total_norm(optimizer.gradients()).item() == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_saved_and_loaded_goes_on_bit_for_bit(name):
    config = OptimizerConfig(name=name, num_warmup_steps=2)

    def run(model: MTPModel, optimizer: TrainingOptimizer, steps: range) -> None:
        for step in steps:
            for index, parameter in enumerate(model.parameters()):
                parameter.grad = random_gradients(tuple(parameter.shape), 1, seed=97 * step + index)[0]
            optimizer.step(step, get_total_norm(optimizer.gradients()))

    whole = tiny_model()
    run(whole, TrainingOptimizer(whole, config, 6), range(6))

    first = tiny_model()
    first_optimizer = TrainingOptimizer(first, config, 6)
    run(first, first_optimizer, range(3))
    second, forgetful = tiny_model(), tiny_model()
    second_optimizer, fresh_optimizer = TrainingOptimizer(second, config, 6), TrainingOptimizer(forgetful, config, 6)
    for model in (second, forgetful):
        model.load_state_dict(first.state_dict())
    second_optimizer.load_state_dict(copy.deepcopy(first_optimizer.state_dict()))
    run(second, second_optimizer, range(3, 6))
    run(forgetful, fresh_optimizer, range(3, 6))  # the broken variant: moments are lost

    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(whole.parameters(), forgetful.parameters(), strict=True))


def test_state_of_another_model_is_refused_by_name():
    optimizer = TrainingOptimizer(nn.Linear(4, 4), OptimizerConfig(), 10)
    with pytest.raises(CheckpointError, match="no such parameter"):
        optimizer.load_state_dict({"other": {"exp_avg": torch.zeros(4)}})
    with pytest.raises(CheckpointError, match=r"the parameter is \(4, 4\)"):
        optimizer.load_state_dict({"weight": {"exp_avg": torch.zeros(5, 4)}})


def test_a_parameter_without_gradient_is_left_as_it_is():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = TrainingOptimizer(model, dataclasses.replace(OptimizerConfig(), name="muon", num_warmup_steps=0), 10)
    before = model[1].weight.detach().clone()
    model[0].weight.grad = torch.ones(3, 3)
    optimizer.step(0, get_total_norm(optimizer.gradients()))
    assert torch.equal(model[1].weight, before)
    assert {name: list(state) for name, state in optimizer.state_dict().items()} == {"0.weight": ["momentum_buffer"]}
