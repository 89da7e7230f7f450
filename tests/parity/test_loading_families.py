"""`nextn.load` says what is wrong with a checkpoint, by the names in its files, and never loads half of one."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import nextn
from nextn.data.tokenizers import ByteTokenizer
from nextn.errors import CheckpointError, DeviceError
from nextn.interop.load import load_with_transformers

from .conftest import relative_error
from .released_families import FAMILIES, Reference

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    kinds = ("glm4_moe", "mimo", "qwen3_next", "ernie4_5_moe")
    folders = {kind: Reference(FAMILIES[kind]).save(tmp_path_factory.mktemp(kind)) for kind in kinds}
    folders["llama"] = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folders["llama"])
    return folders


@pytest.fixture
def changed(originals: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a checkpoint with other settings (None takes one out) and other tensors."""

    def change(kind: str, settings: dict | None = None, tensors: Callable[[Tensors], None] | None = None) -> Path:
        folder = Path(shutil.copytree(originals[kind], tmp_path / kind))
        table = json.loads((folder / "config.json").read_text()) | (settings or {})
        table = {key: value for key, value in table.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(table))
        if tensors is not None:
            held = load_file(folder / "model.safetensors")
            tensors(held)
            save_file(held, folder / "model.safetensors", {"format": "pt"})
        return folder

    return change


def without(*parts: str) -> Callable[[Tensors], None]:
    def remove(tensors: Tensors) -> None:
        for name in [name for name in tensors if any(part in name for part in parts)]:
            del tensors[name]

    return remove


def filled(name: str, value: float) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: torch.full_like(tensors[name], value)})


def test_a_model_without_mtp_loads_with_no_depths_and_its_tokenizer(changed):
    folder = changed("llama")
    ByteTokenizer().save(folder)
    model = nextn.load(folder)
    assert (model.num_depths, model.scheme) == (0, None)
    assert nextn.generate(model, ["ab"], max_new_tokens=4, draft_length=0).texts


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(changed, originals):
    folder = changed("mimo")
    ByteTokenizer().save(folder)
    with pytest.raises(CheckpointError, match=r"has 257 tokens and the model knows 61"):
        nextn.load(folder)


def test_routing_biases_stay_in_float32(originals):
    model = nextn.load(originals["glm4_moe"], dtype="bfloat16")
    dtypes = {name: parameter.dtype for name, parameter in model.state_dict().items() if "e_score" in name}
    assert len(dtypes) == 3
    assert set(dtypes.values()) == {torch.float32}
    assert model.scheme.layers[0].eh_proj.weight.dtype == torch.bfloat16


MISTAKES = {
    "modules lost": (
        "glm4_moe",
        {},
        without("layers.3."),
        r"declares 1 MTP modules .* hold 0: model\.layers\.3\.eh_proj\.weight .*nextn doctor",
    ),
    "modules not declared": (
        "glm4_moe",
        {"num_nextn_predict_layers": 0},
        None,
        r"hold 1 MTP modules, and config.json declares 0; set num_nextn_predict_layers = 1",
    ),
    "one projection missing": (
        "mimo",
        {},
        without("input_proj"),
        r"MTP module 0 are missing: 1 \(model\.mtp_layers\.0\.input_proj\.weight\).*nextn doctor",
    ),
    "one expert missing": ("glm4_moe", {}, without("layers.3.mlp.experts.2.up_proj"), r"layers\.3\.mlp\.experts"),
    "a norm of Qwen's missing, with no module declared": (
        "qwen3_next",
        {},
        without("mtp.pre_fc_norm_hidden"),
        r"mtp\.pre_fc_norm_hidden\.weight",
    ),
    "a tensor too many": (
        "ernie4_5_moe",
        {},
        lambda tensors: tensors.update({"model.mtp_block.0.extra.weight": torch.ones(2)}),
        r"unexpected: 1 \(block\.extra\.weight\)",
    ),
    "a tensor of the trunk missing": ("glm4_moe", {}, without("layers.1.self_attn.q_proj"), r"trunk are missing: "),
    "a tensor of the trunk too many": (
        "llama",
        {},
        lambda tensors: tensors.update({"model.layers.0.extra.weight": torch.ones(2)}),
        r"trunk are unexpected: 1 \(model\.layers\.0\.extra\.weight\)",
    ),
    "other shapes": ("mimo", {"intermediate_size": 96}, None, r"do not have the shapes"),
    "an MTP tensor of another shape": (
        "mimo",
        {},
        lambda tensors: tensors.update({"model.mtp_layers.0.input_proj.weight": torch.ones(48, 48)}),
        r"input_proj\.weight has shape \(48, 48\), config.json means \(48, 96\)",
    ),
    "never initialised": ("mimo", {}, filled("model.mtp_layers.0.input_proj.weight", 1e18), r"input_proj.* 1e\+18"),
    "not finite": ("mimo", {}, filled("model.mtp_layers.0.input_proj.weight", float("nan")), r"not finite"),
    "a head of its own": (
        "glm4_moe",
        {},
        filled("model.layers.3.shared_head.head.weight", 0.5),
        r"shared_head\.head\.weight differs from the trunk's output head",
    ),
    "quantised": ("mimo", {"quantization_config": {"quant_method": "awq"}}, None, r"quantised by 'awq'"),
    "a layout nobody knows": (
        "llama",
        {"num_nextn_predict_layers": 1},
        None,
        r"'llama' declares MTP modules .* known: deepseek_v3, glm4_moe, ",
    ),
    "a trunk transformers lacks": (
        "mimo",
        {"model_type": "no_such_model", "num_nextn_predict_layers": None},
        None,
        r"cannot load the trunk of model_type 'no_such_model'.*known|knows: deepseek_v3",
    ),
    "no family named": ("llama", {"model_type": None}, None, r"names no model_type"),
    "a family whose modules cannot be run": (
        "mimo",
        {"model_type": "step3p5"},
        lambda tensors: tensors.update({"model.layers.3.enorm.weight": torch.ones(48)}),
        r"cannot run the MTP modules of Step.*output head of its own",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_error_names_what_is_wrong(mistake, changed):
    kind, settings, tensors, found = MISTAKES[mistake]
    folder = changed(kind, settings, tensors)
    with pytest.raises(CheckpointError, match=found):
        nextn.load(folder)


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("quantization_config", "fp8", r"config\.json: quantization_config is 'fp8'"),
        ("num_nextn_predict_layers", "one", r"num_nextn_predict_layers is 'one'"),
        ("num_nextn_predict_layers", 1.5, r"num_nextn_predict_layers is 1\.5"),
        ("num_nextn_predict_layers", True, r"num_nextn_predict_layers is True"),
        ("num_nextn_predict_layers", -1, r"num_nextn_predict_layers is -1"),
    ],
)
def test_a_setting_of_the_wrong_type_is_named_with_its_value(key, value, found, changed):
    folder = changed("mimo")
    table = json.loads((folder / "config.json").read_text()) | {key: value}
    (folder / "config.json").write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match=found):
        load_with_transformers(folder)


def test_no_declared_modules_may_be_written_as_null(changed):
    folder = changed("mimo", {}, without("mtp_layers"))
    table = json.loads((folder / "config.json").read_text()) | {"num_nextn_predict_layers": None}
    (folder / "config.json").write_text(json.dumps(table))
    assert load_with_transformers(folder).num_depths == 0


def test_the_trunk_loads_alone_when_its_modules_are_taken_out_and_not_declared(changed):
    folder = changed("mimo", {"num_nextn_predict_layers": 0}, without("mtp_layers"))
    assert nextn.load(folder).num_depths == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_a_model_with_experts_decodes_and_has_gradients_in_other_dtypes(dtype, originals):
    model = nextn.load(originals["glm4_moe"], dtype=dtype)
    assert len(nextn.generate(model, [[1, 2, 3]], max_new_tokens=4, draft_length=2).token_ids[0]) == 4
    model.train()(torch.arange(12)[None]).loss.backward()
    assert all(parameter.grad is not None for parameter in model.scheme.parameters() if parameter.is_floating_point())


def test_an_unknown_dtype_is_refused(originals):
    with pytest.raises(DeviceError, match="unknown dtype 'int8'"):
        load_with_transformers(originals["mimo"], dtype="int8")


def test_shards_are_read_like_one_file(originals, tmp_path):
    folder = Path(shutil.copytree(originals["mimo"], tmp_path / "sharded"))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = {"a.safetensors": {}, "b.safetensors": {}}
    for index, name in enumerate(sorted(tensors)):
        parts["a.safetensors" if index % 2 else "b.safetensors"][name] = tensors[name]
    for file, part in parts.items():
        save_file(part, folder / file, {"format": "pt"})
    places = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    whole, sharded = nextn.load(originals["mimo"]), nextn.load(folder)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), sharded.parameters(), strict=True))


@torch.no_grad()
def test_the_language_model_of_a_multimodal_checkpoint_loads_with_its_modules(tmp_path):
    reference = Reference(FAMILIES["qwen3_5_text"])
    folder = reference.save(tmp_path)
    text = json.loads((folder / "config.json").read_text())
    table = {"model_type": "qwen3_5", "architectures": ["Qwen3_5ForConditionalGeneration"], "text_config": text}
    (folder / "config.json").write_text(json.dumps(table))
    tensors = load_file(folder / "model.safetensors")
    tensors = {re.sub("^model\\.", "model.language_model.", name): tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    ids = torch.arange(12)[None]
    for mine, theirs in zip(nextn.load(folder)(ids).logits_per_depth, reference.logits(ids), strict=True):
        assert relative_error(mine, theirs) < 1e-5
