"""GGUF files: what is written is the model, to the last bit; what llama.cpp cannot serve is refused with the reason."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nextn.config import ModelConfig, MTPConfig, RopeConfig
from nextn.data.tokenizers import ByteTokenizer
from nextn.errors import CheckpointError, ExportError
from nextn.interop import gguf_layout
from nextn.interop.gguf import GgufFile, write_gguf
from nextn.interop.requirements import reasons_against_llamacpp
from nextn.mtp import MTPModel
from nextn.mtp.store import save_model

pytest.importorskip("gguf", reason="the gguf extra is not installed")

TINY = ModelConfig(
    vocab_size=257,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    n_routed_experts=4,
    q_lora_rank=12,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=6,
    max_position_embeddings=64,
    initializer_range=0.3,
)
MTP = MTPConfig(num_depths=2, share_weights=True)


def model_of(config: ModelConfig = TINY, mtp_config: MTPConfig = MTP) -> MTPModel:
    model = MTPModel(config, mtp_config).initialize(0).eval()
    model.tokenizer = ByteTokenizer()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if name.endswith(("norm.weight", "e_score_correction_bias")):  # else ones and zeros, which hide a mix-up
            tensor.add_(torch.rand(tensor.shape, generator=generator))
    return model


def saved(model: MTPModel, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    save_model(model, folder)
    return folder


def written(model: MTPModel, folder: Path, dtype: Any = "f32") -> GgufFile:
    write_gguf(saved(model, folder / "checkpoint"), folder / "model.gguf", dtype)
    return GgufFile(folder / "model.gguf")


def state_of(file: GgufFile, model: MTPModel) -> dict[str, torch.Tensor]:
    """The state dict that a file's tensors make, put together here by the plain meaning of llama.cpp's names."""
    config, state = model.config, {}
    for ours, theirs in gguf_layout.TOP.items():
        state[ours] = file.read(theirs)
    for index in range(config.num_hidden_layers + 1):
        is_mtp = index == config.num_hidden_layers
        outside = "scheme.layers.0." if is_mtp else f"trunk.model.layers.{index}."
        block = outside + ("block." if is_mtp else "")
        names = {name.removeprefix(f"blk.{index}.") for name in file.names if name.startswith(f"blk.{index}.")}
        for ours, theirs in gguf_layout.LAYER.items():
            if theirs in names:
                prefix = outside if theirs.startswith("nextn.") else block
                state[prefix + ours] = file.read(f"blk.{index}.{theirs}")
        key_up = file.read(f"blk.{index}.attn_k_b.weight").transpose(1, 2)
        both = torch.cat((key_up, file.read(f"blk.{index}.attn_v_b.weight")), dim=1)
        state[f"{block}self_attn.kv_b_proj.weight"] = both.flatten(0, 1)
        if f"blk.{index}.ffn_gate_exps.weight" in file.names:
            parts = [file.read(f"blk.{index}.ffn_{kind}_exps.weight") for kind in ("gate", "up")]
            state[f"{block}mlp.experts.gate_up_proj"] = torch.cat(parts, dim=1)
    return state


def test_every_tensor_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    model = model_of()
    state = state_of(written(model, tmp_path), model)
    wanted = model.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)


def test_names_are_those_of_the_gguf_package() -> None:
    import gguf

    block = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DEEPSEEK2, 3)
    module = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GLM4_MOE, 3)  # which has an MTP module of the same parts
    for ours, theirs in gguf_layout.LAYER.items():
        names = module if theirs.startswith("nextn.") else block
        asked = f"model.layers.2.{ours}".replace("correction_bias", "correction.bias")
        found = names.get_name(asked, try_suffixes=(".weight", ".bias"))
        assert found is not None, ours
        assert found.removesuffix(".weight") == f"blk.2.{theirs}".removesuffix(".weight")


def test_the_header_declares_the_module_as_one_more_layer(tmp_path: Path) -> None:
    file = written(model_of(), tmp_path)
    assert file.metadata["general.architecture"] == "deepseek2"
    assert file.metadata["deepseek2.block_count"] == 3
    assert file.metadata["deepseek2.nextn_predict_layers"] == 1
    assert file.metadata["deepseek2.expert_gating_func"] == 2
    assert file.shape("blk.2.nextn.eh_proj.weight") == (32, 64)
    assert file.shape("blk.1.ffn_down_exps.weight") == (4, 32, 16)
    assert file.dtype("output.weight") == "F32"


def test_a_model_without_mtp_declares_none(tmp_path: Path) -> None:
    file = written(model_of(mtp_config=MTPConfig(num_depths=0)), tmp_path)
    assert file.metadata["deepseek2.block_count"] == 2
    assert "deepseek2.nextn_predict_layers" not in file.metadata
    assert not [name for name in file.names if "nextn" in name]


def test_a_tied_head_and_a_shared_norm_are_written_out(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, tie_word_embeddings=True)
    file = written(model_of(config, dataclasses.replace(MTP, head_norm="shared")), tmp_path)
    assert torch.equal(file.read("output.weight"), file.read("token_embd.weight"))
    assert torch.equal(file.read("blk.2.nextn.shared_head_norm.weight"), file.read("output_norm.weight"))


def test_a_model_and_its_checkpoint_give_the_same_file(tmp_path: Path) -> None:
    model = model_of(mtp_config=dataclasses.replace(MTP, concat="hidden_first"))
    file = written(model, tmp_path)
    write_gguf(model, tmp_path / "direct.gguf", "f32")
    assert (tmp_path / "direct.gguf").read_bytes() == file.path.read_bytes()
    swapped = file.read("blk.2.nextn.eh_proj.weight").roll(32, dims=1)
    assert torch.equal(swapped, model.scheme.layers[0].eh_proj.weight)


def test_the_tokenizer_is_the_bytes_and_the_end_of_text(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, vocab_size=260)
    metadata = written(model_of(config), tmp_path).metadata
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == len(set(tokens)) == 260
    assert (tokens[ord("a")], tokens[ord(" ")], tokens[256]) == ("a", "Ġ", "<|endoftext|>")
    assert kinds[255:] == [gguf_layout.NORMAL, gguf_layout.CONTROL, *[gguf_layout.UNUSED] * 3]
    assert metadata["tokenizer.ggml.eos_token_id"] == metadata["tokenizer.ggml.bos_token_id"] == 256
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    first, second = metadata["tokenizer.ggml.merges"][0].split(" ")
    assert first not in tokens
    assert second not in tokens


def test_rotary_halves_become_pairs_and_the_model_stays(tmp_path: Path) -> None:
    halves = model_of(dataclasses.replace(TINY, rope_interleave=False))
    pairs = model_of()
    pairs.load_state_dict(state_of(written(halves, tmp_path), halves))
    unchanged = model_of()
    unchanged.load_state_dict(halves.state_dict())
    token_ids = torch.randint(0, 257, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted, found, broken = (
            [output.logits_per_depth[1], output.logits]
            for output in (model(token_ids) for model in (halves, pairs, unchanged))
        )
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(wanted, found, strict=True))
    assert not any(torch.allclose(a, b, atol=1e-1) for a, b in zip(wanted, broken, strict=True))


def test_small_types_are_kept_for_matrices_alone(tmp_path: Path) -> None:
    model = model_of()
    folder = saved(model, tmp_path / "checkpoint")
    counts = write_gguf(folder, tmp_path / "model.gguf", "q8_0")
    file = GgufFile(tmp_path / "model.gguf")
    found = {name: file.dtype(name) for name in file.names}
    assert found["output.weight"] == "Q8_0"
    assert found["blk.1.ffn_gate_inp.weight"] == found["output_norm.weight"] == "F32"
    assert found["blk.1.attn_q_b.weight"] == "BF16"  # rows of 12
    assert counts == {kind: list(found.values()).count(kind) for kind in set(found.values())}
    assert torch.allclose(file.read("output.weight"), model.trunk.lm_head.weight, atol=0.02)
    half = write_gguf(folder, tmp_path / "half.gguf", "bf16")
    assert half.keys() == {"BF16", "F32"}
    read = GgufFile(tmp_path / "half.gguf").read("output.weight")
    assert torch.equal(read, model.trunk.lm_head.weight.detach().bfloat16().float())


class Described(ByteTokenizer):
    """Saves whatever description it is given."""

    def __init__(self, description: dict[str, Any]) -> None:
        self._description = description

    def save(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text(json.dumps(self._description), encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------- refusals

YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}
REFUSED_TRUNKS: dict[str, tuple[dict[str, Any], str]] = {
    "full queries": ({"q_lora_rank": None}, "q_lora_rank is none"),
    "26 layers": ({"num_hidden_layers": 26}, "takes the model for a lite one"),
    "48 layers": ({"num_hidden_layers": 48, "vocab_size": 128256}, "takes the model for a lite one"),
    "biases": ({"attention_bias": True}, "attention_bias"),
    "epsilon": ({"rms_norm_eps": 1e-5}, "1e-05"),
    "no shared expert": ({"n_shared_experts": 0}, "n_shared_experts is 0"),
    "no scale": ({"routed_scaling_factor": 0.0}, "routed_scaling_factor"),
    "many experts": ({"n_routed_experts": 1025}, "at most 1024"),
    "yarn without temperature": ({"rope_parameters": RopeConfig(**YARN)}, "mscale_all_dim"),
    "yarn, two temperatures": (
        {"rope_parameters": RopeConfig(**YARN, mscale=1.0, mscale_all_dim=0.5)},
        "mscale_all_dim",
    ),
    "yarn, another range": (
        {"rope_parameters": RopeConfig(**YARN, mscale=1.0, mscale_all_dim=1.0, beta_fast=16.0)},
        "beta_fast",
    ),
    "dense": ({"first_k_dense_replace": 2}, "is dense"),
}
REFUSED_SCHEMES: dict[str, tuple[dict[str, Any], str]] = {
    "parallel": ({"scheme": "parallel", "share_weights": False}, "scheme is parallel"),
    "two modules": ({"share_weights": False}, "runs one MTP module"),
    "dense blocks": ({"dense_blocks": True}, "is dense"),
    "concat": ({"concat": "hidden_first"}, "mtp.concat = embed_first"),
    "trunk_hidden": ({"trunk_hidden": "pre_norm"}, "mtp.trunk_hidden = post_norm"),
    "carry": ({"carry": "pre_norm"}, "mtp.carry = post_norm"),
}


@pytest.mark.parametrize("case", REFUSED_TRUNKS)
def test_a_trunk_it_cannot_serve_is_refused_with_the_reason(case: str) -> None:
    changes, reason = REFUSED_TRUNKS[case]
    found = reasons_against_llamacpp(dataclasses.replace(TINY, **changes), MTP)
    assert reason in " ".join(found)


@pytest.mark.parametrize("case", REFUSED_SCHEMES)
def test_a_scheme_it_cannot_serve_is_refused_with_the_reason(case: str) -> None:
    changes, reason = REFUSED_SCHEMES[case]
    (found,) = reasons_against_llamacpp(TINY, dataclasses.replace(MTP, **changes))
    assert reason in found


def test_what_it_serves_has_no_reasons_against() -> None:
    deepseek = RopeConfig(**YARN, mscale=1.0, mscale_all_dim=1.0)
    for changes in ({}, {"rope_parameters": deepseek}, {"rope_interleave": False}, {"n_group": 2, "topk_group": 1}):
        assert reasons_against_llamacpp(dataclasses.replace(TINY, **changes), MTP) == []
    assert reasons_against_llamacpp(TINY, MTPConfig(num_depths=1, head_norm="shared")) == []
    assert reasons_against_llamacpp(dataclasses.replace(TINY, first_k_dense_replace=2), MTPConfig(num_depths=0)) == []


def test_writing_names_every_reason_and_leaves_nothing(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, attention_bias=True, rms_norm_eps=1e-5)
    folder = saved(model_of(config, MTPConfig(num_depths=2)), tmp_path / "checkpoint")
    with pytest.raises(ExportError, match=r"runs one MTP module|attention_bias") as caught:
        write_gguf(folder, tmp_path / "model.gguf")
    assert all(reason in str(caught.value) for reason in ("runs one MTP module", "attention_bias", "1e-05"))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_model_without_tokenizer_or_with_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    model = model_of()
    with pytest.raises(ExportError, match="f32, bf16, q8_0"):
        write_gguf(tmp_path, tmp_path / "model.gguf", "q4_0")
    model.tokenizer = None
    with pytest.raises(ExportError, match=r"no tokenizer\.json"):
        write_gguf(saved(model, tmp_path / "checkpoint"), tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"normalizer": {"type": "NFC"}}, "normalises"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "as GPT-2 does"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "as GPT-2 does"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}}, "across words"),
        ({"model": {"type": "Unigram"}}, "Unigram"),
        ({"model": {"type": "BPE", "vocab": {}, "merges": [], "ignore_merges": True}}, "ignore_merges"),
    ],
)
def test_a_tokenizer_that_it_would_read_otherwise_is_refused(changes: dict[str, Any], reason: str) -> None:
    usual = {
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
    }
    assert gguf_layout.tokenizer_settings(Described(usual), 3)["tokenizer.ggml.merges"] == ["a b"]
    with pytest.raises(ExportError, match=reason):
        gguf_layout.tokenizer_settings(Described(usual | changes), 3)


def test_without_the_package_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ExportError, match=r"pip install gguf"):
        write_gguf(tmp_path, tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match=r"pip install gguf"):
        GgufFile(tmp_path / "model.gguf")


# --------------------------------------------------------------------------------------------------------------- files


def test_a_file_cut_anywhere_is_an_error(tmp_path: Path) -> None:
    content = written(model_of(), tmp_path).path.read_bytes()
    for share in (0.01, 0.1, 0.5, 0.9):
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(content[: int(share * len(content))])
        with pytest.raises(CheckpointError, match="truncated or damaged"):
            GgufFile(cut)


def test_foreign_and_missing_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        GgufFile(tmp_path / "model.gguf")
    foreign = tmp_path / "model.gguf"
    for content in (b"", b"PK\x03\x04 a pickle"):
        foreign.write_bytes(content)
        with pytest.raises(CheckpointError, match="not a GGUF file"):
            GgufFile(foreign)


def test_a_place_that_cannot_be_written_is_an_error_and_the_old_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gguf

    file = written(model_of(), tmp_path).path
    old = file.read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        write_gguf(tmp_path / "checkpoint", file, "f32")
    assert file.read_bytes() == old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "model.gguf"]
    occupied = tmp_path / "checkpoint" / "config.json" / "model.gguf"
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="cannot write"):
        write_gguf(tmp_path / "checkpoint", occupied, "f32")
