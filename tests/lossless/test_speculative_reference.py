"""The batch loop does what thirty plain lines say: the same tokens and the same accepted drafts, cycle for cycle."""

from __future__ import annotations

import pytest
import torch

from nextn.alignment import embedded_positions
from nextn.decoding import Decoder, DraftSettings, Request, SamplingConfig, plain_reference, speculative_reference
from nextn.decoding.drafters import mtp
from nextn.mtp import MTPModel

from .test_every_scheme import NUM_DEPTHS, PROMPTS, half_trained

SCHEMES = ("sequential", "sequential, shared weights", "independent", "parallel", "shared module")
SAMPLINGS = {
    "greedy": SamplingConfig(),
    "sampled": SamplingConfig(temperature=0.9),
    "filtered": SamplingConfig(temperature=1.3, top_k=9, top_p=0.9, min_p=0.01),
}
NUM_NEW = 24


def loop_and_reference(
    model: MTPModel, draft_length: int, sampling: SamplingConfig, seed: int = 3
) -> tuple[list[tuple[list[int], list[int]]], list[tuple[list[int], list[int]]]]:
    """New tokens and accepted drafts per cycle of each prompt, once by the loop and once by the reference."""
    decoder = Decoder(model, draft=DraftSettings(convention="as_trained", length=draft_length))
    loop, reference = [], []
    for prompt in PROMPTS:
        result = decoder.generate([prompt], Request(NUM_NEW, sampling, seed))
        # The first token is the trunk's; after it each cycle is its accepted drafts (1, 2, ...) and a 0.
        cycles = "".join(str(min(origin, 1)) for origin in result.origins[0][1:]).split("0")[:-1]
        loop.append((list(result.token_ids[0]), [len(accepted) for accepted in cycles]))
        reference.append(speculative_reference(model, prompt, NUM_NEW, draft_length, sampling, seed))
    return loop, reference


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("draft_length", range(1, NUM_DEPTHS + 1))
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_batch_loop_emits_and_accepts_what_the_reference_does(scheme: str, draft_length: int, sampling: str):
    loop, reference = loop_and_reference(half_trained(scheme), draft_length, SAMPLINGS[sampling])
    assert loop == reference


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_reference_itself_decodes_plainly_when_greedy_and_accepts_some_drafts(scheme: str):
    model = half_trained(scheme)
    for prompt in PROMPTS:
        token_ids, num_accepted = speculative_reference(model, prompt, NUM_NEW, draft_length=2)
        assert token_ids == plain_reference(model, prompt, NUM_NEW)
        assert len(token_ids) == 1 + sum(num_accepted) + len(num_accepted)
    assert sum(num_accepted) > 0


def test_other_seeds_give_other_texts():
    model, sampling = half_trained("sequential"), SAMPLINGS["sampled"]
    texts = {tuple(speculative_reference(model, PROMPTS[0], NUM_NEW, 2, sampling, seed)[0]) for seed in range(4)}
    assert len(texts) == 4


def test_a_drafter_that_embeds_the_token_before_differs_from_the_reference(monkeypatch: pytest.MonkeyPatch):
    """Broken: greedy text stays right, since verification sees to it; the accepted lengths do not."""
    monkeypatch.setattr(mtp, "embedded_positions", lambda positions, depth: embedded_positions(positions, depth - 1))
    loop, reference = loop_and_reference(half_trained("sequential"), 3, SamplingConfig())
    assert [tokens for tokens, _ in loop] == [tokens for tokens, _ in reference]
    assert loop != reference


def test_a_loop_that_uses_a_number_twice_differs_from_the_reference(monkeypatch: pytest.MonkeyPatch):
    """Broken: the number that chooses the next token decides acceptance too."""
    monkeypatch.setattr(
        "nextn.decoding.loop._of_verification",
        lambda uniforms, num_drafts: torch.cat([uniforms[:, -1:]] * (num_drafts + 1), dim=1),
    )
    loop, reference = loop_and_reference(half_trained("sequential"), 2, SAMPLINGS["sampled"])
    assert loop != reference
