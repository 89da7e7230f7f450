"""transformers generates from our exported folders, its MTP on or off, what we generate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

import nextn
from nextn.config import ModelConfig, MTPConfig
from nextn.data.tokenizers import ByteTokenizer
from nextn.files import TensorFiles
from nextn.interop.engines import layer_patterns
from nextn.interop.export import export_model
from nextn.mtp import MTPModel, save_model

from .conftest import SMALL

SHAPE = replace(SMALL, vocab_size=257, q_lora_rank=28)
NUM_NEW_TOKENS = 24
MODELS: dict[str, tuple[ModelConfig, MTPConfig]] = {
    "one module": (SHAPE, MTPConfig()),
    "two modules": (SHAPE, MTPConfig(num_depths=2)),
    "one module for two depths": (SHAPE, MTPConfig(num_depths=2, share_weights=True)),
    "layouts that are rewritten": (
        replace(SHAPE, rope_interleave=False),
        MTPConfig(concat="hidden_first", head_norm="shared"),
    ),
    "five layers, full queries": (replace(SHAPE, num_hidden_layers=5, q_lora_rank=None), MTPConfig()),
}


@pytest.fixture(autouse=True)
def restored_key_pattern() -> Iterator[None]:
    before = DeepseekV3ForCausalLM._keys_to_ignore_on_load_unexpected
    yield
    DeepseekV3ForCausalLM._keys_to_ignore_on_load_unexpected = before


def exported(tmp_path: Path, name: str) -> tuple[MTPModel, Path]:
    config, mtp_config = MODELS[name]
    model = MTPModel(config, mtp_config).initialize(seed=4).eval()
    model.tokenizer = ByteTokenizer()
    (tmp_path / "ours").mkdir()
    save_model(model, tmp_path / "ours")
    return model, export_model(tmp_path / "ours", "hf", tmp_path / "theirs").path


def loaded(folder: Path) -> DeepseekV3ForCausalLM:
    """As the launch line does: the documented shim, then from_pretrained."""
    model = nextn.load(folder)
    DeepseekV3ForCausalLM._keys_to_ignore_on_load_unexpected = layer_patterns(model.config, model.mtp_config)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    theirs.generation_config.eos_token_id = None  # here the end of text is a token like others
    return theirs


def generated(model: DeepseekV3ForCausalLM, prompt: list[int], **options: bool) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NUM_NEW_TOKENS,
        do_sample=False,
        **options,
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", MODELS)
def test_generation_with_and_without_its_mtp_gives_our_greedy_tokens(tmp_path: Path, name: str):
    ours, folder = exported(tmp_path, name)
    theirs = loaded(folder)
    num_forwards = 0

    def count(*_: object) -> None:
        nonlocal num_forwards
        num_forwards += 1

    prompt = [*b"def main("]
    expected = nextn.generate(ours, [prompt], max_new_tokens=NUM_NEW_TOKENS, eos_token_id=None)
    assert generated(theirs, prompt) == list(expected.token_ids[0])
    for layer in theirs.model.layers[:1]:
        layer.register_forward_hook(count)
    assert generated(theirs, prompt, use_mtp=True) == list(expected.token_ids[0])
    assert num_forwards <= NUM_NEW_TOKENS


def test_transformers_own_pattern_finds_no_mtp_weights_and_the_shim_finds_all(tmp_path: Path):
    """If this fails, transformers reads the layer number from the config now: then drop the shim."""
    _, folder = exported(tmp_path, "two modules")
    names = [name for name in TensorFiles.open(folder).names if name.startswith(("model.layers.3.", "model.layers.4."))]
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert not any(MtpModel.get_mtp_weights_regex(theirs).search(name) for name in names)
    pattern = MtpModel.get_mtp_weights_regex(loaded(folder))
    assert names
    assert all(pattern.search(name) for name in names)
    assert not pattern.search("model.layers.2.input_layernorm.weight")


def test_the_tokenizer_is_read_by_transformers(tmp_path: Path):
    _, folder = exported(tmp_path, "one module")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "naïve\n\tx = 'é' "
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == [*text.encode()]
    assert tokenizer.eos_token_id == 256
