"""Speculative sampling has the distribution of plain sampling: by exact enumeration and by a chi-square test."""

from __future__ import annotations

import itertools
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from nextn.decoding import generate
from nextn.decoding.sampling import SamplingConfig, choose, transform
from nextn.decoding.verify import Threshold, Typical, Verification, Verifier, rejection
from nextn.mtp import MTPModel

from .conftest import TEXT, memorising_model

# Two drafts over three tokens. Every acceptance ratio and every cumulative sum below is a multiple of 1/CELLS, so the
# midpoints of CELLS equal cells of the unit interval stand for the whole of it, exactly.
CELLS = 12
DRAFT_1 = (Fraction(1, 2), Fraction(1, 4), Fraction(1, 4))
TARGET_1 = (Fraction(1, 4), Fraction(1, 3), Fraction(5, 12))
DRAFT_2 = {  # by the first token
    0: (Fraction(1, 2), Fraction(1, 2), Fraction(0)),
    1: (Fraction(1), Fraction(0), Fraction(0)),
    2: (Fraction(1, 3), Fraction(1, 3), Fraction(1, 3)),
}
TARGET_2 = {
    0: (Fraction(1, 4), Fraction(1, 4), Fraction(1, 2)),
    1: (Fraction(1, 4), Fraction(1, 2), Fraction(1, 4)),
    2: (Fraction(1, 3), Fraction(1, 3), Fraction(1, 3)),
}
TARGET_3 = {  # by the first two tokens
    pair: tuple(Fraction(weight, 12) for weight in weights)
    for pair, weights in zip(
        itertools.product(range(3), repeat=2),
        [(1, 2, 9), (3, 3, 6), (12, 0, 0), (5, 5, 2), (0, 6, 6), (4, 4, 4), (2, 9, 1), (6, 0, 6), (1, 1, 10)],
        strict=True,
    )
}


def plain_distribution() -> dict[tuple[int, int, int], Fraction]:
    """Probability of each three tokens under plain sampling from the target."""
    return {
        (x, y, z): TARGET_1[x] * TARGET_2[x][y] * TARGET_3[x, y][z] for x, y, z in itertools.product(range(3), repeat=3)
    }


def speculative_distribution(verifier: Verifier) -> dict[tuple[int, int, int], Fraction]:
    """The same when a cycle of two drafts comes first and plain sampling completes it: all paths, exact weights."""
    paths = list(itertools.product(range(3), range(3), range(CELLS), range(CELLS), range(CELLS)))
    as_row = [[float(value) for value in row] for row in (DRAFT_1, TARGET_1)]
    draft_ids = torch.tensor([path[:2] for path in paths])
    draft_probs = torch.tensor([[as_row[0], [float(value) for value in DRAFT_2[x]]] for x, *_ in paths])
    target_probs = torch.tensor(
        [[as_row[1], [*map(float, TARGET_2[x])], [*map(float, TARGET_3[x, y])]] for x, y, *_ in paths]
    )
    uniforms = (torch.tensor([path[2:] for path in paths], dtype=torch.float64) + 0.5) / CELLS
    result = verifier(draft_ids, draft_probs, target_probs, torch.full((len(paths),), 2), uniforms)

    distribution = dict.fromkeys(itertools.product(range(3), repeat=3), Fraction(0))
    outcomes = zip(paths, result.num_accepted.tolist(), result.next_ids.tolist(), strict=True)
    for (x, y, *_), num_accepted, next_id in outcomes:
        weight = DRAFT_1[x] * DRAFT_2[x][y] / CELLS**3
        emitted = (*(x, y)[:num_accepted], next_id)
        for rest in itertools.product(range(3), repeat=3 - len(emitted)):
            a, b, c = (*emitted, *rest)
            completion = Fraction(1)
            if len(emitted) < 2:
                completion *= TARGET_2[a][b]
            if len(emitted) < 3:
                completion *= TARGET_3[a, b][c]
            distribution[a, b, c] += weight * completion
    return distribution


def without_residual(draft_ids, draft_probs, target_probs, num_drafted, uniforms) -> Verification:
    """Broken in the classic way: after a rejection, samples from the target instead of the residual."""
    verified = rejection(draft_ids, draft_probs, target_probs, num_drafted, uniforms)
    rows = torch.arange(draft_ids.shape[0])
    return replace(verified, next_ids=choose(target_probs[rows, verified.num_accepted], uniforms[:, -1]))


def accept_by_target_alone(draft_ids, draft_probs, target_probs, num_drafted, uniforms) -> Verification:
    """Broken: accepts with probability target(x), forgetting to divide by draft(x)."""
    return rejection(draft_ids, draft_probs.clamp(min=1.0), target_probs, num_drafted, uniforms)


def test_the_tables_exercise_acceptance_rejection_and_bonus():
    ratios = {min(Fraction(1), target / draft) for draft, target in zip(DRAFT_1, TARGET_1, strict=True)}
    assert ratios == {Fraction(1, 2), Fraction(1)}
    assert all((ratio * CELLS).denominator == 1 for ratio in ratios)


def test_speculative_sampling_has_exactly_the_distribution_of_plain_sampling():
    assert speculative_distribution(rejection) == plain_distribution()


@pytest.mark.parametrize(
    "broken",
    [without_residual, accept_by_target_alone, Threshold(), Typical()],
    ids=["without_residual", "accept_by_target_alone", "threshold", "typical"],
)
def test_a_broken_or_lossy_verifier_does_not_have_the_distribution_of_plain_sampling(broken: Verifier):
    distribution = speculative_distribution(broken)
    assert sum(distribution.values()) == 1
    assert distribution != plain_distribution()


NUM_SAMPLES = 700
SETTINGS = {"temperature": 1.6, "top_k": 3}
CRITICAL = 3.1
"""Standard normal quantile of 0.1 %: a correct sampler exceeds it for one seed in a thousand, and the seed is fixed."""


@torch.inference_mode()
def plain_distribution_of_model(model: MTPModel, prompt: list[int], num_new: int) -> dict[tuple[int, ...], float]:
    """Probability of every continuation under plain sampling, from uncached forwards."""
    distribution = {(): 1.0}
    for _ in range(num_new):
        rows = torch.tensor([[*prompt, *tokens] for tokens in distribution])
        probs = transform(model.trunk(rows)[:, -1], SamplingConfig(**SETTINGS)).tolist()
        distribution = {
            (*tokens, token): weight * prob
            for (tokens, weight), row in zip(distribution.items(), probs, strict=True)
            for token, prob in enumerate(row)
            if prob > 0
        }
    return distribution


def chi_square_score(distribution: dict[tuple[int, ...], float], samples: list[tuple[int, ...]]) -> float:
    """Pearson's statistic as a standard normal number (Wilson and Hilferty 1931), cells of expectation < 5 pooled."""
    observed = dict.fromkeys(distribution, 0)
    for sample in samples:
        observed[sample] = observed.get(sample, 0) + 1
    expected = {outcome: len(samples) * distribution.get(outcome, 0.0) for outcome in observed}
    large = [outcome for outcome in observed if expected[outcome] >= 5]
    pairs = [(observed[outcome], expected[outcome]) for outcome in large]
    rest = len(samples) - np.sum(pairs, axis=0)
    pairs.append((rest[0], max(rest[1], 1e-9)))
    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in pairs)
    freedom = len(pairs) - 1
    return ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5


@pytest.fixture(scope="module")
def half_trained() -> MTPModel:
    return memorising_model(25)


@pytest.mark.parametrize(
    ("verifier", "is_lossless"), [("auto", True), (without_residual, False)], ids=["rejection", "without_residual"]
)
def test_sampled_speculative_text_passes_a_chi_square_test_against_plain_sampling(
    half_trained: MTPModel, verifier: Verifier | str, is_lossless: bool
):
    prompt, num_new = TEXT[0, :6].tolist(), 4
    prompts = [prompt] * NUM_SAMPLES
    result = generate(half_trained, prompts, max_new_tokens=num_new, draft_length=2, verifier=verifier, **SETTINGS)
    assert all(result.stats.histogram), "every accepted length occurs"
    score = chi_square_score(plain_distribution_of_model(half_trained, prompt, num_new), list(result.token_ids))
    assert (score < CRITICAL) == is_lossless, f"chi-square score {score:.1f}"


def test_the_text_of_a_prompt_depends_on_seed_and_place_only(half_trained: MTPModel):
    def sampled(prompts: list[list[int]], seed: int) -> tuple[tuple[int, ...], ...]:
        return generate(half_trained, prompts, max_new_tokens=12, temperature=1.0, seed=seed).token_ids

    first, second = sampled([[1, 2], [5]], seed=7)
    assert sampled([[1, 2], [9, 9]], seed=7)[0] == first
    assert sampled([[3], [5]], seed=7)[1] == second
    assert sampled([[1, 2], [5]], seed=8) != (first, second)


def test_sampling_at_a_tiny_temperature_is_greedy(half_trained: MTPModel):
    prompts = [TEXT[0, :5].tolist(), [3]]
    cold = generate(half_trained, prompts, max_new_tokens=20, temperature=1e-6)
    assert cold.token_ids == generate(half_trained, prompts, max_new_tokens=20).token_ids


def test_plain_sampling_is_the_same_loop_without_drafts(half_trained: MTPModel):
    samples = generate(half_trained, [TEXT[0, :6].tolist()] * 800, max_new_tokens=2, draft_length=0, **SETTINGS)
    distribution = plain_distribution_of_model(half_trained, TEXT[0, :6].tolist(), 2)
    assert chi_square_score(distribution, list(samples.token_ids)) < CRITICAL


@torch.inference_mode()
def raw_draft_logits(model: MTPModel, known: list[int], num_draft_tokens: int) -> torch.Tensor:
    """Logits that depths 1..num_draft_tokens draft from, [num_draft_tokens, V], uncached: `known` ends with the drafts.

    Depth k drafts the token after t[n+k-1] from position n-1, the last one it has in the row t[0..n+k-1].
    """
    end = len(known) - num_draft_tokens
    rows = [torch.tensor([known[: end + depth - 1]]) for depth in range(1, num_draft_tokens + 1)]
    return torch.stack([model(row).logits_per_depth[depth][0, -1] for depth, row in enumerate(rows, start=1)])


@pytest.mark.parametrize(
    ("setting", "is_dropped"),
    [
        ({"top_k": 3}, lambda ordered: torch.arange(len(ordered)) >= 3),
        ({"top_p": 0.6}, lambda ordered: ordered.cumsum(0) - ordered >= 0.6),
        ({"min_p": 0.3}, lambda ordered: ordered < 0.3 * ordered[0]),
    ],
    ids=["top_k", "top_p", "min_p"],
)
def test_the_drafts_distributions_are_cut_down_like_the_targets(half_trained: MTPModel, setting, is_dropped):
    """`is_dropped` says by hand, of probabilities in falling order, which ones the setting leaves out."""
    prompt, temperature, calls = TEXT[0, :6].tolist(), 1.6, []

    def spy(draft_ids, draft_probs, target_probs, num_drafted, uniforms) -> Verification:
        verified = rejection(draft_ids, draft_probs, target_probs, num_drafted, uniforms)
        calls.append(
            (draft_ids[0].tolist(), () if draft_probs is None else draft_probs[0].clone(), verified.num_accepted.item())
        )
        return verified

    result = generate(
        half_trained, [prompt], max_new_tokens=24, draft_length=2, temperature=temperature, verifier=spy, **setting
    )
    num_known, num_dropped = len(prompt) + 1, 0
    for draft_ids, draft_probs, num_accepted in calls:
        known = [*prompt, *result.token_ids[0]][:num_known] + draft_ids
        num_known += num_accepted + 1
        if not draft_ids:
            continue
        unfiltered = (raw_draft_logits(half_trained, known, len(draft_ids)) / temperature).softmax(-1)
        for probs, raw in zip(draft_probs, unfiltered, strict=True):
            ordered, order = raw.sort(descending=True)
            dropped = torch.zeros_like(raw, dtype=torch.bool).scatter_(0, order, is_dropped(ordered))
            num_dropped += int(dropped.sum())
            assert not probs[dropped].any(), "a token that the setting leaves out can be drafted"
            expected = raw.masked_fill(dropped, 0.0)
            torch.testing.assert_close(probs, expected / expected.sum(), rtol=1e-3, atol=1e-5)
            assert not torch.allclose(probs, raw, rtol=1e-3, atol=1e-5), "a distribution left whole must be noticed"
    assert num_known == len(prompt) + 24
    assert num_dropped > 0
