"""Weights in another form: the same outputs up to rounding, from a model that itself stays as it is."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from nextn.config import MTPConfig
from nextn.decoding import Decoder, plain_reference
from nextn.errors import ConfigError
from nextn.model.prepared import (
    Int8Experts,
    Int8Linear,
    PackedLinear,
    SummedLinear,
    packs_bfloat16,
    prepared,
    rounded_to_int8,
)
from nextn.mtp import MTPModel

from ..lossless.conftest import TEXT, TINY, memorising_model, random_model
from ..lossless.test_batches import transformers_model

PROMPTS = [TEXT[0, :5].tolist(), TEXT[1, :1].tolist(), TEXT[2, :9].tolist()]
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="packing needs oneDNN")


def model_of(dtype: torch.dtype) -> MTPModel:
    return copy.deepcopy(random_model(3)).to(dtype)


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.float() - expected.float()).abs().max() / expected.float().abs().max())


@torch.no_grad()
def logits(model: MTPModel) -> Tensor:
    trunk = model.eval().trunk
    return trunk.output_head(trunk.final_norm(trunk.hidden_states(TEXT)))


@needs_onednn
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_packed_weights_give_the_same_outputs_up_to_rounding(
    dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("nextn.model.prepared.MIN_WEIGHTS_PACKED", 0)
    model = model_of(dtype)
    packed = prepared(model, "packed")
    kind = PackedLinear if dtype == torch.bfloat16 and packs_bfloat16() else SummedLinear
    assert any(isinstance(module, kind) for module in packed.modules())
    assert relative_error(logits(packed), logits(model)) < tolerance


@given(
    num_out=st.integers(1, 6), num_in=st.integers(1, 9), seed=st.integers(0, 99), scale=st.sampled_from([1e-4, 1, 9])
)
def test_weights_of_8_bits_are_off_by_half_a_step_at_most(num_out: int, num_in: int, seed: int, scale: float):
    weight = scale * torch.randn(num_out, num_in, generator=torch.Generator().manual_seed(seed))
    rounded, step = rounded_to_int8(weight)
    assert rounded.dtype == torch.int8
    error = (rounded.float() * step[:, None] - weight).abs()
    assert (error <= 0.5001 * step[:, None]).all()
    assert (step <= weight.abs().amax(-1) / 127 * 1.0001 + 1e-12).all()


def test_rows_of_zeros_stay_zeros():
    rounded, step = rounded_to_int8(torch.zeros(2, 3))
    assert not rounded.any()
    assert torch.isfinite(step).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_in", [64, 24, 17])
def test_a_product_with_8_bits_is_within_the_bound_of_its_rounding(dtype: torch.dtype, num_in: int):
    """|sum of (w' - w) x| <= sum of half a step times |x|, beside the rounding of the dtype itself."""
    torch.manual_seed(0)
    linear = nn.Linear(num_in, 48, bias=True).to(dtype)
    hidden = torch.randn(2, 3, num_in, dtype=dtype)
    inputs = hidden[:, 1:].double()  # not contiguous
    exact = nn.functional.linear(inputs, linear.weight.double(), linear.bias.double())
    with torch.no_grad():
        got = Int8Linear(linear)(hidden[:, 1:]).double()
    _, step = rounded_to_int8(linear.weight)
    bound = 0.5 * step.double() * inputs.abs().sum(-1, keepdim=True)
    slack = 4 * torch.finfo(dtype).eps * exact.abs().max()
    assert ((got - exact).abs() <= bound + slack).all()
    assert (got - exact).abs().max() > 0, "8 bits are not enough for these weights"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_of_8_bits_is_near_the_model_it_came_from(dtype: torch.dtype):
    model = model_of(dtype)
    rounded = prepared(model, "int8")
    kinds = {type(module) for module in rounded.modules()}
    assert {Int8Linear, Int8Experts} <= kinds
    with torch.no_grad():
        expected, got = model.trunk(TEXT[:1, :4]).float(), rounded.trunk(TEXT[:1, :4]).float()
    assert 0 < relative_error(got, expected) < 0.2


def test_experts_of_8_bits_compute_what_experts_of_their_rounded_weights_do():
    model = random_model(3)
    rounded, restored = prepared(model, "int8"), copy.deepcopy(model)
    with torch.no_grad():
        for name, module in restored.named_modules():
            if type(module) is nn.Linear and not name.endswith("kv_b_proj"):
                whole, step = rounded_to_int8(module.weight)
                module.weight.copy_(whole.float() * step[..., None])
            elif hasattr(module, "gate_up_proj"):
                for weight in (module.gate_up_proj, module.down_proj):
                    whole, step = rounded_to_int8(weight)
                    weight.copy_(whole.float() * step[..., None])
    assert relative_error(logits(rounded), logits(restored)) < 1e-4


@needs_onednn
@pytest.mark.parametrize("form", ["packed", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_itself_stays_as_it_is(form: str, dtype: torch.dtype):
    model = model_of(dtype)
    kinds = [type(module) for module in model.modules()]
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    before = logits(model)
    prepared(model, form)
    assert [type(module) for module in model.modules()] == kinds
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("form", ["packed", "int8"])
def test_weights_that_are_one_stay_one_and_nothing_stored_is_copied(form: str):
    config = replace(TINY, tie_word_embeddings=True)
    model = MTPModel(config, MTPConfig(num_depths=2, share_weights=True)).initialize(0).eval()
    result = prepared(model, form)
    assert result.trunk.output_head.weight is result.trunk.model.embed_tokens.weight
    assert result.trunk.model.embed_tokens.weight is model.trunk.model.embed_tokens.weight
    pointers = {weight.data_ptr() for weight in model.parameters()}
    assert {weight.data_ptr() for weight in result.parameters()} <= pointers
    if form == "packed":
        with torch.no_grad():
            before = logits(model)
            model.trunk.model.embed_tokens.weight.mul_(0.5)
            assert not torch.equal(logits(model), before)
            assert relative_error(logits(result), logits(model)) < 1e-5, "both read the same storage"


def test_a_module_that_stands_in_two_places_is_prepared_once():
    shared = nn.Linear(3, 3)
    result = prepared(nn.ModuleList([nn.Sequential(shared), nn.Sequential(shared)]), "packed")
    assert result[0][0] is result[1][0]
    assert isinstance(result[0][0], SummedLinear)


def test_as_stored_is_the_model_itself_and_other_forms_are_refused():
    model = random_model(0)
    assert prepared(model, "as_stored") is model
    with pytest.raises(ConfigError, match="packed, int8, as_stored, got 'int4'"):
        prepared(model, "int4")


# -------------------------------------------------------------------------------------------- through the whole decoder


@needs_onednn
@pytest.mark.parametrize("form", ["packed", "int8"])
@pytest.mark.parametrize("source", ["native", "transformers"])
def test_a_decoder_with_prepared_weights_is_lossless_with_respect_to_them(form: str, source: str):
    """Cached and uncached alike: attention has two forms, which must read the same matrices."""
    model = memorising_model(30) if source == "native" else transformers_model()
    expected = [tuple(plain_reference(prepared(model, form).eval(), prompt, 20)) for prompt in PROMPTS]
    for draft_length, batch_size in ((0, 1), (2, 2), (3, 3)):
        decoder = Decoder(model, draft_length=draft_length, batch_size=batch_size, weights=form)
        result = decoder.generate(PROMPTS, max_new_tokens=20)
        assert list(result.token_ids) == expected
    assert result.stats.num_accepted_tokens


@needs_onednn
@pytest.mark.parametrize("form", ["packed", "int8"])
def test_bfloat16_weights_decode_in_every_form(form: str):
    model = memorising_model(30).to(torch.bfloat16)
    decoder = Decoder(model, draft_length=2, batch_size=2, weights=form)
    greedy = decoder.generate(PROMPTS, max_new_tokens=12)
    assert [len(ids) for ids in greedy.token_ids] == [12] * 3
    again = decoder.generate(PROMPTS, max_new_tokens=12, temperature=1.0, seed=1)
    assert decoder.generate(PROMPTS, max_new_tokens=12, temperature=1.0, seed=1).token_ids == again.token_ids
