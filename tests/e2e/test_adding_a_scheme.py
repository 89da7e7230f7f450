"""The example of docs/adding_a_scheme.md is a scheme like any other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from nextn import generate
from nextn.config import DetachConfig, MTPConfig
from nextn.errors import ConfigError
from nextn.mtp import SCHEMES, check_scheme, load_model
from nextn.mtp.cost import model_cost
from nextn.training import read_metrics
from tests.e2e import tiny_run
from tests.e2e.tiny_run import recipe_with

PAGE = Path(__file__).parents[2] / "docs" / "adding_a_scheme.md"


def example() -> str:
    (code,) = re.findall(r"```python\n(.+?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    return code


@pytest.fixture(autouse=True)
def fifth_scheme() -> Iterator[None]:
    before = dict(SCHEMES)
    exec(compile(example(), str(PAGE), "exec"), {"__name__": "medusa"})
    yield
    SCHEMES.clear()
    SCHEMES.update(before)


def test_the_example_is_under_eighty_lines():
    assert len(example().splitlines()) < 80


def test_it_refuses_what_would_have_no_effect():
    check_scheme(MTPConfig("medusa"), DetachConfig(trunk=True))
    with pytest.raises(ConfigError, match=r"detach\.head has no effect with mtp\.scheme = 'medusa'"):
        check_scheme(MTPConfig("medusa"), DetachConfig(head=True))
    with pytest.raises(ConfigError, match=r"mtp\.concat = .* has no effect .*read then: num_depths alone"):
        check_scheme(MTPConfig("medusa", concat="hidden_first"))


def test_it_trains_saves_loads_and_decodes_losslessly(tmp_path: Path):
    recipe = recipe_with(
        mtp={"scheme": "medusa"}, training={"num_steps": 60, "evaluate_every": 0, "checkpoint_every": 30}
    )
    result = tiny_run.trainer(tmp_path / "run", recipe).train()
    first, last = read_metrics(result.metrics)[0], result.evaluation
    assert len(last["loss_per_depth"]) == 3
    for before, after in zip(first["loss_per_depth"], last["loss_per_depth"], strict=True):
        assert after < before - 0.3

    model = load_model(result.checkpoint)
    prompts = [tiny_run.tokens(3, seed=5).token_ids[:6].tolist()]
    plain = generate(model, prompts, max_new_tokens=40, draft_length=0, eos_token_id=None)
    drafted = generate(model, prompts, max_new_tokens=40, draft_length=2, eos_token_id=None)
    assert drafted.token_ids == plain.token_ids
    assert drafted.stats.num_accepted_tokens > 0

    width, vocab_size = model.config.hidden_size, model.config.vocab_size
    assert model_cost(model, 24).num_mtp_parameters == 2 * (width * width + width + width * vocab_size)
