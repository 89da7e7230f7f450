"""Verifiers on probability tables alone: which prefix is accepted, what follows, rows of unequal drafts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nextn.decoding.sampling import SamplingConfig, transform
from nextn.decoding.verify import VERIFIERS, exact, rejection

VOCAB = 5


def tables(seed: int, num_rows: int, draft_length: int) -> tuple[torch.Tensor, ...]:
    """Draft ids, draft_probs, target_probs, num_drafted and uniforms, all random."""
    generator = torch.Generator().manual_seed(seed)
    draft_probs = torch.randn(num_rows, draft_length, VOCAB, generator=generator).softmax(-1)
    target_probs = torch.randn(num_rows, draft_length + 1, VOCAB, generator=generator).softmax(-1)
    draft_ids = torch.randint(0, VOCAB, (num_rows, draft_length), generator=generator)
    num_drafted = torch.randint(0, draft_length + 1, (num_rows,), generator=generator)
    uniforms = torch.rand(num_rows, draft_length + 1, generator=generator, dtype=torch.float64)
    return draft_ids, draft_probs, target_probs, num_drafted, uniforms


def greedy_by_hand(draft: list[int], best: list[int]) -> tuple[int, int]:
    """Accepted length and next token of one row, in words: walk until the first difference."""
    for place, token in enumerate(draft):
        if token != best[place]:
            return place, best[place]
    return len(draft), best[len(draft)]


@given(st.integers(0, 10_000), st.integers(0, 4))
def test_exact_accepts_up_to_the_first_draft_that_is_not_the_argmax(seed: int, draft_length: int):
    draft_ids, draft_probs, target_probs, num_drafted, _ = tables(seed, 6, draft_length)
    best_ids = target_probs.argmax(-1)
    right = torch.rand(draft_ids.shape, generator=torch.Generator().manual_seed(seed)) < 0.7
    draft_ids = torch.where(right, best_ids[:, :-1], draft_ids)
    result = exact(draft_ids, draft_probs, target_probs, num_drafted)
    for row, drafted in enumerate(num_drafted.tolist()):
        expected = greedy_by_hand(draft_ids[row, :drafted].tolist(), best_ids[row].tolist())
        assert (result.num_accepted[row].item(), result.next_ids[row].item()) == expected


@given(st.integers(0, 10_000), st.integers(1, 4))
def test_rejection_on_one_hot_distributions_is_exact(seed: int, draft_length: int):
    _, draft_probs, target_probs, num_drafted, uniforms = tables(seed, 6, draft_length)
    greedy = SamplingConfig(temperature=0.0)
    target_probs = transform(target_probs[..., :2], greedy)  # two tokens: agreement is frequent
    draft_probs = transform(draft_probs[..., :2], greedy)
    draft_ids = draft_probs.argmax(-1)
    ours = rejection(draft_ids, draft_probs, target_probs, num_drafted, uniforms)
    theirs = exact(draft_ids, draft_probs, target_probs, num_drafted)
    assert torch.equal(ours.num_accepted, theirs.num_accepted)
    assert torch.equal(ours.next_ids, theirs.next_ids)


@pytest.mark.parametrize("name", sorted(VERIFIERS))
@given(seed=st.integers(0, 10_000))
def test_a_row_does_not_depend_on_its_batch_nor_on_what_stands_beyond_its_drafts(name: str, seed: int):
    draft_ids, draft_probs, target_probs, num_drafted, uniforms = tables(seed, 5, 4)
    together = VERIFIERS[name](draft_ids, draft_probs, target_probs, num_drafted, uniforms)
    for row, drafted in enumerate(num_drafted.tolist()):
        alone = VERIFIERS[name](
            draft_ids[row : row + 1, :drafted],
            draft_probs[row : row + 1, :drafted],
            target_probs[row : row + 1, : drafted + 1],
            num_drafted[row : row + 1],
            torch.cat((uniforms[row : row + 1, :drafted], uniforms[row : row + 1, -1:]), dim=1),
        )
        assert alone.num_accepted.item() == together.num_accepted[row].item()
        assert alone.next_ids.item() == together.next_ids[row].item()


@given(st.integers(0, 10_000))
def test_rejection_accepts_everything_when_draft_and_target_agree(seed: int):
    draft_ids, draft_probs, target_probs, _, uniforms = tables(seed, 4, 3)
    draft_probs = target_probs[:, :-1]
    result = rejection(draft_ids, draft_probs, target_probs, torch.full((4,), 3), uniforms)
    assert result.num_accepted.tolist() == [3] * 4


def test_after_a_rejection_the_rejected_token_never_follows():
    draft_ids, draft_probs, target_probs, _, uniforms = tables(0, 2000, 1)
    result = rejection(draft_ids, draft_probs, target_probs, torch.ones(2000, dtype=torch.int64), uniforms)
    rejected = result.num_accepted == 0
    assert rejected.sum() > 500
    assert (result.next_ids != draft_ids[:, 0])[rejected].all()


def test_a_rejection_of_rounding_size_without_residual_falls_back_on_the_target():
    # The target is below the draft everywhere by rounding, so the residual is empty.
    draft_probs = torch.tensor([[[0.5, 0.5]]])
    target_probs = torch.tensor([[[0.49999997, 0.5]], [[0.0, 1.0]]]).transpose(0, 1)
    numbers = torch.tensor([[0.99999999999, 0.9]], dtype=torch.float64)
    result = rejection(torch.tensor([[0]]), draft_probs, target_probs, torch.tensor([1]), numbers)
    assert (result.num_accepted.item(), result.next_ids.item()) == (0, 1)


def test_rejection_without_random_numbers_is_a_misuse():
    draft_ids, draft_probs, target_probs, num_drafted, _ = tables(0, 1, 2)
    with pytest.raises(ValueError, match="uniforms"):
        rejection(draft_ids, draft_probs, target_probs, num_drafted, None)
