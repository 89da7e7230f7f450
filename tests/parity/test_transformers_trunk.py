"""A transformers model as a trunk: the same numbers whole, packed, cached, at other positions and after rollbacks."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    NanoChatConfig,
    Phi3Config,
)

import nextn
from nextn.config import MTPConfig
from nextn.decoding import plain_reference
from nextn.errors import ConfigError
from nextn.interop import adapter
from nextn.interop.adapter import TransformersTrunk
from nextn.interop.layers import CAPS, SCALES, TransformersBlock
from nextn.mtp import MTPModel

from .conftest import randomise, relative_error
from .released_families import FAMILIES

TOLERANCE = 1e-5
SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "mistral, sliding window": lambda: MistralConfig(**SHAPE, sliding_window=5),
    "tied head": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=True),
} | {kind: released.config for kind, released in FAMILIES.items()}
IDS = torch.randint(0, 61, (2, 24), generator=torch.Generator().manual_seed(3))
pytestmark = pytest.mark.filterwarnings("ignore:.*recurrent layers")


def build(name: str, attention: str = "sdpa") -> TransformersTrunk:
    torch.manual_seed(7)
    config = CONFIGS[name]()
    if name == "mimo_v2_flash" or attention == "eager":
        config._attn_implementation = "eager"
    hf = AutoModelForCausalLM.from_config(config).eval()
    randomise(hf)
    return TransformersTrunk(hf).eval()


def is_recurrent(name: str) -> bool:
    return name in FAMILIES and FAMILIES[name].is_recurrent


@pytest.fixture(params=CONFIGS, ids=lambda name: name.replace(", ", "_").replace(" ", "_"))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def cached_logits(trunk, ids, widths, cache) -> torch.Tensor:
    parts, start = [], 0
    for width in widths:
        positions = torch.arange(start, start + width).expand(len(ids), -1)
        hidden = trunk.hidden_states(ids[:, start : start + width], trunk.cached_context(positions), cache)
        parts.append(trunk.output_head(trunk.final_norm(hidden)))
        start += width
    return torch.cat(parts, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_are_those_of_the_models_own_forward(name, attention):
    trunk = build(name, attention)
    theirs = trunk.model(IDS, attention_mask=torch.ones_like(IDS)).logits
    assert relative_error(trunk(IDS), theirs) < TOLERANCE


@torch.no_grad()
def test_cached_logits_are_those_of_one_forward(name):
    trunk = build(name)
    cache = trunk.new_cache(num_rows=2, capacity=32)
    assert relative_error(cached_logits(trunk, IDS, (9, 1, 1, 4, 1, 8), cache), trunk(IDS)) < TOLERANCE


@torch.no_grad()
def test_rows_at_different_positions_and_overwritten_drafts_change_nothing(name):
    trunk = build(name)
    whole, cache = trunk(IDS), trunk.new_cache(num_rows=2, capacity=32)
    cached_logits(trunk, IDS, (10,), cache)
    rejected = torch.full((2, 4), 60)
    trunk.hidden_states(rejected, trunk.cached_context(torch.tensor([[10, 11, 12, 13], [6, 7, 8, 9]])), cache)
    positions = torch.tensor([[10, 11, 12], [6, 7, 8]])  # both rows go on from where their last accepted token is
    hidden = trunk.hidden_states(IDS.gather(1, positions), trunk.cached_context(positions), cache)
    logits = trunk.output_head(trunk.final_norm(hidden))
    for row in range(2):
        assert relative_error(logits[row], whole[row, positions[row]]) < TOLERANCE


@torch.no_grad()
def test_packed_documents_do_not_see_each_other(name):
    if is_recurrent(name):
        pytest.skip("refused, see below")
    trunk = build(name)
    documents = torch.tensor([[0] * 9 + [1] * 15, [4] * 24])
    packed = trunk(IDS, documents)
    assert relative_error(packed[:1, 9:], trunk(IDS[:1, 9:])) < TOLERANCE
    assert relative_error(packed[1:], trunk(IDS[1:])) < TOLERANCE
    assert relative_error(trunk(IDS)[:1, 9:], packed[:1, 9:]) > 100 * TOLERANCE


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5_text"], ids=str)
def test_packed_documents_are_refused_where_a_recurrent_state_would_leak(name):
    trunk = build(name)
    with pytest.raises(ConfigError, match="one document per row"):
        trunk.context(24, torch.tensor([[0] * 9 + [1] * 15]))
    trunk.context(24, torch.zeros(1, 24, dtype=torch.int64))


@torch.no_grad()
@pytest.mark.parametrize("name", ["mistral, sliding window", "mimo_v2_flash"], ids=["mistral", "mimo"])
def test_a_wrong_window_is_caught(name):
    trunk = build(name)
    theirs = trunk(IDS)
    trunk.config.sliding_window += 1
    assert relative_error(trunk(IDS), theirs) > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (NanoChatConfig(**SHAPE, final_logit_softcapping=None), "computes more than its layers"),
        (LlamaConfig(**SHAPE), "kind chunked_attention"),
    ],
)
def test_a_model_that_the_adapter_does_not_compute_is_refused(config, found):
    model = AutoModelForCausalLM.from_config(config)
    if "chunked" in found:
        model.config.layer_types = ["chunked_attention"] * 3
    randomise(model)
    with pytest.raises(ConfigError, match=found):
        TransformersTrunk(model)


@pytest.mark.parametrize("key", CAPS + SCALES)
def test_a_setting_that_caps_or_scales_is_refused_by_name_unless_it_changes_nothing(key):
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE))
    for neutral in (None,) if key in CAPS else (None, 1.0, False):
        setattr(model.config, key, neutral)
        TransformersTrunk(model)
    setattr(model.config, key, 1.5)
    with pytest.raises(ConfigError, match=f"sets {key} = 1.5"):
        TransformersTrunk(model)


@torch.no_grad()
def test_a_cap_is_refused_where_small_logits_hide_it_from_the_comparison(monkeypatch):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Gemma2Config(**SHAPE, head_dim=12, tie_word_embeddings=False)).eval()
    model.lm_head.weight.mul_(1.5 / model(input_ids=torch.arange(8)[None]).logits.abs().max())
    with pytest.raises(ConfigError, match=r"sets final_logit_softcapping = 30\.0"):
        TransformersTrunk(model)
    monkeypatch.setattr(adapter, "check_settings", lambda *_: None)
    trunk = TransformersTrunk(model)  # the comparison alone lets it pass
    model.lm_head.weight.mul_(100)
    assert relative_error(trunk(IDS), model(input_ids=IDS).logits) > 0.1


def phi(longest: int, kind: str = "longrope") -> nn.Module:
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 6, "long_factor": [4.0] + [8.0] * 5}
    sizes = SHAPE | {"max_position_embeddings": longest}
    torch.manual_seed(0)
    config = Phi3Config(**sizes, original_max_position_embeddings=32, rope_parameters=rope)
    model = AutoModelForCausalLM.from_config(config).eval()
    randomise(model)
    return model


def differing_prompts(trunk: TransformersTrunk, max_new_tokens: int) -> int:
    """Of six prompts of 20 tokens, those whose drafted text is not the reference's."""
    model = MTPModel(None, MTPConfig(num_depths=1), trunk).initialize(1).eval()
    prompts = torch.randint(61, (6, 20), generator=torch.Generator().manual_seed(1)).tolist()
    result = nextn.generate(model, prompts, max_new_tokens=max_new_tokens, draft_length=3)
    texts = zip(prompts, result.token_ids, strict=True)
    return sum(list(ids) != plain_reference(model, prompt, max_new_tokens) for prompt, ids in texts)


def test_longrope_is_refused_beyond_its_original_length_where_decoding_would_not_be_lossless(monkeypatch):
    assert differing_prompts(TransformersTrunk(phi(32)), max_new_tokens=12) == 0
    with pytest.raises(ConfigError, match=r"'longrope'.*not be lossless.* max_position_embeddings = 32"):
        TransformersTrunk(phi(96))
    monkeypatch.setattr(adapter, "check_settings", lambda *_: None)
    assert differing_prompts(TransformersTrunk(phi(96, "default")), max_new_tokens=60) == 0
    assert differing_prompts(TransformersTrunk(phi(96)), max_new_tokens=60) > 0


@pytest.mark.parametrize("nested", [False, True], ids=["for_all_layers", "per_kind_of_layer"])
@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_changing_rotary_factors_are_refused_wherever_the_config_names_them(kind, nested):
    config: Any = Gemma3TextConfig if nested else LlamaConfig
    model = AutoModelForCausalLM.from_config(config(**SHAPE, head_dim=12))
    TransformersTrunk(model)
    rope = model.config.rope_parameters
    (rope["full_attention"] if nested else rope).update(rope_type=kind, original_max_position_embeddings=32)
    with pytest.raises(ConfigError, match=f"rope_type '{kind}'"):
        TransformersTrunk(model)


def llama_with_modules(**conventions: Any) -> MTPModel:
    return MTPModel(None, MTPConfig(**{"num_depths": 2, **conventions}), build("llama")).initialize(3)


@pytest.mark.parametrize(
    "conventions",
    [
        {},
        {"share_weights": True},
        {"concat": "hidden_first", "trunk_hidden": "pre_norm", "carry": "pre_norm", "head_norm": "shared"},
        {"scheme": "parallel"},
        {"scheme": "independent"},
    ],
    ids=["sequential", "shared_weights", "other_conventions", "parallel", "independent"],
)
def test_fresh_modules_on_a_llama_train_and_decode_losslessly(conventions):
    model, text = llama_with_modules(**conventions).train(), IDS[:, :20]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = model(text).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert losses[-1] < 0.7 * losses[0]
    model.eval()
    for draft_length in (1, 2):
        for prompt in (text[0, :5].tolist(), text[1, :9].tolist()):
            result = nextn.generate(model, [prompt], max_new_tokens=12, draft_length=draft_length)
            assert list(result.token_ids[0]) == plain_reference(model, prompt, 12)


def test_a_trunk_without_modules_decodes_plainly():
    model = MTPModel(None, MTPConfig(num_depths=0), build("llama")).eval()
    result = nextn.generate(model, [IDS[0, :5].tolist()], max_new_tokens=8, draft_length=0)
    assert list(result.token_ids[0]) == plain_reference(model, IDS[0, :5].tolist(), 8)


@pytest.mark.parametrize("kind", ["llama", "glm4_moe", "qwen3_next"])
def test_fresh_blocks_are_the_seeds_alone_and_finite(kind):
    trunk = build(kind)
    states = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        block = trunk.new_block()
        trunk.initialize(block, torch.Generator().manual_seed(11))
        states.append(block.state_dict())
    assert all(torch.isfinite(tensor).all() and tensor.abs().max() < 10 for tensor in states[0].values())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_a_dense_block_is_built_where_the_family_has_one_and_refused_where_not():
    assert not any("experts" in name for name, _ in build("glm4_moe").new_block(dense=True).named_modules())
    assert any("experts" in name for name, _ in build("glm4_moe").new_block().named_modules())
    assert isinstance(build("llama").new_block(dense=True), TransformersBlock)
    with pytest.raises(ConfigError, match="no layer with a dense feed-forward"):
        build("qwen3_next").new_block(dense=True)


def test_what_only_the_native_trunk_has_is_refused_not_ignored():
    model = llama_with_modules()
    with pytest.raises(ConfigError, match="not nextn's own"):
        _ = model.config


def test_importing_nextn_does_not_import_transformers():
    code = "import sys, nextn; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
