"""Every scheme decodes greedily what plain decoding does, from drafts that equal those of a chain without any cache."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nextn.decoding import generate, plain_reference
from nextn.decoding.drafters.mtp import MTPDrafter
from nextn.errors import GenerationError
from nextn.model.cache import LayerCache
from nextn.mtp import SCHEMES, MTPModel

from .conftest import TEXT, TINY, memorising_model, random_model
from .test_cache_rollback import NeverRollsBack, RollsBackOneTooFew, largest_difference

NUM_DEPTHS = 3
PROMPTS = [TEXT[0, :5].tolist(), TEXT[1, :1].tolist(), TEXT[2, :9].tolist(), [3, 3, 3]]
VARIANTS: dict[str, dict[str, Any]] = {
    "sequential": {},
    "sequential, shared weights": {"share_weights": True},
    "sequential, dense": {"dense_blocks": True},
    "independent": {"scheme": "independent"},
    "independent, pre norm": {"scheme": "independent", "trunk_hidden": "pre_norm", "head_norm": "shared"},
    "parallel": {"scheme": "parallel", "trunk_hidden": "pre_norm"},
    "shared module": {"scheme": "shared_module", "num_layers": 2},
    "heads alone": {"scheme": "shared_module", "num_layers": 0},
}
# Only a scheme that embeds tokens reads drafts; the others have nothing to roll back.
READS_DRAFTS = [name for name, mtp in VARIANTS.items() if SCHEMES[mtp.get("scheme", "sequential")].embeds_tokens]


@cache
def half_trained(variant: str) -> MTPModel:
    """Drafts are often right and often wrong, at every depth."""
    return memorising_model(45, num_depths=NUM_DEPTHS, **VARIANTS[variant])


def check_greedy(model: MTPModel, draft_length: int, num_new: int = 30) -> None:
    result = generate(model, PROMPTS, max_new_tokens=num_new, draft_length=draft_length)
    for prompt, token_ids in zip(PROMPTS, result.token_ids, strict=True):
        assert list(token_ids) == plain_reference(model, prompt, num_new), "the text differs from plain decoding"


@pytest.mark.parametrize("draft_length", range(1, NUM_DEPTHS + 1))
@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_drafting_emits_the_text_of_plain_decoding(variant: str, draft_length: int):
    check_greedy(half_trained(variant), draft_length)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_half_trained_models_exercise_every_accepted_length(variant: str):
    result = generate(half_trained(variant), PROMPTS, max_new_tokens=40, draft_length=2)
    assert all(result.stats.histogram), result.stats.histogram
    assert len(set(result.token_ids[0])) > 8, "the text does not loop"


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 1000),
    variant=st.sampled_from(list(VARIANTS)),
    prompt=st.lists(st.integers(0, TINY.vocab_size - 1), min_size=1, max_size=9),
    draft_length=st.integers(1, NUM_DEPTHS),
    num_new=st.integers(1, 10),
)
def test_random_models_too(seed: int, variant: str, prompt: list[int], draft_length: int, num_new: int):
    model = random_model(seed, num_depths=NUM_DEPTHS, **VARIANTS[variant])
    speculative = generate(model, [prompt], max_new_tokens=num_new, draft_length=draft_length).token_ids[0]
    assert list(speculative) == plain_reference(model, prompt, num_new)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_trunk_cache_with_stale_slots_is_caught(monkeypatch: pytest.MonkeyPatch, variant: str):
    def write_once(self: LayerCache, positions: Tensor, latent: Tensor) -> None:
        """Broken: a slot once written keeps what a rejected draft left there."""
        index = positions.unsqueeze(-1).expand_as(latent)
        old = self.latent.gather(1, index)
        self.latent.scatter_(1, index, torch.where(old == 0, latent, old))

    model = half_trained(variant)
    monkeypatch.setattr(LayerCache, "write", write_once)
    with pytest.raises(AssertionError, match="differs from plain decoding"):
        check_greedy(model, draft_length=NUM_DEPTHS, num_new=40)


# -------------------------------------------------------------------------------------------------------------- drafts


def draft_error(variant: str, seed: int, drafter_class: type[MTPDrafter] = MTPDrafter, num_rows: int = 2) -> float:
    model = random_model(seed, num_depths=NUM_DEPTHS, **VARIANTS[variant])
    return largest_difference(drafter_class, model, num_rows, NUM_DEPTHS, seed)


@settings(max_examples=24, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), variant=st.sampled_from(list(VARIANTS)), num_rows=st.integers(1, 3))
def test_cached_drafts_equal_those_computed_from_scratch(seed: int, variant: str, num_rows: int):
    assert draft_error(variant, seed, num_rows=num_rows) < 1e-4


@pytest.mark.parametrize("broken", [NeverRollsBack, RollsBackOneTooFew])
@pytest.mark.parametrize("variant", READS_DRAFTS)
def test_what_was_read_from_rejected_drafts_is_caught_in_a_cache(variant: str, broken: type[MTPDrafter]):
    assert max(draft_error(variant, seed, broken, num_rows=1) for seed in range(5)) > 1e-2


class ObservesLate(MTPDrafter):
    """Broken: keeps the trunk's state of each position one position further on."""

    def observe(self, hidden: Tensor, normed: Tensor, positions: Tensor, first_slot: int = 0) -> None:
        super().observe(hidden[:, :-1], normed[:, :-1], positions[:, 1:], first_slot)


class ShiftsItsCache(MTPDrafter):
    """Broken: after a rollback every slot holds the position before."""

    def roll_back(self, num_final: Sequence[int]) -> None:
        super().roll_back(num_final)
        for layer in self._cache.layers:
            layer.latent.copy_(layer.latent.roll(1, dims=1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_states_and_cache_slots_of_other_positions_are_caught(variant: str):
    assert max(draft_error(variant, seed, ObservesLate) for seed in range(3)) > 1e-2
    if variant != "heads alone":  # which caches nothing
        assert max(draft_error(variant, seed, ShiftsItsCache, num_rows=1) for seed in range(5)) > 1e-2


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_a_chain_drafts_beyond_its_trained_depths(variant: str):
    model = half_trained(variant)
    if SCHEMES[model.mtp_config.scheme].is_chain:
        check_greedy(model, draft_length=NUM_DEPTHS + 2)
    else:
        with pytest.raises(GenerationError, match=rf"draft_length = 4.*at most {NUM_DEPTHS} with this model"):
            generate(model, PROMPTS, max_new_tokens=5, draft_length=NUM_DEPTHS + 1)
