"""Verifiers on probability tables alone: which prefix is accepted, what follows, rows of unequal drafts."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nextn.decoding.sampling import SamplingConfig, choose, transform
from nextn.decoding.verify import VERIFIERS, Threshold, Typical, Verification, Verifier, exact, rejection
from nextn.errors import GenerationError

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
        assert alone.num_changed.item() == together.num_changed[row].item()


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


def test_exact_reads_only_the_argmax_so_that_logits_do():
    draft_ids, _, target_probs, num_drafted, _ = tables(1, 40, 3)
    from_logits = exact(draft_ids, None, target_probs.log() * 5 - 3, num_drafted)
    assert_same(from_logits, exact(draft_ids, None, target_probs, num_drafted))


def assert_same(ours: Verification, theirs: Verification) -> None:
    assert torch.equal(ours.num_accepted, theirs.num_accepted)
    assert torch.equal(ours.next_ids, theirs.next_ids)
    assert torch.equal(ours.num_changed, theirs.num_changed)


# ------------------------------------------------------------------------------------------------------ certain drafts


@pytest.mark.parametrize("name", sorted(VERIFIERS))
@given(seed=st.integers(0, 10_000), draft_length=st.integers(0, 4))
def test_no_draft_probs_are_one_hot_draft_probs(name: str, seed: int, draft_length: int):
    draft_ids, _, target_probs, num_drafted, uniforms = tables(seed, 5, draft_length)
    one_hot = torch.nn.functional.one_hot(draft_ids, VOCAB).float()
    certain = VERIFIERS[name](draft_ids, None, target_probs, num_drafted, uniforms)
    assert_same(certain, VERIFIERS[name](draft_ids, one_hot, target_probs, num_drafted, uniforms))


def rejection_that_forgets_the_draft(draft_ids, draft_probs, target_probs, num_drafted, uniforms) -> Verification:
    """Broken: after a certain draft was rejected, it can follow itself."""
    verified = rejection(draft_ids, draft_probs, target_probs, num_drafted, uniforms)
    rows = torch.arange(draft_ids.shape[0])
    return replace(verified, next_ids=choose(target_probs[rows, verified.num_accepted], uniforms[:, -1]))


@pytest.mark.parametrize(
    ("verifier", "is_right"), [(rejection, True), (rejection_that_forgets_the_draft, False)], ids=["ours", "broken"]
)
def test_a_certain_draft_that_was_rejected_never_follows(verifier: Verifier, is_right: bool):
    draft_ids, _, target_probs, _, uniforms = tables(2, 500, 2)
    result = verifier(draft_ids, None, target_probs, torch.full((500,), 2), uniforms)
    rejected = result.num_accepted < 2
    places = result.num_accepted.clamp(max=1)[:, None]
    assert rejected.sum() > 100
    assert (result.next_ids != draft_ids.gather(1, places)[:, 0])[rejected].all() == is_right


# ------------------------------------------------------------------------------------------------------ lossy verifiers


def passes_threshold(probs: list[float], token: int) -> bool:
    return probs[token] > 0.3


def passes_typical(probs: list[float], token: int) -> bool:
    entropy = -sum(prob * math.log(prob) for prob in probs)
    return probs[token] > min(0.09, 0.3 * math.exp(-entropy))


def passes_typical_in_bits(probs: list[float], token: int) -> bool:
    entropy = -sum(prob * math.log2(prob) for prob in probs)
    return probs[token] > min(0.09, 0.3 * math.exp(-entropy))


def passes_typical_by_maximum(probs: list[float], token: int) -> bool:
    entropy = -sum(prob * math.log(prob) for prob in probs)
    return probs[token] > max(0.09, 0.3 * math.exp(-entropy))


def passes_typical_without_epsilon(probs: list[float], token: int) -> bool:
    return probs[token] > 0.3 * math.exp(sum(prob * math.log(prob) for prob in probs))


def accepted_by_hand(rule, draft_ids, target_probs, num_drafted) -> list[int]:
    """Accepted length of each row: walk until the first draft that does not pass."""
    lengths = []
    for row, drafted in enumerate(num_drafted.tolist()):
        places = zip(target_probs[row].tolist(), draft_ids[row, :drafted].tolist(), strict=False)
        passed = [rule(probs, token) for probs, token in places]
        lengths.append((*passed, False).index(False))
    return lengths


@pytest.mark.parametrize(
    ("verifier", "rule"), [(Threshold(), passes_threshold), (Typical(), passes_typical)], ids=["threshold", "typical"]
)
@given(seed=st.integers(0, 10_000), draft_length=st.integers(0, 4))
def test_a_lossy_verifier_accepts_up_to_the_first_draft_that_does_not_pass(verifier, rule, seed, draft_length):
    draft_ids, draft_probs, target_probs, num_drafted, uniforms = tables(seed, 6, draft_length)
    expected = accepted_by_hand(rule, draft_ids, target_probs, num_drafted)
    for numbers in (None, uniforms):
        result = verifier(draft_ids, draft_probs, target_probs, num_drafted, numbers)
        assert result.num_accepted.tolist() == expected
        target = target_probs[torch.arange(6), result.num_accepted]
        assert torch.equal(result.next_ids, choose(target, None if numbers is None else numbers[:, -1]))


@pytest.mark.parametrize(
    "broken", [passes_typical_in_bits, passes_typical_by_maximum, passes_typical_without_epsilon, passes_threshold]
)
def test_another_rule_than_the_typical_one_is_noticed(broken):
    draft_ids, _, target_probs, _, _ = tables(0, 4000, 2)
    target_probs = (target_probs.log() * 2).softmax(-1)  # some rows certain, some not
    num_drafted = torch.full((4000,), 2)
    ours = Typical()(draft_ids, None, target_probs, num_drafted).num_accepted.tolist()
    assert ours == accepted_by_hand(passes_typical, draft_ids, target_probs, num_drafted)
    assert ours != accepted_by_hand(broken, draft_ids, target_probs, num_drafted)


def test_a_draft_exactly_at_the_threshold_is_refused():
    target_probs = torch.tensor([[[0.5, 0.5], [1.0, 0.0]]])
    lengths = [
        Threshold(value)(torch.tensor([[1]]), None, target_probs, torch.tensor([1])).num_accepted.item()
        for value in (0.49, 0.5, 1.0)
    ]
    assert lengths == [1, 0, 0]


def test_a_target_with_impossible_tokens_has_an_entropy():
    target_probs = torch.tensor([[[0.0, 1.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]])
    result = Typical()(torch.tensor([[1, 2]]), None, target_probs, torch.tensor([2]))
    assert (result.num_accepted.item(), result.next_ids.item()) == (1, 1)


@given(seed=st.integers(0, 10_000), epsilon=st.floats(0, 1), delta=st.floats(0, 0.99))
def test_typical_acceptance_never_refuses_the_most_likely_token(seed: int, epsilon: float, delta: float):
    _, _, target_probs, _, _ = tables(seed, 6, 3)
    result = Typical(epsilon, delta)(target_probs[:, :-1].argmax(-1), None, target_probs, torch.full((6,), 3))
    assert result.num_accepted.tolist() == [3] * 6
    assert result.num_changed.tolist() == [0] * 6


@given(seed=st.integers(0, 10_000), threshold=st.floats(0.5, 1))
def test_from_a_half_on_the_threshold_changes_nothing_that_is_greedy(seed: int, threshold: float):
    draft_ids, _, target_probs, num_drafted, _ = tables(seed, 6, 3)
    target_probs = (target_probs.log() * 3).softmax(-1)
    assert Threshold(threshold)(draft_ids, None, target_probs, num_drafted).num_changed.tolist() == [0] * 6


# -------------------------------------------------------------------------------------------------------- what changes


def changed_by_hand(draft_ids, draft_probs, target_probs, num_accepted, uniforms) -> list[int]:
    """Accepted drafts that the lossless verifier refuses when each is put to it alone."""
    counts = []
    for row, accepted in enumerate(num_accepted.tolist()):
        refused = 0
        for place in range(accepted):
            here = (slice(row, row + 1), slice(place, place + 1))
            lossless = exact if uniforms is None else rejection
            one = lossless(
                draft_ids[here],
                None if draft_probs is None else draft_probs[here],
                target_probs[row : row + 1, place : place + 2],
                torch.tensor([1]),
                None if uniforms is None else uniforms[row : row + 1, [place, -1]],
            )
            refused += 1 - one.num_accepted.item()
        counts.append(refused)
    return counts


@pytest.mark.parametrize("verifier", [Threshold(0.1), Typical()], ids=["threshold", "typical"])
@pytest.mark.parametrize("is_certain", [False, True], ids=["drawn", "certain"])
@pytest.mark.parametrize("is_greedy", [False, True], ids=["sampled", "greedy"])
@given(seed=st.integers(0, 10_000))
def test_changed_drafts_are_those_a_lossless_verifier_refuses(verifier, is_certain: bool, is_greedy: bool, seed: int):
    draft_ids, draft_probs, target_probs, num_drafted, uniforms = tables(seed, 5, 3)
    draft_probs = None if is_certain else draft_probs
    uniforms = None if is_greedy else uniforms
    result = verifier(draft_ids, draft_probs, target_probs, num_drafted, uniforms)
    expected = changed_by_hand(draft_ids, draft_probs, target_probs, result.num_accepted, uniforms)
    assert result.num_changed.tolist() == expected


@pytest.mark.parametrize("verifier", [Threshold(0.1), Typical()], ids=["threshold", "typical"])
def test_both_some_and_no_changes_occur(verifier: Verifier):
    draft_ids, draft_probs, target_probs, num_drafted, uniforms = tables(0, 500, 3)
    for numbers in (None, uniforms):
        changed = verifier(draft_ids, draft_probs, target_probs, num_drafted, numbers).num_changed
        assert 50 < changed.count_nonzero() < 450


@pytest.mark.parametrize("verifier", [Threshold(0.1), Typical()], ids=["threshold", "typical"])
@given(seed=st.integers(0, 10_000))
def test_a_greedy_cycle_without_changes_emits_the_beginning_of_what_exact_emits(verifier: Verifier, seed: int):
    draft_ids, _, target_probs, num_drafted, _ = tables(seed, 8, 3)
    draft_ids = torch.where(draft_ids > 2, draft_ids, target_probs[:, :-1].argmax(-1))
    lossy = verifier(draft_ids, None, target_probs, num_drafted)
    lossless = exact(draft_ids, None, target_probs, num_drafted)
    for row in range(8):
        ours, theirs = (
            [*draft_ids[row, : result.num_accepted[row]].tolist(), result.next_ids[row].item()]
            for result in (lossy, lossless)
        )
        assert (ours == theirs[: len(ours)]) == (lossy.num_changed[row] == 0)


@pytest.mark.parametrize("name", ["exact", "rejection"])
def test_a_lossless_verifier_changes_nothing(name: str):
    draft_ids, draft_probs, target_probs, num_drafted, uniforms = tables(0, 50, 3)
    verified = VERIFIERS[name](draft_ids, draft_probs, target_probs, num_drafted, uniforms)
    assert not verified.num_changed.any()
    assert verified.num_changed.dtype == torch.int64


# ------------------------------------------------------------------------------------------------ names, ranges, graphs


def test_verifiers_go_by_their_names_and_say_whether_they_are_lossless():
    assert {name: verifier.is_lossless for name, verifier in VERIFIERS.items()} == {
        "exact": True,
        "rejection": True,
        "threshold": False,
        "typical": False,
    }
    assert all(verifier.name == name for name, verifier in VERIFIERS.items())
    assert VERIFIERS["threshold"] == Threshold(0.3)
    assert VERIFIERS["typical"] == Typical(0.09, 0.3)


@pytest.mark.parametrize(
    ("rule", "settings"),
    [
        (Threshold, {"threshold": -0.1}),
        (Threshold, {"threshold": 1.1}),
        (Threshold, {"threshold": math.nan}),
        (Typical, {"epsilon": -0.1}),
        (Typical, {"epsilon": 1.5}),
        (Typical, {"delta": -0.1}),
        (Typical, {"delta": math.nan}),
    ],
)
def test_a_parameter_out_of_range_is_named_with_its_value(rule: type, settings: dict[str, float]):
    ((name, value),) = settings.items()
    with pytest.raises(GenerationError, match=rf"{name} must lie in \[0, 1\], got {value}"):
        rule(**settings)


@pytest.mark.parametrize("name", sorted(VERIFIERS))
@pytest.mark.parametrize("is_certain", [False, True], ids=["drawn", "certain"])
def test_a_verifier_compiles_into_one_graph(name: str, is_certain: bool):
    draft_ids, draft_probs, target_probs, num_drafted, uniforms = tables(0, 6, 3)
    draft_probs = None if is_certain else draft_probs
    compiled = torch.compile(VERIFIERS[name].__call__, backend="eager", fullgraph=True)
    for numbers in (uniforms, None)[: 1 if name == "rejection" else 2]:
        arguments = (draft_ids, draft_probs, target_probs, num_drafted, numbers)
        assert_same(compiled(*arguments), VERIFIERS[name](*arguments))
