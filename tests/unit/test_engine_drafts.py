"""Engines' drafts from a cache equal those computed from scratch; what an engine cannot draft is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nextn.config import MTPConfig
from nextn.decoding import generate
from nextn.decoding.drafters import single_cache
from nextn.decoding.drafters.drafter import BatchTokens, Drafts
from nextn.decoding.drafters.engine_drafts import DRAFTING, SINGLE_CACHE
from nextn.decoding.drafters.mtp import MTPDrafter
from nextn.decoding.drafters.single_cache import SingleCacheConvention, SingleCacheDrafter
from nextn.decoding.sampling import SamplingConfig, transform
from nextn.errors import GenerationError
from nextn.mtp import MTPModel

from ..lossless.conftest import TINY, random_model
from ..lossless.test_cache_rollback import CAPACITY, SAMPLING, largest_difference

ENGINES = list(SINGLE_CACHE)


@pytest.fixture(autouse=True)
def show_probabilities(monkeypatch: pytest.MonkeyPatch):
    """Drafters return what they drafted from, not one-hot rows; they still draft the most likely token."""
    monkeypatch.setattr(single_cache, "GREEDY", SAMPLING)


def model_with_random_norms(seed: int, **conventions: Any) -> MTPModel:
    """With norm weights of one, a state before its norm and after it would be the same to the norm that reads it."""
    model = random_model(seed, **conventions)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.copy_(0.2 + 1.6 * torch.rand(weight.shape, generator=generator))
    return model


def engine_drafts_from_scratch(
    engine: str, model: MTPModel, known: list[int], num_draft_tokens: int, drafts: list[int]
) -> Tensor:
    """Draft distributions [N, V] by the engines' rules, over whole rows and without any cache.

    `pairs` are the states and embeddings that the one module reads, in the order of its slots.
    """
    trunk, module = model.trunk, model.scheme.layers[0]
    states = trunk.final_norm(trunk.hidden_states(torch.tensor([known])))[0]

    def embedding(token: int) -> Tensor:
        return trunk.embed(torch.tensor([token]))[0]

    pairs = []
    if engine == "llamacpp":
        pairs.append((torch.zeros(TINY.hidden_size), embedding(known[0])))
    for position in range(len(known) - 1):
        is_zeroed = engine == "vllm" and position == 0
        token = embedding(known[position + 1])
        pairs.append((states[position], torch.zeros_like(token) if is_zeroed else token))
    rows = []
    for draft in drafts[:num_draft_tokens]:
        joined = [module.eh_proj(torch.cat((module.enorm(token), module.hnorm(state)))) for state, token in pairs]
        out = module.block(torch.stack(joined)[None], trunk.context(len(joined)), None)[0, -1]
        recycled = module.shared_head["norm"](out)
        rows.append(transform(trunk.output_head(recycled), SAMPLING))
        assert rows[-1].argmax() == draft, "the most likely token is drafted"
        pairs.append((recycled, embedding(draft)))
    return torch.stack(rows)


def difference(engine: str, model: MTPModel, draft_length: int, seed: int, num_rows: int = 1, **changed: Any) -> float:
    """Between an engine's cached drafts and the reference; `changed`: another `convention` or `drafter` class."""
    drafter_class = changed.get("drafter", SingleCacheDrafter)
    convention = changed.get("convention", replace(SINGLE_CACHE[engine], samples=False))

    def build(trunk, scheme, num_rows: int, capacity: int, draft_length: int) -> SingleCacheDrafter:
        return drafter_class(trunk, scheme, num_rows, capacity, convention)

    reference = partial(engine_drafts_from_scratch, engine)
    try:
        return largest_difference(build, model, num_rows, draft_length, seed, from_scratch=reference)
    except AssertionError:  # another token was drafted
        return 1.0


@given(
    seed=st.integers(0, 10_000),
    engine=st.sampled_from(ENGINES),
    num_rows=st.integers(1, 3),
    draft_length=st.integers(1, 4),
    share_weights=st.booleans(),
)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_cached_drafts_equal_those_of_the_engines_rules_from_scratch(
    seed: int, engine: str, num_rows: int, draft_length: int, share_weights: bool
):
    model = model_with_random_norms(seed, share_weights=share_weights)
    assert difference(engine, model, draft_length, seed, num_rows) < 1e-4


class KeepsItsDrafts(SingleCacheDrafter):
    """Broken: takes what accepted drafts left in the cache for what true states and tokens would leave."""

    def draft(self, tokens, num_draft_tokens, sampling, uniforms) -> Drafts:
        drafts = super().draft(tokens, num_draft_tokens, sampling, uniforms)
        self._num_read = [end + num_draft_tokens - 1 for end in self._num_read]
        return drafts

    def roll_back(self, num_final: Sequence[int]) -> None:
        self._num_read = [min(read, final - 1) for read, final in zip(self._num_read, num_final, strict=True)]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_cache_that_keeps_accepted_drafts_is_caught(engine: str):
    models = [model_with_random_norms(seed, share_weights=True) for seed in range(4)]
    assert max(difference(engine, model, 3, 0, drafter=KeepsItsDrafts) for model in models) > 1e-2


@pytest.mark.parametrize("engine", ENGINES)
def test_a_state_recycled_before_its_norm_is_caught(engine: str):
    model = model_with_random_norms(0, share_weights=True, carry="pre_norm")
    assert difference(engine, model, 2, 0) > 1e-2
    assert difference(engine, model, 1, 0) < 1e-4, "one draft recycles nothing"


@pytest.mark.parametrize("engine", ENGINES)
def test_the_wrong_beginning_of_a_row_is_caught(engine: str):
    others = [SingleCacheConvention(first, zeroes) for first in (0, -1) for zeroes in (False, True)]
    for convention in others:
        found = difference(engine, model_with_random_norms(0), 1, 0, convention=convention)
        assert (found < 1e-4) == (convention == replace(SINGLE_CACHE[engine], samples=False))


@torch.inference_mode()
def first_drafts(drafter: MTPDrafter | SingleCacheDrafter, model: MTPModel, num_draft_tokens: int) -> Tensor:
    """Distributions after the tokens 3, 1, 4, 1, 5; the drafts are the most likely ones."""
    token_ids = torch.zeros(1, CAPACITY, dtype=torch.int64)
    token_ids[0, :5] = torch.tensor([3, 1, 4, 1, 5])
    hidden = model.trunk.hidden_states(token_ids[:, :4])
    drafter.observe(hidden, model.trunk.final_norm(hidden), torch.arange(4)[None])
    sampling = SamplingConfig(temperature=1.0)
    uniforms = torch.zeros(1, num_draft_tokens).double()
    return drafter.draft(BatchTokens(token_ids, [5]), num_draft_tokens, sampling, uniforms).probs


def test_the_first_draft_is_as_trained_but_for_the_beginning_of_the_row():
    model = model_with_random_norms(0, share_weights=True)
    arguments = (model.trunk, model.scheme, 1, CAPACITY)
    trained = first_drafts(MTPDrafter(*arguments, 1), model, 1)
    unchanged = SingleCacheConvention(first_position=0, zeroes_first_embedding=False)
    assert torch.allclose(first_drafts(SingleCacheDrafter(*arguments, unchanged), model, 1), trained, atol=1e-5)
    for engine in ("vllm", "llamacpp"):
        assert not torch.allclose(
            first_drafts(SingleCacheDrafter(*arguments, SINGLE_CACHE[engine]), model, 1), trained, atol=1e-3
        )


def test_transformers_drafts_as_trained_as_many_tokens_as_there_are_modules():
    prompts = [[3, 1, 4, 1, 5], [9, 2]]
    model = model_with_random_norms(3)
    trained = generate(model, prompts, max_new_tokens=20, draft_length=2)
    theirs = generate(model, prompts, max_new_tokens=20, drafting="transformers")
    assert (theirs.stats, theirs.token_ids) == (trained.stats, trained.token_ids)
    shared = model_with_random_norms(3, share_weights=True)
    assert generate(shared, prompts, max_new_tokens=20, drafting="transformers").stats.draft_length == 1


# ------------------------------------------------------------------------------------------------------------- requests

REFUSED = {
    "unknown": (
        {},
        "sglang2",
        1,
        r"unknown drafting 'sglang2'; there are: as_trained, recycled, transformers, vllm, llamacpp",
    ),
    "other scheme": ({"scheme": "parallel"}, "vllm", 1, "needs the sequential scheme.*this model's is 'parallel'"),
    "trunk before its norm": (
        {"trunk_hidden": "pre_norm"},
        "vllm",
        1,
        "after their norm.*trunk_hidden = pre_no",
    ),
    "carried before its norm": ({"carry": "pre_norm"}, "llamacpp", 2, "carry = pre_norm"),
    "too few drafts": ({}, "transformers", 1, "one token per stored module, here 2; draft_length = 1 is not possible"),
    "too many drafts": ({"share_weights": True}, "transformers", 2, "one token per stored module, here 1"),
    "two modules": ({}, "llamacpp", 2, "exactly one MTP module, and this model has 2; share_weights"),
    "no multiple": ({}, "vllm", 3, "a multiple of the 2 stored modules"),
}


@pytest.mark.parametrize("case", REFUSED, ids=lambda name: name.replace(" ", "_"))
def test_drafts_that_the_engine_does_not_make_of_this_model_are_refused(case: str):
    conventions, drafting, draft_length, message = REFUSED[case]
    with pytest.raises(GenerationError, match=message):
        generate(random_model(0, **conventions), [[1]], max_new_tokens=4, draft_length=draft_length, drafting=drafting)


@pytest.mark.parametrize("drafting", DRAFTING)
def test_plain_decoding_is_the_same_under_every_name(drafting: str):
    model = random_model(0, scheme="parallel")
    result = generate(model, [[1, 2]], max_new_tokens=4, draft_length=0, drafting=drafting)
    assert result.num_trunk_forwards == 4
    plain = MTPModel(TINY, MTPConfig(num_depths=0)).initialize(0)
    assert generate(plain, [[1, 2]], max_new_tokens=4, drafting=drafting).stats.draft_length == 0
