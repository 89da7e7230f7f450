"""Our trunk is transformers' DeepseekV3, weight for weight and logit for logit."""

from __future__ import annotations

import pytest
import torch

from nextn.config import ModelConfig
from nextn.model.moe import Routing

from .conftest import SMALL, ours_from, relative_error, transformers_model

TOLERANCE = 1e-5


@torch.no_grad()
def test_logits_equal_those_of_transformers(shape: ModelConfig):
    hf = transformers_model(shape)
    ours = ours_from(hf, shape)
    ids = torch.randint(0, shape.vocab_size, (3, 40), generator=torch.Generator().manual_seed(1))
    theirs = hf(ids, attention_mask=torch.ones_like(ids)).logits
    assert relative_error(ours(ids).logits, theirs) < TOLERANCE


@torch.no_grad()
def test_cached_decoding_gives_the_logits_of_transformers_step_by_step(shape: ModelConfig):
    hf = transformers_model(shape)
    trunk = ours_from(hf, shape).trunk
    ids = torch.randint(0, shape.vocab_size, (2, 24), generator=torch.Generator().manual_seed(2))
    cache, theirs_cache, start = trunk.new_cache(num_rows=2, capacity=32), None, 0
    for width in (9, 1, 1, 4, 1, 8):  # prompt, single tokens, and the several tokens of a verification
        part = ids[:, start : start + width]
        positions = torch.arange(start, start + width).expand(2, -1)
        hidden = trunk.hidden_states(part, trunk.cached_context(positions), cache)
        out = hf(part, past_key_values=theirs_cache, use_cache=True)
        theirs_cache, start = out.past_key_values, start + width
        assert relative_error(trunk.output_head(trunk.final_norm(hidden)), out.logits) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("mistake", ["routing bias in the gate", "no routing bias", "rotary layout", "eps"])
def test_parity_catches_the_classic_mistakes(mistake: str):
    hf = transformers_model(SMALL)
    ours = ours_from(hf, SMALL)
    for layer in ours.trunk.model.layers:
        if mistake == "rotary layout":
            layer.self_attn.interleaved = False
        elif mistake == "eps":
            layer.input_layernorm.eps = 1e-2
        elif hasattr(layer.mlp, "gate") and mistake == "no routing bias":
            layer.mlp.gate.e_score_correction_bias.zero_()
        elif hasattr(layer.mlp, "gate"):
            gate = layer.mlp.gate
            plain_forward = gate.forward

            def biased(hidden, gate=gate, plain_forward=plain_forward):
                scores, _, experts = plain_forward(hidden)
                gates = (scores + gate.e_score_correction_bias).gather(1, experts)
                return Routing(scores, gates / gates.sum(-1, keepdim=True) * gate.scaling, experts)

            gate.forward = biased
    ids = torch.randint(0, SMALL.vocab_size, (2, 20), generator=torch.Generator().manual_seed(3))
    theirs = hf(ids, attention_mask=torch.ones_like(ids)).logits
    assert relative_error(ours(ids).logits, theirs) > 100 * TOLERANCE
