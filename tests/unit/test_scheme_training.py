"""Training every scheme: nothing is learnt from random tokens, and without depths or weights it is plain training."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nextn.alignment import align
from nextn.config import MTPConfig, ScheduleConfig
from nextn.mtp import MTPModel
from nextn.objective import StepObjective
from tests.e2e import tiny_run
from tests.e2e.tiny_run import RECIPE, recipe_with

from .test_mtp_laws import TINY, VARIANTS

SMALL = replace(TINY, vocab_size=11, initializer_range=0.1)


def uniform(num_rows: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(0, SMALL.vocab_size, (num_rows, length), generator=torch.Generator().manual_seed(seed))


def held_out_losses(mtp: MTPConfig) -> list[float]:
    """Losses of depths 0..K on fresh uniformly random tokens, after 60 steps on such tokens."""
    model = MTPModel(SMALL, mtp).initialize(seed=2).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    objective = StepObjective((0.5,) * mtp.num_depths, chunk_size=64)
    for step in range(60):
        optimizer.zero_grad()
        model(uniform(8, 16, seed=step), objective=objective).loss.backward()
        optimizer.step()
    with torch.no_grad():
        return model.eval()(uniform(64, 32, seed=999)).loss_per_depth.tolist()


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_depth_learns_to_predict_random_tokens(variant: str):
    assert min(held_out_losses(VARIANTS[variant])) > math.log(SMALL.vocab_size) - 0.02


@pytest.mark.parametrize("variant", ["untied", "other conventions", "independent"])
def test_a_shift_that_shows_a_depth_its_label_is_caught(monkeypatch: pytest.MonkeyPatch, variant: str):
    def shifted(input_ids, depth, *rest):
        right = align(input_ids, depth, *rest)
        rolled = replace(right, embedded_ids=right.embedded_ids.roll(-1, dims=1))
        return rolled if depth else right

    monkeypatch.setattr("nextn.alignment.align", shifted)
    main, *deeper = held_out_losses(VARIANTS[variant])
    assert main > math.log(SMALL.vocab_size) - 0.02
    assert max(deeper) < 0.5 * math.log(SMALL.vocab_size)


# ------------------------------------------------------------------------------------------------------ plain training


def trunk_after_three_steps(run_folder: Path, mtp: MTPConfig, value: float) -> dict[str, torch.Tensor]:
    """Weights and routing biases of the trunk after three optimizer steps with lambda = `value`."""
    objective = {"mtp_lambda": ScheduleConfig(values=(value,))}
    run = tiny_run.trainer(run_folder, replace(recipe_with(RECIPE, objective=objective), mtp=mtp))
    for _ in range(3):
        run.step()
    return run.model.trunk.state_dict()


def check_same_trunk(ours: dict[str, torch.Tensor], plain: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == plain.keys()
    for name, tensor in plain.items():
        assert torch.equal(ours[name], tensor), f"{name} differs"


@pytest.mark.parametrize("variant", VARIANTS)
def test_depths_without_weight_train_the_trunk_bit_for_bit_as_no_depths_do(tmp_path: Path, variant: str):
    mtp = VARIANTS[variant]
    plain = trunk_after_three_steps(tmp_path, MTPConfig(num_depths=0), 0.3)
    check_same_trunk(trunk_after_three_steps(tmp_path, mtp, 0.0), plain)
    no_depths = MTPConfig(mtp.scheme, num_depths=0)
    check_same_trunk(trunk_after_three_steps(tmp_path, no_depths, 0.3), plain)
    with pytest.raises(AssertionError, match="differs"):
        check_same_trunk(trunk_after_three_steps(tmp_path, mtp, 1e-3), plain)
