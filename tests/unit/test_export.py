"""`nextn export`: what each engine accepts is written, what it does not is refused with the reason."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import nextn
from nextn.cli.main import app
from nextn.config import ModelConfig, MTPConfig
from nextn.data.tokenizers import ByteTokenizer
from nextn.errors import CheckpointError, ExportError
from nextn.files import read_json
from nextn.interop.engines import ENGINES, launch_line, reasons_against
from nextn.interop.export import FORMATS, export_model
from nextn.mtp import MTPModel, save_model

SERVABLE = ModelConfig(
    vocab_size=257,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    n_routed_experts=4,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=32,
)
SHARED = MTPConfig(num_depths=2, share_weights=True)


def saved(folder: Path, config: ModelConfig = SERVABLE, mtp_config: MTPConfig = SHARED) -> Path:
    model = MTPModel(config, mtp_config).initialize(seed=1)
    model.tokenizer = ByteTokenizer()
    folder.mkdir()
    save_model(model, folder)
    return folder


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_takes_one_shared_module_and_a_model_without_mtp(engine: str):
    assert reasons_against(engine, SERVABLE, SHARED) == []
    assert reasons_against(engine, SERVABLE, MTPConfig(num_depths=0)) == []


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("config", "mtp_config", "reason"),
    [
        (SERVABLE, MTPConfig(scheme="independent"), "mtp.scheme is independent"),
        (SERVABLE, replace(SHARED, trunk_hidden="pre_norm"), "mtp.trunk_hidden = post_norm, and this model has pre"),
        (SERVABLE, replace(SHARED, carry="pre_norm"), "mtp.carry = post_norm, and this model has pre_norm"),
        (SERVABLE, replace(SHARED, dense_blocks=True), "this model's is dense"),
        (replace(SERVABLE, first_k_dense_replace=2), SHARED, "this model's is dense"),
    ],
)
def test_behaviour_that_no_engine_computes_is_refused_by_all(engine: str, config, mtp_config, reason: str):
    assert any(reason in found for found in reasons_against(engine, config, mtp_config))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("config", "mtp_config"),
    [
        (SERVABLE, replace(SHARED, concat="hidden_first")),
        (SERVABLE, replace(SHARED, head_norm="shared")),
        (replace(SERVABLE, rope_interleave=False), SHARED),
        (SERVABLE, MTPConfig(carry="pre_norm")),
    ],
)
def test_mere_layout_is_no_reason_since_it_is_rewritten(engine: str, config, mtp_config):
    assert reasons_against(engine, config, mtp_config) == []


def test_depths_of_their_own_are_served_by_transformers_alone():
    untied = MTPConfig(num_depths=2)
    assert reasons_against("transformers", SERVABLE, untied) == []
    for engine in ("vllm", "sglang", "llamacpp"):
        assert any("share_weights = true" in reason for reason in reasons_against(engine, SERVABLE, untied)), engine


def test_dimensions_that_kernels_reject_are_named():
    narrow = replace(SERVABLE, qk_nope_head_dim=24, qk_rope_head_dim=24)
    assert any("is 48" in reason for reason in reasons_against("vllm", narrow, SHARED))
    assert any("v_head_dim is 48" in r for r in reasons_against("vllm", replace(SERVABLE, v_head_dim=48), SHARED))
    latent = replace(narrow, kv_lora_rank=552)  # 552 + 24 = 576: latent attention, whatever the heads
    assert reasons_against("vllm", latent, SHARED) == []
    full = replace(SERVABLE, q_lora_rank=None)
    assert any("q_lora_rank" in reason for reason in reasons_against("llamacpp", full, SHARED))


@pytest.mark.parametrize("engine", ["vllm", "sglang", "llamacpp"])
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attention_bias": True}, "no biases in attention"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps = 1e-05"),
        ({"n_shared_experts": 0}, "wants a shared expert"),
    ],
)
def test_what_engines_read_and_compute_otherwise_is_refused(engine: str, changes: dict, reason: str):
    config = replace(SERVABLE, **changes)
    assert any(reason in found for found in reasons_against(engine, config, SHARED))
    assert reasons_against("transformers", config, SHARED) == []


@pytest.mark.parametrize("to", ["hf", "vllm", "sglang"])
def test_an_exported_folder_is_the_same_model_in_the_released_layout(tmp_path: Path, to: str):
    folder = saved(tmp_path / "ours", replace(SERVABLE, rope_interleave=False), replace(SHARED, concat="hidden_first"))
    exported = export_model(folder, to, tmp_path / "theirs", max_shard_bytes=30_000, provenance={"seed": 0})
    table = read_json(exported.path / "config.json")
    assert (table["architectures"], table["num_nextn_predict_layers"]) == (["DeepseekV3ForCausalLM"], 1)
    assert (table["topk_method"], table["scoring_func"], table["rope_interleave"]) == ("noaux_tc", "sigmoid", True)
    assert read_json(exported.path / "provenance.json") == {"seed": 0}
    assert len(list(exported.path.glob("*.safetensors"))) > 1
    ids = torch.randint(0, 257, (1, 12))
    ours, theirs = nextn.load(folder), nextn.load(exported.path)
    assert theirs.tokenizer is not None
    for a, b in zip(ours(ids).logits_per_depth, theirs(ids).logits_per_depth, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_a_refused_export_names_every_reason_and_writes_nothing(tmp_path: Path):
    folder = saved(tmp_path / "ours", SERVABLE, MTPConfig(num_depths=2, trunk_hidden="pre_norm"))
    for to in FORMATS:
        with pytest.raises(ExportError, match="trunk_hidden"):
            export_model(folder, to, tmp_path / "theirs")
    with pytest.raises(ExportError, match=r"trunk_hidden.*runs one MTP module for every draft"):
        export_model(folder, "vllm", tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_what_exists_is_not_overwritten_and_unknown_formats_are_named(tmp_path: Path):
    folder = saved(tmp_path / "ours")
    with pytest.raises(ExportError, match="exists already"):
        export_model(folder, "hf", folder)
    with pytest.raises(ExportError, match="unknown format 'onnx'; known: hf, vllm, sglang, gguf"):
        export_model(folder, "onnx", tmp_path / "x")


def test_the_command_prints_the_line_that_serves_and_nothing_else_on_standard_output(tmp_path: Path):
    folder = saved(tmp_path / "ours")
    done = CliRunner().invoke(app, ["export", str(folder), "--to", "vllm", "--draft-length", "3"])
    assert done.exit_code == 0, done.output
    model = nextn.load(tmp_path / "ours-vllm")
    assert done.stdout.strip() == launch_line("vllm", tmp_path / "ours-vllm", model.config, model.mtp_config, 3)
    assert '"num_speculative_tokens": 3' in done.stdout


def test_a_model_without_mtp_gets_a_line_without_drafts(tmp_path: Path):
    folder = saved(tmp_path / "ours", SERVABLE, MTPConfig(num_depths=0))
    for to, words in {"hf": "use_mtp", "vllm": "speculative", "sglang": "speculative"}.items():
        assert words not in export_model(folder, to, tmp_path / to).launch_line


def test_the_default_place_and_paths_with_odd_characters(tmp_path: Path, monkeypatch):
    folder = saved(tmp_path / "it's (mine); 1")
    monkeypatch.chdir(folder)
    done = CliRunner().invoke(app, ["export", ".", "--to", "vllm"])
    assert done.exit_code == 0, done.output
    place = tmp_path / "it's (mine); 1-vllm"
    assert place.is_dir()
    assert str(place) in shlex.split(done.stdout)


def test_float16_refuses_weights_it_has_no_number_for(tmp_path: Path):
    model = MTPModel(SERVABLE, SHARED).initialize(seed=1)
    model.trunk.lm_head.weight.data[0, 0] = 1e5
    (tmp_path / "ours").mkdir()
    save_model(model, tmp_path / "ours")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight exceeds 65504"):
        export_model(tmp_path / "ours", "hf", tmp_path / "theirs", dtype="float16")
