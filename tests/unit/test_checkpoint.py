"""Checkpoints come back exactly, in DeepSeek's layout; anything wrong with one is an error that names it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nextn.config import MTPConfig
from nextn.data import ByteTokenizer
from nextn.errors import CheckpointError, DeviceError
from nextn.files import atomic_folder, read_json, read_tensors, write_json, write_tensors
from nextn.mtp import MTPModel, load_model, save_model

from .test_mtp_laws import TINY, tokens


def saved(folder: Path, config=TINY, **mtp) -> MTPModel:
    model = MTPModel(config, MTPConfig(**({"num_depths": 2} | mtp))).initialize(seed=1).eval()
    for buffer_name, buffer in model.named_buffers():
        if "bias" in buffer_name:
            torch.nn.init.normal_(buffer)
    with atomic_folder(folder) as temporary:
        save_model(model, temporary)
    return model


@pytest.mark.parametrize("share_weights", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_save_perturb_save_load_is_exact(tmp_path: Path, share_weights: bool, tied: bool):
    config = replace(TINY, tie_word_embeddings=tied)
    model = saved(tmp_path / "a", config, share_weights=share_weights, trunk_hidden="pre_norm")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    with atomic_folder(tmp_path / "a") as temporary:
        save_model(model, temporary)
    loaded = load_model(tmp_path / "a")
    assert (loaded.config, loaded.mtp_config) == (model.config, model.mtp_config)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    assert torch.equal(loaded(tokens(1, 9)).logits_per_depth[2], model(tokens(1, 9)).logits_per_depth[2])
    if tied:
        assert loaded.trunk.lm_head.weight is loaded.trunk.model.embed_tokens.weight


def test_names_are_those_of_the_released_weights(tmp_path: Path):
    saved(tmp_path / "a")
    names = load_file(tmp_path / "a" / "model.safetensors").keys()
    assert {
        "model.embed_tokens.weight",
        "model.layers.1.mlp.experts.3.gate_proj.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.layers.2.eh_proj.weight",
        "model.layers.2.enorm.weight",
        "model.layers.3.hnorm.weight",
        "model.layers.3.shared_head.norm.weight",
        "model.layers.3.self_attn.kv_a_proj_with_mqa.weight",
        "model.layers.3.mlp.experts.0.down_proj.weight",
        "lm_head.weight",
    } <= names
    assert not any("block" in name or "scheme" in name or "trunk" in name for name in names)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert (config["model_type"], config["num_nextn_predict_layers"]) == ("deepseek_v3", 2)


def test_transformers_loads_the_trunk_and_gives_the_same_logits(tmp_path: Path):
    from transformers import AutoModelForCausalLM

    model = saved(tmp_path / "a", num_depths=0)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype="float32", attn_implementation="eager").eval()
    ids = tokens(2, 11)
    with torch.no_grad():
        theirs = hf(ids, attention_mask=torch.ones_like(ids)).logits
        torch.testing.assert_close(model(ids).logits, theirs, atol=1e-4, rtol=1e-4)


def test_dtype_is_that_asked_for_and_routing_biases_stay_float32(tmp_path: Path):
    saved(tmp_path / "a")
    model = load_model(tmp_path / "a", dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.trunk.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32
    assert model(tokens(1, 5)).logits.dtype == torch.bfloat16


def rewrite(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("model.layers.3.eh_proj.weight"), r"1 missing \(model.layers.3.eh_proj.weight\)"),
        (
            lambda s: s.pop("model.layers.1.mlp.experts.2.up_proj.weight"),
            r"1 missing \(model.layers.1.mlp.experts.2.up_proj.weight\)",
        ),
        (lambda s: s.update(extra=torch.zeros(1)), r"1 unexpected \(extra\)"),
        (lambda s: s.update({"lm_head.weight": torch.zeros(2, 2)}), r"lm_head.weight has shape \(2, 2\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, change, message: str):
    saved(tmp_path / "a")
    rewrite(tmp_path / "a", change)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "a")


def test_a_truncated_file_is_an_error(tmp_path: Path):
    saved(tmp_path / "a")
    path = tmp_path / "a" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        load_model(tmp_path / "a")


def test_foreign_missing_and_pickled_checkpoints_are_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match="none does not exist"):
        load_model(tmp_path / "none")
    with pytest.raises(CheckpointError, match="neither a checkpoint"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="found none"):
        load_model(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only pickle files \(pytorch_model.bin\), which are refused"):
        load_model(tmp_path)
    with pytest.raises(CheckpointError, match="is a pickle file"):
        read_tensors(tmp_path / "pytorch_model.bin")
    saved(tmp_path / "a")
    write_json(tmp_path / "a" / "config.json", {"model_type": "llama"})
    with pytest.raises(CheckpointError, match="model_type is 'llama'"):
        load_model(tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        load_model(tmp_path / "a")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path):
    saved(tmp_path / "a")
    ByteTokenizer().save(tmp_path / "a")
    with pytest.raises(CheckpointError, match=rf"has 257 tokens and the model knows {TINY.vocab_size}"):
        load_model(tmp_path / "a")
    saved(tmp_path / "b", replace(TINY, vocab_size=300))  # padded vocabularies are common
    ByteTokenizer().save(tmp_path / "b")
    assert load_model(tmp_path / "b").tokenizer is not None


@pytest.mark.parametrize(("table", "field"), [("nextn", "carry"), (None, "norm_topk_prob"), (None, "scoring_func")])
def test_a_convention_that_is_not_written_down_is_never_implied(tmp_path: Path, table: str | None, field: str):
    saved(tmp_path / "a", carry="pre_norm")
    config = read_json(tmp_path / "a" / "config.json")
    del (config if table is None else config["nextn"]["mtp"])[field]
    write_json(tmp_path / "a" / "config.json", config)
    with pytest.raises(CheckpointError, match=field):
        load_model(tmp_path / "a")


def test_float64_weights_keep_all_their_digits(tmp_path: Path):
    model = MTPModel(TINY, MTPConfig()).initialize(seed=1).double()
    with torch.no_grad():
        model.trunk.lm_head.weight.add_(1e-12)
    with atomic_folder(tmp_path / "a") as temporary:
        save_model(model, temporary)
    assert torch.equal(load_model(tmp_path / "a", dtype="float64").trunk.lm_head.weight, model.trunk.lm_head.weight)


def test_an_interrupt_between_the_renames_brings_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target, rename = tmp_path / "a", Path.rename

    def write(value: float):
        with atomic_folder(target) as temporary:
            write_tensors(temporary / "x.safetensors", {"x": torch.full((1,), value)})

    def interrupted(source: Path, destination: Path) -> Path:
        if destination == target and not source.name.endswith(".old"):
            raise KeyboardInterrupt
        return rename(source, destination)

    write(1.0)
    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(2.0)
    assert read_tensors(target / "x.safetensors")["x"].item() == 1.0
    assert list(tmp_path.iterdir()) == [target]


def test_unknown_dtype_and_device_are_refused(tmp_path: Path):
    saved(tmp_path / "a")
    with pytest.raises(DeviceError, match="unknown dtype 'int3'; known: float32"):
        load_model(tmp_path / "a", dtype="int3")
    with pytest.raises(DeviceError, match="unknown device 'warp'"):
        load_model(tmp_path / "a", device="warp")


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path):
    target = tmp_path / "a"

    def interrupted_write():
        with atomic_folder(target) as temporary:
            write_tensors(temporary / "x.safetensors", {"x": torch.zeros(3)})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_write()
    assert list(tmp_path.iterdir()) == []
    for value in (1.0, 2.0):
        with atomic_folder(target) as temporary:
            write_tensors(temporary / "x.safetensors", {"x": torch.full((3,), value)})
    assert read_tensors(target / "x.safetensors")["x"].tolist() == [2.0] * 3
    with pytest.raises(KeyboardInterrupt):
        interrupted_write()
    assert read_tensors(target / "x.safetensors")["x"].tolist() == [2.0] * 3
    assert list(tmp_path.iterdir()) == [target]


def test_a_full_disk_is_a_checkpoint_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nextn.files.save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        saved(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_json_is_read_back_and_nan_refused(tmp_path: Path):
    write_json(tmp_path / "x.json", {"a": [1, None]})
    assert read_json(tmp_path / "x.json") == {"a": [1, None]}
    with pytest.raises(ValueError, match="Out of range float values"):
        write_json(tmp_path / "y.json", float("nan"))
    with pytest.raises(CheckpointError, match="does not exist"):
        read_json(tmp_path / "z.json")
