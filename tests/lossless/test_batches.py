"""What a row emits does not depend on the rows beside it, on who had its slot before, or on how many are drafted."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from nextn.config import MTPConfig
from nextn.data.tokenizers import ByteTokenizer
from nextn.decoding import Decoder, GenerationResult, generate, loop, plain_reference
from nextn.decoding.drafters.mtp import MTPDrafter
from nextn.decoding.drafters.single_cache import SingleCacheDrafter
from nextn.decoding.loop import BatchLoop
from nextn.decoding.policy import AdaptiveLength
from nextn.decoding.vocabulary import DraftVocabulary
from nextn.errors import GenerationError
from nextn.interop.adapter import TransformersTrunk
from nextn.model.cache import Cache
from nextn.mtp import MTPModel

from .conftest import TEXT, TINY, memorising_model, random_model
from .test_every_scheme import VARIANTS, half_trained
from .test_rejection import CRITICAL, SETTINGS, chi_square_score, plain_distribution_of_model, without_residual

PROMPTS = [TEXT[row % 4, start : start + length].tolist() for row, start, length in
           ((0, 0, 5), (1, 0, 1), (2, 0, 9), (3, 2, 3), (0, 7, 2), (1, 9, 12), (2, 20, 1))]  # fmt: skip
NUM_NEW = 20


@cache
def model() -> MTPModel:
    return memorising_model(30)


@cache
def plain_texts() -> list[tuple[int, ...]]:
    return [tuple(plain_reference(model(), prompt, NUM_NEW)) for prompt in PROMPTS]


def decoded(batch_size: int, prompts: Sequence[Sequence[int]] = PROMPTS, **arguments: Any) -> GenerationResult:
    return generate(model(), prompts, max_new_tokens=NUM_NEW, batch_size=batch_size, **arguments)


def without_costs(result: GenerationResult) -> tuple[object, ...]:
    return result.token_ids, result.origins, result.finish_reasons


# ----------------------------------------------------------------------------------------------- together as one by one


@pytest.mark.parametrize("draft_length", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [2, 3, 16])
def test_a_batch_emits_what_its_rows_emit_one_by_one(batch_size: int, draft_length: int):
    assert list(decoded(batch_size, draft_length=draft_length).token_ids) == plain_texts()


def test_the_same_in_float64():
    double = memorising_model(30).double()
    result = generate(double, PROMPTS, max_new_tokens=NUM_NEW, batch_size=3)
    assert list(result.token_ids) == [tuple(plain_reference(double, prompt, NUM_NEW)) for prompt in PROMPTS]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 1000),
    prompts=st.lists(st.lists(st.integers(0, TINY.vocab_size - 1), min_size=1, max_size=9), max_size=6),
    batch_size=st.integers(1, 4),
    draft_length=st.integers(0, 4),
    num_new=st.integers(1, 9),
    eos=st.one_of(st.none(), st.integers(0, TINY.vocab_size - 1)),
    temperature=st.sampled_from([0.0, 1.3]),
)
def test_any_list_through_any_batch_is_its_rows_one_by_one(
    seed: int, prompts: list[list[int]], batch_size: int, draft_length: int, num_new: int, eos: int | None, temperature
):
    settings_ = {"max_new_tokens": num_new, "draft_length": draft_length, "temperature": temperature}
    random = random_model(seed)
    together = generate(random, prompts, batch_size=batch_size, seed=seed, eos_token_id=eos, **settings_)
    alone = generate(random, prompts, batch_size=1, seed=seed, eos_token_id=eos, **settings_)
    assert without_costs(together) == without_costs(alone)


@pytest.mark.parametrize("draft_length", [0, 1, 3])
@pytest.mark.parametrize("batch_size", [2, 7])
def test_sampled_rows_have_their_own_random_numbers_whatever_is_beside_them(batch_size: int, draft_length: int):
    arguments = {"draft_length": draft_length, "temperature": 1.2, "seed": [3, 1, 4, 1, 5, 9, 2]}
    assert without_costs(decoded(batch_size, **arguments)) == without_costs(decoded(1, **arguments))


def test_random_numbers_counted_from_the_last_draft_are_caught(monkeypatch: pytest.MonkeyPatch):
    """Broken: which number decides a draft depends on how many the batch drafts, so on the other rows."""
    monkeypatch.setattr(loop, "_of_verification", lambda uniforms, num_drafts: uniforms[:, -(num_drafts + 1) :])
    arguments = {"draft_length": 3, "temperature": 1.2}
    texts = [generate(model(), PROMPTS[:4], max_new_tokens=12, batch_size=size, **arguments) for size in (1, 4)]
    assert texts[0].token_ids != texts[1].token_ids


def test_each_prompt_can_have_its_own_seed():
    same = decoded(3, [PROMPTS[0]] * 3, temperature=1.2, seed=[5, 5, 6])
    assert len({same.token_ids[0], same.token_ids[2]}) == 2
    again = decoded(1, [PROMPTS[0]] * 3, temperature=1.2, seed=[9, 5, 7])
    assert again.token_ids[1] == same.token_ids[1]
    assert again.token_ids[0] != same.token_ids[0]


# ----------------------------------------------------------------------------------------------- rows come, move and go


def ends_of(text: tuple[int, ...], eos: int) -> tuple[int, ...]:
    return text[: text.index(eos) + 1] if eos in text else text


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("eos", range(0, TINY.vocab_size, 3))
def test_rows_end_at_eos_in_their_drafts_and_others_take_their_places(eos: int, batch_size: int):
    result = decoded(batch_size, eos_token_id=eos)
    assert list(result.token_ids) == [ends_of(text, eos) for text in plain_texts()]
    reasons = ["eos" if eos in text else "length" for text in plain_texts()]
    assert list(result.finish_reasons) == reasons


def test_stop_strings_and_lengths_end_rows_of_a_batch_as_they_end_them_alone():
    trained = byte_model()
    prompts = ["abca", "b", "cab", "bb", "aacb"]
    arguments: dict[str, Any] = {"max_new_tokens": 24, "stop": ["ca", "bb"], "eos_token_id": None}
    alone = generate(trained, prompts, batch_size=1, **arguments)
    together = generate(trained, prompts, batch_size=3, **arguments)
    assert (together.texts, *without_costs(together)) == (alone.texts, *without_costs(alone))
    assert "stop" in alone.finish_reasons


@cache
def byte_model() -> MTPModel:
    """A tiny model whose tokens are bytes and which has learnt to say a, b, c and some of UTF-8's longer characters."""
    random = torch.Generator().manual_seed(4)
    words = [b"a", b"b", b"c", "é".encode(), "→".encode()]
    rows = [b"".join(words[int(torch.randint(5, (), generator=random))] for _ in range(48))[:48] for _ in range(4)]
    text = torch.tensor([list(row) for row in rows])
    trained = MTPModel(replace(TINY, vocab_size=257), MTPConfig(num_depths=2)).initialize(0)
    optimizer = torch.optim.Adam(trained.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        trained(text).loss.backward()
        optimizer.step()
    trained.tokenizer = ByteTokenizer()
    return trained.eval()


def forgets_to_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken: a drafter that takes the new row for the one that was in its slot before."""
    monkeypatch.setattr(MTPDrafter, "begin", lambda self, slot, token_ids, num_known: None)


def moves_no_trunk_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken: the row takes its slot without what the trunk has read of it."""
    monkeypatch.setattr(Cache, "copy_row", lambda self, source, target, num_tokens: None)


def moves_no_drafter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken: the drafter is not told that a row goes on in another slot."""
    monkeypatch.setattr(MTPDrafter, "move", lambda self, source, target, num_tokens: None)


def moves_one_token_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken: the last known token, which the trunk has not read yet, is left behind."""

    def close(self: BatchLoop, slot: int) -> None:
        last = len(self._rows) - 1
        at = self._rows[last].num_known - 1
        before = self._token_ids[slot, at].clone()
        original(self, slot)
        if slot != last:
            self._token_ids[slot, at] = before

    original = BatchLoop._close
    monkeypatch.setattr(BatchLoop, "_close", close)


LONG_PROMPTS = [TEXT[row, :length].tolist() for row, length in ((0, 20), (1, 25), (2, 22), (3, 30), (0, 24), (2, 27))]
"""Longer than what a drafter reads again in each cycle."""

ENDS = {"eos_token_id": 5, "draft_length": 3}


@pytest.mark.parametrize("broken", [moves_no_trunk_cache, moves_one_token_too_few])
def test_a_row_that_moves_without_its_state_is_caught_by_its_text(
    monkeypatch: pytest.MonkeyPatch, broken: Callable[[pytest.MonkeyPatch], None]
):
    expected = without_costs(decoded(1, **ENDS))
    assert without_costs(decoded(3, **ENDS)) == expected
    broken(monkeypatch)
    assert without_costs(decoded(3, **ENDS)) != expected


@pytest.mark.parametrize("broken", [forgets_to_reset, moves_no_drafter])
def test_a_drafter_that_keeps_another_rows_state_is_caught_by_what_it_drafts(
    monkeypatch: pytest.MonkeyPatch, broken: Callable[[pytest.MonkeyPatch], None]
):
    """The text stays what it is; origins and accepted lengths must be those of the row decoded alone."""
    alone, together = decoded(1, LONG_PROMPTS, **ENDS), decoded(2, LONG_PROMPTS, **ENDS)
    assert without_costs(together) == without_costs(alone)
    assert len({len(ids) for ids in alone.token_ids}) > 2, "rows end at different times"
    broken(monkeypatch)
    wrong = decoded(2, LONG_PROMPTS, **ENDS)
    assert wrong.token_ids == alone.token_ids
    assert wrong.origins != alone.origins


def test_a_decoder_used_again_gives_what_a_fresh_one_gives():
    decoder = Decoder(model(), batch_size=2, draft_length=3)
    for prompts in (PROMPTS[:3], PROMPTS[3:], [PROMPTS[5]], []):
        again = decoder.generate(prompts, max_new_tokens=NUM_NEW, eos_token_id=5)
        assert without_costs(again) == without_costs(decoded(1, prompts, eos_token_id=5))


# -------------------------------------------------------------------------------------------- what is drafted, and how


def test_an_adaptive_length_changes_nothing_in_the_text(monkeypatch: pytest.MonkeyPatch):
    """Each length in turn, 0 among them, whatever seconds were measured."""
    lengths = iter(range(10_000))
    monkeypatch.setattr(AdaptiveLength, "next_length", lambda self: next(lengths) % (self.longest + 1))
    result = decoded(3, draft_length="adaptive")
    assert list(result.token_ids) == plain_texts()
    assert set(result.costs.num_cycles) == set(range(6))


@pytest.mark.parametrize("min_confidence", [0.01, 0.3, 0.9])
def test_a_doubtful_draft_may_end_and_nothing_changes_in_the_text(min_confidence: float):
    result = decoded(3, draft_length=4, min_confidence=min_confidence)
    assert list(result.token_ids) == plain_texts()
    alone = decoded(1, draft_length=4, min_confidence=min_confidence)
    assert alone.origins == result.origins, "how far a row drafts does not depend on the others"


def test_a_draft_vocabulary_changes_nothing_in_the_text():
    few = DraftVocabulary(torch.tensor([2, 3, 5, 7, 11, 13]), TINY.vocab_size)
    result = decoded(3, draft_length=3, draft_vocabulary=few)
    assert list(result.token_ids) == plain_texts()
    pairs = zip(result.token_ids, result.origins, strict=True)
    drafted = {token for ids, origins in pairs for token, origin in zip(ids, origins, strict=True) if origin}
    assert drafted
    assert drafted <= set(few.ids.tolist())


def law_score(num_samples: int, **arguments: Any) -> float:
    prompt, num_new = TEXT[0, :6].tolist(), 4
    trained = arguments.pop("model", model())
    result = generate(
        trained, [prompt] * num_samples, max_new_tokens=num_new, draft_length=2, batch_size=32, **SETTINGS, **arguments
    )
    return chi_square_score(plain_distribution_of_model(trained, prompt, num_new), list(result.token_ids))


def test_a_draft_vocabulary_leaves_the_law_of_sampled_text_as_it_is(monkeypatch: pytest.MonkeyPatch):
    few = DraftVocabulary(torch.arange(0, TINY.vocab_size, 2), TINY.vocab_size)
    assert law_score(700, draft_vocabulary=few) < CRITICAL
    assert law_score(700, draft_vocabulary=few, verifier=without_residual) > CRITICAL
    # Broken: drafts of local ids are taken for full ones.
    monkeypatch.setattr(DraftVocabulary, "spread", lambda self, probs: torch.nn.functional.pad(probs, (0, 8)))
    assert law_score(700, draft_vocabulary=few) > CRITICAL


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_scheme_drafts_in_batches_and_on_its_own_alike(variant: str):
    trained = half_trained(variant)
    arguments: dict[str, Any] = {"max_new_tokens": 16, "draft_length": 3, "eos_token_id": 5}
    alone = generate(trained, PROMPTS, **arguments)
    together = generate(trained, PROMPTS, batch_size=3, **arguments)
    assert without_costs(together) == without_costs(alone)
    expected = [ends_of(tuple(plain_reference(trained, prompt, 16)), 5) for prompt in PROMPTS]
    assert list(alone.token_ids) == expected


@pytest.mark.parametrize("drafting", ["vllm", "llamacpp"])
def test_an_engines_drafts_are_the_same_in_batches(drafting: str, monkeypatch: pytest.MonkeyPatch):
    shared = half_trained("sequential, shared weights")
    arguments: dict[str, Any] = {
        "max_new_tokens": 16,
        "draft_length": 3,
        "eos_token_id": 5,
        "drafting": drafting,
        "batch_size": 3,
    }
    alone = generate(shared, PROMPTS, **{**arguments, "batch_size": 1})
    assert without_costs(generate(shared, PROMPTS, **arguments)) == without_costs(alone)
    monkeypatch.setattr(SingleCacheDrafter, "move", lambda self, source, target, num_tokens: None)
    assert generate(shared, PROMPTS, **arguments).origins != alone.origins


def test_a_repetition_penalty_falls_on_drafts_as_on_plain_text():
    for penalty in (0.3, 1.5, 8.0):
        plain = decoded(1, draft_length=0, repetition_penalty=penalty)
        assert plain.token_ids != tuple(plain_texts())
        for batch_size, draft_length in ((1, 1), (1, 4), (3, 3)):
            drafted = decoded(batch_size, draft_length=draft_length, repetition_penalty=penalty, eos_token_id=None)
            assert drafted.token_ids == plain.token_ids


def test_a_penalty_that_forgets_this_cycles_drafts_is_caught(monkeypatch: pytest.MonkeyPatch):
    plain = decoded(1, draft_length=0, repetition_penalty=8.0)

    def as_before_the_draft(seen: Tensor, draft_ids: Tensor) -> Tensor:
        return seen[:, None].expand(-1, draft_ids.shape[1] + 1, -1)

    monkeypatch.setattr(loop, "seen_after", as_before_the_draft)
    assert decoded(3, draft_length=3, repetition_penalty=8.0).token_ids != plain.token_ids


# ------------------------------------------------------------------------------------------------- contexts and memory


def test_rows_of_a_batch_can_fill_the_whole_context():
    full = TINY.max_position_embeddings
    long, short = TEXT[0, :40].tolist(), TEXT[1, :3].tolist()
    result = generate(model(), [long, short], max_new_tokens=full - 40, draft_length=5, batch_size=2)
    assert list(result.token_ids) == [tuple(plain_reference(model(), prompt, full - 40)) for prompt in (long, short)]


def num_held_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(held), Tensor) for held in gc.get_objects())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_tensor_stays_behind_after_many_jobs(temperature: float):
    decoder = Decoder(model(), batch_size=4, draft_length=3)
    prompts = [PROMPTS[number % len(PROMPTS)] for number in range(200)]
    decoder.generate(prompts[:5], max_new_tokens=6, temperature=temperature)
    before = num_held_tensors()
    decoder.generate(prompts, max_new_tokens=6, temperature=temperature)
    assert num_held_tensors() <= before


def test_a_decoder_that_needs_longer_rows_gives_the_shorter_ones_back():
    decoder = Decoder(random_model(0), batch_size=4)
    decoder.generate([[1]], max_new_tokens=4)
    before = num_held_tensors()
    decoder.generate([[1]] * 4, max_new_tokens=40)
    assert num_held_tensors() <= before


@pytest.mark.parametrize("draft_length", [0, 1, 3])
def test_a_cached_token_takes_one_latent_and_rotary_key_per_layer(draft_length: int, monkeypatch: pytest.MonkeyPatch):
    allocated: list[Cache] = []
    allocate = Cache.allocate

    def recorded(*args: Any) -> Cache:
        allocated.append(allocate(*args))
        return allocated[-1]

    monkeypatch.setattr(Cache, "allocate", staticmethod(recorded))
    decoder = Decoder(model(), batch_size=2, draft_length=draft_length)
    decoder.generate(PROMPTS[:2], max_new_tokens=4)
    num_slots = 2 * 64  # rows hold a multiple of 64 tokens
    per_layer = (TINY.kv_lora_rank + TINY.qk_rope_head_dim) * 4  # float32
    num_layers = TINY.num_hidden_layers + draft_length
    assert sum(cache.num_bytes for cache in allocated) / num_slots == per_layer * num_layers


# -------------------------------------------------------------------------------------------------- transformers' trunk


@cache
def transformers_model() -> MTPModel:
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=17,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=100,
        initializer_range=0.4,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    trunk = TransformersTrunk(AutoModelForCausalLM.from_config(config))
    wrapped = MTPModel(None, MTPConfig(num_depths=2), trunk)
    wrapped.trunk.initialize(wrapped.scheme, torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(wrapped.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        wrapped(TEXT).loss.backward()
        optimizer.step()
    return wrapped.eval()


@pytest.mark.parametrize("draft_length", [0, 2, 4])
def test_a_transformers_trunk_decodes_in_batches_what_it_decodes_alone(draft_length: int):
    wrapped = transformers_model()
    result = generate(wrapped, PROMPTS, max_new_tokens=NUM_NEW, draft_length=draft_length, batch_size=3, eos_token_id=5)
    expected = [ends_of(tuple(plain_reference(wrapped, prompt, NUM_NEW)), 5) for prompt in PROMPTS]
    assert list(result.token_ids) == expected
    assert not draft_length or result.stats.num_accepted_tokens


def test_a_context_that_is_no_multiple_of_64_can_be_filled():
    wrapped = transformers_model()
    (ids,) = generate(wrapped, [PROMPTS[0]], max_new_tokens=95, draft_length=3).token_ids
    assert list(ids) == plain_reference(wrapped, PROMPTS[0], 95)
    with pytest.raises(GenerationError, match="exceeds the context of 100"):
        generate(wrapped, [PROMPTS[0]], max_new_tokens=96)
