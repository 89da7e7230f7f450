"""Compiled steps emit token for token what eager ones emit; slow, because compiling is."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

from nextn.decoding import Decoder, GenerationResult

from .conftest import TEXT, memorising_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler"),
]
PROMPTS = [TEXT[0, :5].tolist(), TEXT[1, :2].tolist(), TEXT[2, :9].tolist()]


def decoded(compiled: bool, draft_length: int, batch_size: int, **arguments: Any) -> GenerationResult:
    decoder = Decoder(memorising_model(30), draft_length=draft_length, batch_size=batch_size, compiled=compiled)
    return decoder.generate(PROMPTS, **{"max_new_tokens": 20, **arguments})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("draft_length", "batch_size"), [(0, 1), (2, 1), (2, 2)])
def test_compiled_steps_emit_what_eager_ones_do(draft_length: int, batch_size: int, temperature: float):
    """Two slots and three prompts: one slot is idle in the end, and one is used twice."""
    arguments: dict[str, Any] = {"temperature": temperature, "eos_token_id": 5}
    eager = decoded(False, draft_length, batch_size, **arguments)
    compiled = decoded(True, draft_length, batch_size, **arguments)
    assert compiled.token_ids == eager.token_ids
    assert compiled.finish_reasons == eager.finish_reasons
    assert compiled.origins == eager.origins
