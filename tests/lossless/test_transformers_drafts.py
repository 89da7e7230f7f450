"""`drafting="transformers"` takes as many trunk forwards as transformers' own `use_mtp`: the drafts are the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import DeepseekV3ForCausalLM

from nextn.decoding import generate
from nextn.mtp import MTPModel, save_model

from .conftest import TEXT, TINY, memorising_model

NUM_NEW = 40
PROMPTS = [TEXT[0, :5].tolist(), TEXT[2, :9].tolist(), [3, 3, 3]]


class WithOurLayers(DeepseekV3ForCausalLM):
    """transformers looks for MTP weights under layer 61 only, that of the released model."""

    _keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{TINY.num_hidden_layers + module}\." for module in range(3)]


def their_forwards(model: MTPModel, folder: Path) -> list[tuple[int, list[int]]]:
    """Trunk forwards and new tokens of each prompt, by transformers."""
    save_model(model, folder)
    theirs = WithOurLayers.from_pretrained(folder, dtype=torch.float32).eval()
    num_forwards = 0

    def count(*_: object) -> None:
        nonlocal num_forwards
        num_forwards += 1

    theirs.register_forward_pre_hook(count)
    found = []
    for prompt in PROMPTS:
        num_forwards = 0
        input_ids = torch.tensor([prompt])
        output = theirs.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=NUM_NEW,
            do_sample=False,
            use_mtp=True,
            pad_token_id=0,
        )
        found.append((num_forwards, output[0, len(prompt) :].tolist()))
    return found


def our_forwards(model: MTPModel, **settings: object) -> list[tuple[int, list[int]]]:
    """The same by us, were the last cycle not cut to what is left: transformers drafts its fill to the very end."""
    result = generate(model, PROMPTS, max_new_tokens=NUM_NEW + 4, eos_token_id=None, **settings)
    found = []
    for token_ids, origins in zip(result.token_ids, result.origins, strict=True):
        # Each forward ends with a token of the trunk's own; one more is under way where the last place is a draft.
        complete = origins[:NUM_NEW].count(0)
        found.append((complete + (origins[NUM_NEW - 1] != 0), list(token_ids[:NUM_NEW])))
    return found


@pytest.mark.parametrize("num_depths", [1, 2, 3])
def test_forwards_and_tokens_are_those_of_transformers(tmp_path: Path, num_depths: int):
    model = memorising_model(45, num_depths=num_depths)
    theirs = their_forwards(model, tmp_path)
    assert our_forwards(model, drafting="transformers") == theirs
    assert min(forwards for forwards, _ in theirs) < NUM_NEW * 0.9, "drafts are accepted"
    others = our_forwards(model, drafting="vllm", draft_length=num_depths)
    assert [tokens for _, tokens in others] == [tokens for _, tokens in theirs]
    assert others != theirs, "other drafts take another number of forwards"
