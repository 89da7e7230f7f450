"""Checkpoints in DeepSeek-V3's layout that others wrote: no key of ours, shards, FP8 blocks, copies of tensors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nextn.config import ModelConfig, MTPConfig
from nextn.errors import CheckpointError
from nextn.files import INDEX_FILE, TensorFiles, atomic_folder, read_json, write_json
from nextn.mtp import MTPModel, load_model, save_model
from nextn.mtp.layout import dequantise

CONFIG = ModelConfig(
    vocab_size=50,
    hidden_size=24,
    intermediate_size=40,
    moe_intermediate_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    n_routed_experts=4,
    q_lora_rank=12,
    kv_lora_rank=8,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=6,
)
MTP_LAYER = "model.layers.3."


def released(folder: Path, config: ModelConfig = CONFIG, max_shard_bytes: int = 10**9, num_depths: int = 1) -> MTPModel:
    """A checkpoint as others write it: today's fields in config.json, but nothing of nextn's."""
    model = MTPModel(config, MTPConfig(num_depths=num_depths)).initialize(seed=1).eval()
    with atomic_folder(folder) as temporary:
        save_model(model, temporary, max_shard_bytes)
    change_config(folder, lambda table: [table.pop(key) for key in ("nextn", "scoring_func", "topk_method")])
    return model


def change_config(folder: Path, change) -> None:
    table = read_json(folder / "config.json")
    change(table)
    write_json(folder / "config.json", table)


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def assert_equal_models(a: MTPModel, b: MTPModel, tolerance: float = 0.0) -> None:
    assert (a.config, a.mtp_config) == (b.config, b.mtp_config)
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[name], rtol=0, atol=tolerance), name


@pytest.mark.parametrize("num_depths", [0, 1, 2])
@pytest.mark.parametrize("num_layers", [1, 3, 5])
def test_any_number_of_layers_and_modules_loads_with_the_released_conventions(
    tmp_path: Path, num_layers: int, num_depths: int
):
    model = released(tmp_path / "a", replace(CONFIG, num_hidden_layers=num_layers), num_depths=num_depths)
    loaded = load_model(tmp_path / "a")
    assert_equal_models(loaded, model)
    mtp = loaded.mtp_config
    assert (mtp.concat, mtp.trunk_hidden, mtp.carry, mtp.head_norm) == ("embed_first", "post_norm", "post_norm", "own")


def test_the_released_config_with_its_old_rope_fields_loads(tmp_path: Path):
    released(tmp_path / "a")

    def as_released(table) -> None:
        del table["rope_parameters"], table["rope_interleave"], table["attention_bias"], table["initializer_range"]
        table |= {"rope_theta": 10000, "moe_layer_freq": 1, "ep_size": 1, "topk_method": "noaux_tc"}
        table["rope_scaling"] = {
            "type": "yarn",
            "factor": 40,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        }

    change_config(tmp_path / "a", as_released)
    rope = load_model(tmp_path / "a").config.rope_parameters
    assert (rope.rope_type, rope.factor, rope.rope_theta) == ("yarn", 40.0, 10000.0)


@pytest.mark.parametrize(
    ("field", "value"), [("moe_layer_freq", 2), ("scoring_func", "softmax"), ("hidden_act", "gelu")]
)
def test_a_released_config_that_means_another_computation_is_refused(tmp_path: Path, field: str, value):
    released(tmp_path / "a")
    change_config(tmp_path / "a", lambda table: table.update({field: value}))
    with pytest.raises(CheckpointError, match=f"{field} is {value!r}"):
        load_model(tmp_path / "a")


# ------------------------------------------------------------------------------------------------------------- shards


def test_shards_hold_the_same_model_and_none_is_larger_than_allowed(tmp_path: Path):
    limit = 20_000
    model = released(tmp_path / "a", max_shard_bytes=limit)
    shards = sorted((tmp_path / "a").glob("*.safetensors"))
    assert len(shards) > 2
    assert not (tmp_path / "a" / "model.safetensors").exists()
    for shard in shards:
        assert sum(tensor.nbytes for tensor in load_file(shard).values()) <= limit
    assert_equal_models(load_model(tmp_path / "a"), model)
    index = read_json(tmp_path / "a" / INDEX_FILE)
    assert index["metadata"]["total_size"] == sum(t.nbytes for shard in shards for t in load_file(shard).values())


def test_headers_tell_shapes_and_dtypes_of_every_shard(tmp_path: Path):
    released(tmp_path / "a", max_shard_bytes=20_000)
    files = TensorFiles.open(tmp_path / "a")
    name = MTP_LAYER + "eh_proj.weight"
    assert files.shape(name) == (24, 48)
    assert files.dtype(name) == "F32"
    assert files.read(name).shape == (24, 48)
    assert files.file(name).suffix == ".safetensors"


def remove_a_shard(folder: Path, index) -> None:
    sorted(folder.glob("*.safetensors"))[1].unlink()


def truncate_a_shard(folder: Path, index) -> None:
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-10])


def forget_a_tensor(folder: Path, index) -> None:
    del index["weight_map"]["lm_head.weight"]


def misplace_a_tensor(folder: Path, index) -> None:
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"]["lm_head.weight"] = next(
        file for file in files if file != index["weight_map"]["lm_head.weight"]
    )


def leave_the_folder(folder: Path, index) -> None:
    index["weight_map"]["lm_head.weight"] = "../elsewhere.safetensors"


def lose_the_map(folder: Path, index) -> None:
    del index["weight_map"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_a_shard, "files that .* names are missing"),
        (truncate_a_shard, "truncated"),
        (forget_a_tensor, r"disagree about 1 tensors, for example lm_head.weight: not named"),
        (misplace_a_tensor, r"disagree about 1 tensors, for example lm_head.weight"),
        (leave_the_folder, "outside its folder"),
        (lose_the_map, "has no 'weight_map'"),
    ],
)
def test_a_damaged_set_of_shards_is_an_error(tmp_path: Path, damage, message: str):
    released(tmp_path / "a", max_shard_bytes=20_000)
    index = read_json(tmp_path / "a" / INDEX_FILE)
    damage(tmp_path / "a", index)
    write_json(tmp_path / "a" / INDEX_FILE, index)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "a")


# ----------------------------------------------------------------------------------------------------------------- FP8


def quantise(weight: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Block by block, with loops: the FP8 weight and its factors."""
    height, width = weight.shape
    scale = torch.zeros(-(-height // rows), -(-width // columns))
    quantised = torch.zeros_like(weight)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = weight[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            scale[i, j] = block.abs().max() / 448
            quantised[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns] = block / scale[i, j]
    return quantised.to(torch.float8_e4m3fn), scale


def quantise_checkpoint(
    folder: Path, rows: int, columns: int, names=lambda name: name.endswith("_proj.weight")
) -> None:
    def change(tensors) -> None:
        for name in [name for name in tensors if names(name)]:
            tensors[name], tensors[f"{name}_scale_inv"] = quantise(tensors[name], rows, columns)

    change_tensors(folder, change)
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [rows, columns]}
    change_config(folder, lambda table: table.update(quantization_config=quantization))


def test_fp8_blocks_are_dequantised_on_load(tmp_path: Path):
    model = released(tmp_path / "a")
    quantise_checkpoint(tmp_path / "a", 5, 7)  # blocks that do not divide the matrices
    loaded = load_model(tmp_path / "a")
    assert_equal_models(loaded, model, tolerance=0.02 * 0.07 * 3)
    assert not torch.equal(loaded.scheme.layers[0].eh_proj.weight, model.scheme.layers[0].eh_proj.weight)


def test_dequantised_values_are_each_block_times_its_factor_and_a_transposed_scale_is_caught():
    weight = torch.randn(11, 6)
    quantised, scale = quantise(weight, 4, 4)
    assert (dequantise(quantised, scale, (4, 4)) - weight).abs().max() < 0.2
    by_hand = torch.stack(
        [torch.stack([quantised[i, j].float() * scale[i // 4, j // 4] for j in range(6)]) for i in range(11)]
    )
    assert torch.equal(dequantise(quantised, scale, (4, 4)), by_hand)
    swapped = quantised.float() * scale.repeat_interleave(4, 1)[:, :6].repeat_interleave(6, 0)[:11]
    assert not torch.equal(swapped, by_hand)


def test_fp8_weights_without_their_factors_and_the_reverse_are_errors(tmp_path: Path):
    released(tmp_path / "a")
    quantise_checkpoint(tmp_path / "a", 8, 8)
    name = MTP_LAYER + "eh_proj.weight"
    kept = load_file(tmp_path / "a" / "model.safetensors")[f"{name}_scale_inv"]
    change_tensors(tmp_path / "a", lambda tensors: tensors.pop(f"{name}_scale_inv"))
    with pytest.raises(CheckpointError, match=r"eh_proj\.weight is FP8, and its factors"):
        load_model(tmp_path / "a")
    change_tensors(tmp_path / "a", lambda tensors: tensors.update({f"{name}_scale_inv": kept[:1]}))
    with pytest.raises(CheckpointError, match=r"blocks of 8 x 8 need \(3, 6\)"):
        load_model(tmp_path / "a")
    for wrong, message in (
        ({"quant_method": "awq"}, "quant_method is 'awq'"),
        ("fp8", "quant_method is 'fp8'"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size is \[128\]"),
    ):
        change_config(tmp_path / "a", lambda table, wrong=wrong: table.update(quantization_config=wrong))
        with pytest.raises(CheckpointError, match=message):
            load_model(tmp_path / "a")


def test_fp8_vectors_are_refused(tmp_path: Path):
    released(tmp_path / "a")
    name = MTP_LAYER + "enorm.weight"

    def change(tensors) -> None:
        tensors[name], tensors[f"{name}_scale_inv"] = tensors[name].to(torch.float8_e4m3fn), torch.ones(1)

    change_tensors(tmp_path / "a", change)
    with pytest.raises(CheckpointError, match=r"enorm.weight is FP8 and has shape \(24,\)"):
        load_model(tmp_path / "a")


# -------------------------------------------------------------------------------------------------------- MTP tensors


def add_copies(tensors) -> None:
    tensors[MTP_LAYER + "embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    tensors[MTP_LAYER + "shared_head.head.weight"] = head.clone()


@pytest.mark.parametrize("tied", [False, True])
def test_copies_of_embedding_and_head_may_be_there_or_not(tmp_path: Path, tied: bool):
    model = released(tmp_path / "a", replace(CONFIG, tie_word_embeddings=tied))
    change_tensors(tmp_path / "a", add_copies)
    assert_equal_models(load_model(tmp_path / "a"), model)


@pytest.mark.parametrize("copy", ["embed_tokens.weight", "shared_head.head.weight"])
def test_a_copy_that_differs_from_the_trunk_is_an_error_and_not_dropped(tmp_path: Path, copy: str):
    released(tmp_path / "a")
    change_tensors(tmp_path / "a", add_copies)
    change_tensors(tmp_path / "a", lambda tensors: tensors[MTP_LAYER + copy].add_(1e-3))
    with pytest.raises(CheckpointError, match=f"{copy} differs from"):
        load_model(tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(MTP_LAYER + "eh_proj.weight"), r"1 missing \(model.layers.3.eh_proj.weight\).*nextn doctor"),
        (
            lambda t: t[MTP_LAYER + "mlp.experts.2.up_proj.weight"].fill_(1e18),
            r"experts.2.up_proj.weight reaches 1e\+18",
        ),
        (lambda t: t[MTP_LAYER + "eh_proj.weight"].zero_(), "eh_proj.weight is all zeros"),
        (lambda t: t[MTP_LAYER + "hnorm.weight"].fill_(float("nan")), "hnorm.weight holds values that are not finite"),
    ],
)
def test_missing_and_uninitialised_mtp_tensors_are_named(tmp_path: Path, change, message: str):
    released(tmp_path / "a")
    change_tensors(tmp_path / "a", change)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "a")


def test_one_expert_of_another_shape_is_named(tmp_path: Path):
    released(tmp_path / "a")
    name = MTP_LAYER + "mlp.experts.2.down_proj.weight"
    change_tensors(tmp_path / "a", lambda tensors: tensors.update({name: torch.ones(24, 15)}))
    with pytest.raises(CheckpointError, match=r"experts.2.down_proj.weight has shape \(24, 15\).*means \(24, 16\)"):
        load_model(tmp_path / "a")


def test_a_router_of_zeros_is_a_router(tmp_path: Path):
    released(tmp_path / "a")
    change_tensors(tmp_path / "a", lambda tensors: tensors[MTP_LAYER + "mlp.gate.weight"].zero_())
    load_model(tmp_path / "a")


def test_modules_that_config_does_not_declare_are_an_error_that_names_them(tmp_path: Path):
    released(tmp_path / "a")
    change_config(tmp_path / "a", lambda table: table.update(num_nextn_predict_layers=0))
    with pytest.raises(CheckpointError, match=r"unexpected \(model.layers.3.*nextn doctor"):
        load_model(tmp_path / "a")
