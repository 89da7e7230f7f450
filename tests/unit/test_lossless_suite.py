"""The lossless suite passes models that decode losslessly, and each defect fails the check that is about it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nextn.decoding import verify
from nextn.decoding.drafters.mtp import MTPDrafter
from nextn.decoding.loop import BatchLoop
from nextn.decoding.sampling import transform
from nextn.decoding.verify import Verification
from nextn.lossless import Check, Subject, bfloat16_divergence, lossless_checks, sampling
from nextn.lossless.differences import differences, first_difference, text_check
from nextn.lossless.sampling import WithoutResidual, chi_square_p_value, exact_distribution
from nextn.model.cache import LayerCache
from nextn.mtp import MTPModel

from ..lossless.conftest import TEXT, TINY, memorising_model

PROMPTS = tuple(TEXT[row, :length].tolist() for row, length in enumerate((9, 5, 12, 7)))
NAMES = ["no cache", "greedy", "eos", "full accept", "zero accept", "rollback", "sampling", "control"]


@pytest.fixture(scope="module")
def model() -> MTPModel:
    return memorising_model(30)


@pytest.fixture(autouse=True)
def few_samples(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sampling, "NUM_SAMPLES", (200, 400))


def outcome(subject: Subject) -> dict[str, Check]:
    return {check.name: check for check in lossless_checks(subject)}


def failed(subject: Subject) -> set[str]:
    return {name for name, check in outcome(subject).items() if not check.passed}


def test_a_model_that_drafts_with_its_depths_passes_every_check(model: MTPModel):
    checks = outcome(Subject(model, PROMPTS, 24))
    assert list(checks) == NAMES
    assert all(check.passed and not check.evidence for check in checks.values()), checks
    assert checks["greedy"].num_compared == 3 * 2 * len(PROMPTS)
    assert checks["no cache"].num_compared == 2 * (1 + 3 * 2)


def test_a_scheme_that_cannot_draft_further_is_tried_as_far_as_it_can():
    model = memorising_model(30, scheme="parallel", num_depths=2)
    subject = Subject(model, PROMPTS, 24)
    assert subject.draft_lengths == (1, 2)
    assert not failed(subject)


def test_a_model_without_mtp_is_verified_with_prompt_lookup():
    model = memorising_model(14, num_depths=0)  # lookups are right about half the time
    subject = Subject(model, tuple(2 * TEXT[row, :12].tolist() for row in range(4)), 24)
    assert (subject.drafter, subject.draft_lengths) == ("prompt_lookup", (1, 2, 3))
    assert not failed(subject)


# ------------------------------------------------------------------------------------------------------------- defects

exact_call, rejection_call = verify.Exact.__call__, verify.Rejection.__call__
write, draft_depths, close = LayerCache.write, MTPDrafter._draft_depths, BatchLoop._close


def accept_everything(self, draft_ids, draft_probs, target_probs, num_drafted, uniforms=None) -> Verification:
    rows = torch.arange(draft_ids.shape[0])
    return Verification(num_drafted, target_probs[rows, num_drafted].argmax(-1), torch.zeros_like(num_drafted))


def accept_nothing(self, draft_ids, draft_probs, target_probs, num_drafted, uniforms=None) -> Verification:
    none = torch.zeros_like(num_drafted)
    return exact_call(self, draft_ids, draft_probs, target_probs, none, uniforms)


def no_residual(self, draft_ids, draft_probs, target_probs, num_drafted, uniforms) -> Verification:
    verified = rejection_call(self, draft_ids, draft_probs, target_probs, num_drafted, uniforms)
    rows = torch.arange(draft_ids.shape[0])
    next_ids = verify.choose(target_probs[rows, verified.num_accepted], uniforms[:, -1])
    return Verification(verified.num_accepted, next_ids, verified.num_changed)


def write_once(self: LayerCache, positions: Tensor, latent: Tensor) -> None:
    index = positions.unsqueeze(-1).expand_as(latent)
    old = self.latent.gather(1, index)
    self.latent.scatter_(1, index, torch.where(old == 0, latent, old))


def claim_another_distribution(self: MTPDrafter, *args, **kwargs):
    """Drafts as before, and says that every token was equally likely."""
    ids, probs, confidence = draft_depths(self, *args, **kwargs)
    return ids, None if probs is None else torch.full_like(probs, 1 / probs.shape[-1]), confidence


def close_without_moving(self: BatchLoop, slot: int) -> None:
    """The last row takes the place of one that ended, and leaves its cache behind."""
    copy_row, type(self._cache).copy_row = type(self._cache).copy_row, lambda *_: None
    close(self, slot)
    type(self._cache).copy_row = copy_row


DEFECTS: dict[str, tuple[type, str, Callable, set[str]]] = {
    "accepts everything": (verify.Exact, "__call__", accept_everything, {"no cache", "greedy", "eos", "zero accept"}),
    "accepts nothing": (verify.Exact, "__call__", accept_nothing, {"full accept"}),
    "stale cache": (LayerCache, "write", write_once, {"no cache", "greedy", "rollback", "zero accept"}),
    "no residual": (verify.Rejection, "__call__", no_residual, {"sampling"}),
    "wrong draft distribution": (MTPDrafter, "_draft_depths", claim_another_distribution, {"sampling"}),
    "rows moved without their cache": (BatchLoop, "_close", close_without_moving, {"eos"}),
}


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda name: name.replace(" ", "_"))
def test_a_defect_fails_the_checks_that_are_about_it(model: MTPModel, monkeypatch: pytest.MonkeyPatch, defect: str):
    owner, name, broken, expected = DEFECTS[defect]
    monkeypatch.setattr(owner, name, broken)
    found = failed(Subject(model, PROMPTS, 24))
    assert expected <= found, found
    if expected == {"sampling"}:
        assert found == expected
    if expected == {"full accept"}:
        assert found == expected


def test_a_test_that_cannot_tell_a_broken_verifier_says_that_it_has_no_power(
    model: MTPModel, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(WithoutResidual, "__call__", lambda self, *args: rejection_call(verify.rejection, *args))
    control = outcome(Subject(model, PROMPTS, 24))["control"]
    assert control.passed is False
    assert "no power" in control.finding


# ------------------------------------------------------------------------------------------------------------ evidence


def test_the_evidence_names_the_first_place_that_differs_and_the_margin_there(
    model: MTPModel, monkeypatch: pytest.MonkeyPatch
):
    """Broken: one token is another one, always the third of prompt 1."""
    greedy = Subject.greedy

    def other(self, draft_length, batch_size, eos_token_id=None):
        result = greedy(self, draft_length, batch_size, eos_token_id)
        ids = list(map(list, result.token_ids))
        if draft_length == 2:
            ids[1][3] = (ids[1][3] + 1) % TINY.vocab_size
        return type(result)(**{**vars(result), "token_ids": tuple(map(tuple, ids))})

    monkeypatch.setattr(Subject, "greedy", other)
    check = outcome(Subject(model, PROMPTS, 24))["greedy"]
    plain = model_plain = greedy(Subject(model, PROMPTS, 24), 0, 1).token_ids[1]
    with torch.inference_mode():
        logits = model.trunk(torch.tensor([[*PROMPTS[1], *model_plain[:3]]]))[0, -1]
    best, second = logits.topk(2).values.tolist()
    (first, _) = check.evidence
    assert (first["prompt"], first["position"], first["setting"]) == (1, 3, "N = 2, batch 1")
    assert (first["expected"], first["got"]) == (plain[3], (plain[3] + 1) % TINY.vocab_size)
    assert first["top_two_margin"] == pytest.approx(best - second, rel=1e-4)
    assert not first["is_near_tie"]
    assert "prompt 1, new token 3" in check.finding


def test_a_difference_at_a_tie_is_counted_and_not_held_against_the_model(model: MTPModel):
    tied = copy.deepcopy(model)
    subject = Subject(tied, PROMPTS[:1], 4)
    plain = subject.greedy(0, 1).token_ids[0]
    twin = next(token for token in range(TINY.vocab_size) if token not in (*plain, *PROMPTS[0]))
    with torch.no_grad():
        tied.trunk.output_head.weight[twin] = tied.trunk.output_head.weight[plain[0]]
    (found,) = differences(subject, [plain], [[twin, *plain[1:]]], "by hand")
    assert found.is_near_tie
    assert found.top_two_margin == 0
    check = text_check("greedy", "", 1, [found])
    assert check.passed
    assert "1 near ties" in check.finding


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_texts_are_equal_up_to_the_first_difference(one: list[int], other: list[int]):
    position = first_difference(one, other)
    if position is None:
        assert one == other
    else:
        assert one[:position] == other[:position]
        assert one[position : position + 1] != other[position : position + 1]


# ---------------------------------------------------------------------------------------------------------- statistics


def test_the_exact_distribution_sums_to_one_and_its_first_token_that_of_one_forward(model: MTPModel):
    distribution = exact_distribution(model, PROMPTS[0], 3)
    assert sum(distribution.values()) == pytest.approx(1, abs=1e-5)
    assert len(distribution) == 4**3
    with torch.inference_mode():
        probs = transform(model.trunk(torch.tensor([PROMPTS[0]]))[0, -1], sampling.SAMPLING)
    first = torch.zeros(TINY.vocab_size)
    for (token, *_), weight in distribution.items():
        first[token] += weight
    torch.testing.assert_close(first, probs)


def throws(weights: list[float], num_samples: int, seed: int) -> list[tuple[int, ...]]:
    drawn = torch.multinomial(
        torch.tensor(weights), num_samples, replacement=True, generator=torch.Generator().manual_seed(seed)
    )
    return [(face,) for face in drawn.tolist()]


def test_p_values_of_fair_throws_are_spread_evenly_and_those_of_loaded_dice_are_small():
    fair, loaded = [1 / 6] * 6, [0.12, 0.12, 0.16, 0.2, 0.2, 0.2]
    distribution = {(face,): prob for face, prob in enumerate(fair)}
    p_values = [chi_square_p_value(distribution, throws(fair, 600, seed)) for seed in range(200)]
    assert 0.4 < sum(p_values) / 200 < 0.6
    assert sum(p < 0.1 for p in p_values) / 200 == pytest.approx(0.1, abs=0.05)
    assert chi_square_p_value(distribution, throws(loaded, 600, 0)) < 1e-4


def test_rare_outcomes_are_pooled_and_impossible_ones_are_fatal():
    distribution = {(0,): 0.5, (1,): 0.49} | {(rare,): 0.001 for rare in range(2, 12)}
    samples = [(0,)] * 100 + [(1,)] * 98 + [(7,)] * 2
    assert chi_square_p_value(distribution, samples) > 0.9, "ten cells of expectation 0.2 are one of expectation 2"
    assert chi_square_p_value(distribution, [*samples, (12,)]) == 0
    assert chi_square_p_value({(0,): 1.0}, [(0,)] * 5) == 1


def test_bfloat16_is_measured_and_never_fails(model: MTPModel, monkeypatch: pytest.MonkeyPatch):
    rounded = Subject(copy.deepcopy(model).to(torch.bfloat16), PROMPTS, 24)
    assert bfloat16_divergence(rounded).passed is None
    monkeypatch.setattr(verify.Exact, "__call__", accept_everything)
    found = bfloat16_divergence(rounded)
    assert found.passed is None
    assert "100% of texts differ" in found.finding
    assert all(one["top_two_margin"] >= 0 for one in found.evidence)


def test_what_begins_is_told_before_each_check(model: MTPModel):
    said: list[str] = []
    list(lossless_checks(Subject(model, PROMPTS[:1], 4), said.append))
    assert said[0] == "decoding plainly"
    assert said[-1].startswith("sampling")
