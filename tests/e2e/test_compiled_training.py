"""Compiled layers train the same model; slow, because compiling is."""

from __future__ import annotations

import shutil

import pytest

from . import tiny_run


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_layers_give_the_losses_of_eager_ones(tmp_path):
    losses = {}
    for compiled in (False, True):
        run = tiny_run.trainer(tmp_path / str(compiled), tiny_run.recipe_with(training={"compile": compiled}))
        run.model.train()
        losses[compiled] = [run.step().loss for _ in range(4)]
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)
