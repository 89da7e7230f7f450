"""vLLM serves our exported folders on a CPU: the same tokens and log-probabilities, and acceptance as predicted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import nextn
from nextn.config import MTPConfig
from nextn.interop.engine_clients import VllmServer, vllm_server
from nextn.interop.export import export_model
from nextn.mtp import save_model
from tests.engines.conftest import TEXT, TrainedModel, engine_python, random_model

pytestmark = pytest.mark.engines

NUM_NEW_TOKENS = 48


@contextmanager
def served(folder: Path, draft_length: int, **options: bool) -> Iterator[VllmServer]:
    with vllm_server(engine_python("vllm"), folder, draft_length, **options) as server:
        yield server


@pytest.fixture(scope="module")
def exported(trained: TrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model as `nextn export --to vllm` writes it."""
    return export_model(trained.folder, "vllm", tmp_path_factory.mktemp("vllm") / "model").path


def ours(trained: TrainedModel, draft_length: int, drafting: str) -> list[tuple]:
    """Tokens, cycles, drafted and accepted tokens of each prompt."""
    rows = []
    for prompt in trained.prompts:
        result = nextn.generate(
            trained.model,
            [list(prompt)],
            max_new_tokens=NUM_NEW_TOKENS,
            draft_length=draft_length,
            eos_token_id=None,
            drafting=drafting,
        )
        rows.append((result.token_ids[0], result.stats.num_accepted_tokens))
    return rows


def test_log_probabilities_and_greedy_tokens_without_mtp_are_ours(trained: TrainedModel, exported: Path):
    text = [*TEXT[900:960].encode()]
    with served(exported, 0) as server:
        found = [server.complete(prompt, NUM_NEW_TOKENS) for prompt in trained.prompts]
        theirs = torch.tensor(server.log_probs(text))
    assert [row.token_ids for row in found] == [tokens for tokens, _ in ours(trained, 0, "as_trained")]
    with torch.no_grad():
        log_probs = trained.model(torch.tensor([text])).logits[0, :-1].log_softmax(-1)
    expected = log_probs.gather(1, torch.tensor(text)[1:, None])[:, 0]
    assert (theirs - expected).abs().max() < 2e-3


@pytest.mark.parametrize("draft_length", [1, 2, 3])
def test_greedy_tokens_with_mtp_are_ours_and_acceptance_is_what_we_predict(
    trained: TrainedModel, exported: Path, draft_length: int
):
    with served(exported, draft_length) as server:
        found = [server.complete(prompt, NUM_NEW_TOKENS) for prompt in trained.prompts]
    expected = ours(trained, draft_length, "vllm")
    assert [row.token_ids for row in found] == [tokens for tokens, _ in expected]
    # It drafts N tokens to the very end, where ours drafts no more than can still be emitted: counts of whole cycles
    # agree up to the last one.
    for row, (_, num_accepted) in zip(found, expected, strict=True):
        assert abs(row.num_accepted_tokens - num_accepted) <= draft_length
    rate = sum(row.num_accepted_tokens for row in found) / sum(row.num_draft_tokens for row in found)
    assert 0.3 < rate < 0.95, "half learnt: drafts are often right and often wrong"


SHAPES: dict[str, tuple[MTPConfig, dict[str, Any]]] = {
    "tied head, rotary halves": (MTPConfig(), {"tie_word_embeddings": True, "rope_interleave": False}),
    "no experts, no MTP": (MTPConfig(num_depths=0), {"n_routed_experts": 0}),
    "groups, gates, full queries": (
        MTPConfig(),
        {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "norm_topk_prob": False, "q_lora_rank": None},
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_log_probabilities_of_random_models_are_ours(shape: str, tmp_path: Path):
    mtp_config, changes = SHAPES[shape]
    model = random_model(1, mtp_config, **changes)
    (tmp_path / "ours").mkdir()
    save_model(model, tmp_path / "ours")
    text = [*TEXT[900:932].encode()]
    with served(export_model(tmp_path / "ours", "vllm", tmp_path / "theirs").path, 0) as server:
        theirs = torch.tensor(server.log_probs(text))
    with torch.no_grad():
        log_probs = model(torch.tensor([text])).logits[0, :-1].log_softmax(-1)
    assert (theirs - log_probs.gather(1, torch.tensor(text)[1:, None])[:, 0]).abs().max() < 2e-3


def test_its_stock_rotation_is_wrong_on_a_cpu_in_eager_mode(trained: TrainedModel, exported: Path):
    """If this fails, vLLM has mended it: then drop `VLLM_COMPILATION` from the launch line."""
    text = [*TEXT[900:960].encode()]
    with served(exported, 0, stock_rotation=True) as server:
        theirs = torch.tensor(server.log_probs(text))
    with torch.no_grad():
        log_probs = trained.model(torch.tensor([text])).logits[0, :-1].log_softmax(-1)
    assert (theirs - log_probs.gather(1, torch.tensor(text)[1:, None])[:, 0]).abs().mean() > 0.05
