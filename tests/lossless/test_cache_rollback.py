"""Caches roll back exactly: a cached draft equals the chain recomputed from scratch, whatever was accepted before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nextn.decoding import generate, plain_reference
from nextn.decoding.drafters.drafter import BatchTokens
from nextn.decoding.drafters.mtp import MTPDrafter
from nextn.decoding.drafters.single_cache import SingleCacheDrafter
from nextn.decoding.sampling import SamplingConfig, transform
from nextn.model import Trunk
from nextn.model.cache import LayerCache
from nextn.mtp import MTPModel
from nextn.mtp.scheme import Scheme

from .conftest import TEXT, TINY, memorising_model, random_model

SAMPLING = SamplingConfig(temperature=1.0)
CAPACITY = 40


def drafts_from_scratch(model: MTPModel, known: list[int], num_draft_tokens: int, drafts: list[int]) -> Tensor:
    """Draft distributions [N, V] without any cache: every depth over all positions 0..n-1, t[0..n] known.

    `drafts` are the tokens drafted in place of t[n+1], ..., which deeper depths read.
    """
    tokens, num_positions = [*known, *drafts], len(known) - 1
    hidden = model.trunk.hidden_states(torch.tensor([tokens[:num_positions]]))
    hidden = model.scheme.trunk_state(hidden, model.trunk.final_norm(hidden))
    rows = []
    for depth in range(1, num_draft_tokens + 1):
        embedded = torch.tensor([[tokens[position + depth] for position in range(num_positions)]])
        state = model.scheme.step(model.trunk, depth, hidden, embedded, model.trunk.context(hidden.shape[1]))
        rows.append(model.scheme.head(model.trunk, depth)(state.head_input)[0, -1])
        hidden = state.carry
    return transform(torch.stack(rows), SAMPLING)


@torch.inference_mode()
def largest_difference(
    new_drafter: Callable[[Trunk, Scheme, int, int, int], MTPDrafter | SingleCacheDrafter],
    model: MTPModel,
    num_rows: int,
    draft_length: int,
    seed: int,
    num_cycles: int = 4,
    from_scratch: Callable[[MTPModel, list[int], int, list[int]], Tensor] = drafts_from_scratch,
) -> float:
    """Drive a drafter through cycles of random acceptance; the largest difference to drafting from scratch."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    drafter = new_drafter(model.trunk, model.scheme, num_rows, CAPACITY, draft_length)
    known = [[draw(0, TINY.vocab_size - 1) for _ in range(draw(2, 6))] for _ in range(num_rows)]
    token_ids = torch.zeros(num_rows, CAPACITY, dtype=torch.int64)
    largest = 0.0
    for _ in range(num_cycles):
        for row, tokens in enumerate(known):
            token_ids[row, : len(tokens)] = torch.tensor(tokens)
        # Trunk states of all positions, those of unknown tokens included: the drafter must not look at the latter.
        positions = torch.arange(CAPACITY).expand(num_rows, -1)
        hidden = model.trunk.hidden_states(token_ids)
        drafter.observe(hidden, model.trunk.final_norm(hidden), positions)
        num_draft_tokens = draw(1, draft_length)
        uniforms = torch.rand(num_rows, num_draft_tokens, generator=generator, dtype=torch.float64)
        batch = BatchTokens(token_ids, [len(tokens) for tokens in known])
        probs = drafter.draft(batch, num_draft_tokens, SAMPLING, uniforms).probs
        num_final = []
        for row, tokens in enumerate(known):
            drafts = token_ids[row, len(tokens) : len(tokens) + num_draft_tokens].tolist()
            expected = from_scratch(model, tokens, num_draft_tokens, drafts)
            largest = max(largest, (probs[row] - expected).abs().max().item())
            num_accepted = draw(0, num_draft_tokens)
            num_final.append(len(tokens) + num_accepted)
            known[row] = [*tokens, *drafts[:num_accepted], draw(0, TINY.vocab_size - 1)]
        drafter.roll_back(num_final)
    return largest


class NeverRollsBack(MTPDrafter):
    """Broken: keeps what was read from rejected drafts."""

    def roll_back(self, num_final: Sequence[int]) -> None:
        pass


class RollsBackOneTooFew(MTPDrafter):
    """Broken: takes the positions of depth k to be those of depth k-1."""

    def roll_back(self, num_final: Sequence[int]) -> None:
        super().roll_back([final + 1 for final in num_final])


@given(
    seed=st.integers(0, 10_000),
    num_rows=st.integers(1, 3),
    draft_length=st.integers(1, 5),
    share_weights=st.booleans(),
    carry=st.sampled_from(["post_norm", "pre_norm"]),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_cached_drafts_equal_the_chain_from_scratch_for_rows_of_unequal_length(
    seed: int, num_rows: int, draft_length: int, share_weights: bool, carry: str
):
    model = random_model(seed, share_weights=share_weights, carry=carry)
    assert largest_difference(MTPDrafter, model, num_rows, draft_length, seed) < 1e-4


@pytest.mark.parametrize("broken", [NeverRollsBack, RollsBackOneTooFew])
def test_a_stale_draft_cache_is_caught(broken: type[MTPDrafter]):
    differences = [largest_difference(broken, random_model(seed), 1, 3, seed) for seed in range(5)]
    assert max(differences) > 1e-2


def test_nothing_is_read_twice_that_need_not_be(monkeypatch: pytest.MonkeyPatch):
    """After a cycle of m new tokens all depths read max(m, N) positions: the new ones, and those depth N redoes."""
    model = memorising_model(30)
    lengths: list[tuple[int, int]] = []
    step = type(model.scheme).step

    def recorded(self, trunk, depth, hidden, *args, **kwargs):
        lengths.append((depth, hidden.shape[1]))
        return step(self, trunk, depth, hidden, *args, **kwargs)

    monkeypatch.setattr(type(model.scheme), "step", recorded)
    prompt = TEXT[0, :5].tolist()
    result = generate(model, [prompt], max_new_tokens=25, draft_length=3)
    prompt_read, first_cycle, later = lengths[:3], lengths[3:6], lengths[6:]
    assert prompt_read == [(1, 4), (2, 3), (3, 2)], "positions 0..4-k read tokens of the prompt alone"
    assert first_cycle == [(1, 3), (2, 3), (3, 3)], "one window for all depths"
    ends = [position for position, origin in enumerate(result.origins[0]) if origin == 0]  # each cycle's own last token
    emitted = [end - start for start, end in pairwise(ends)]
    cycles = [position for position, (depth, _) in enumerate(later) if depth == 1]
    assert len(cycles) >= 5
    for count, start, end in zip(emitted, cycles, [*cycles[1:], len(later)], strict=False):
        read = later[start:end]  # the last cycles draft fewer than three tokens
        assert read == [(depth, max(count, len(read))) for depth in range(1, len(read) + 1)]


def test_a_trunk_cache_that_keeps_stale_slots_changes_the_text(monkeypatch: pytest.MonkeyPatch):
    model = memorising_model(30)
    prompt = TEXT[0, :5].tolist()
    plain = plain_reference(model, prompt, 38)
    assert list(generate(model, [prompt], max_new_tokens=38).token_ids[0]) == plain

    def write_once(self: LayerCache, positions: Tensor, latent: Tensor) -> None:
        """Broken: a slot once written is never overwritten, as in an append-only cache without rollback."""
        index = positions.unsqueeze(-1).expand_as(latent)
        old = self.latent.gather(1, index)
        self.latent.scatter_(1, index, torch.where(old == 0, latent, old))

    monkeypatch.setattr(LayerCache, "write", write_once)
    assert list(generate(model, [prompt], max_new_tokens=38).token_ids[0]) != plain
