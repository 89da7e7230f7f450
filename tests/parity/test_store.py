"""Any trunk with any modules: load, change, save and load gives the same model, in a folder that others read too."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.utils import logging as transformers_logging

import nextn
from nextn.config import MTPConfig
from nextn.data import ByteTokenizer
from nextn.errors import CheckpointError
from nextn.files import atomic_folder
from nextn.interop import hf_layout
from nextn.interop.doctor import examine
from nextn.interop.load import load_with_transformers
from nextn.mtp import MTPModel, save_model, store

from .released_families import FAMILIES, Reference

SHAPE = {
    **{"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": 256},
    "pad_token_id": None,
}
PLAIN: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "smollm": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=8),
    "mistral": MistralConfig(**SHAPE, head_dim=8),
    "gemma3": Gemma3TextConfig(**SHAPE, head_dim=8, query_pre_attn_scalar=8, sliding_window=16),
}
SCHEMES = {
    "one recursive module": MTPConfig(num_depths=3, share_weights=True),
    "independent": MTPConfig(scheme="independent", num_depths=2),
    "shared module": MTPConfig(scheme="shared_module", num_depths=2),
}
IDS = torch.arange(3, 15)[None]


def plain_folder(kind: str, folder: Path) -> Path:
    """A random model as others write it, with all that stands beside the weights of a chat model."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(PLAIN[kind]).save_pretrained(folder)
    ByteTokenizer().save(folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, 3], "top_p": 0.8}))
    (folder / "LICENSE").write_text("as you like")
    return folder


def with_modules(folder: Path, mtp_config: MTPConfig) -> MTPModel:
    """The folder's trunk with fresh modules."""
    loaded = nextn.load(folder)
    model = MTPModel(None, mtp_config, loaded.trunk)
    model.tokenizer, model.origin = loaded.tokenizer, loaded.origin
    model.trunk.initialize(model.scheme, torch.Generator().manual_seed(1))
    return model.eval()


def perturbed(model: MTPModel) -> MTPModel:
    """The same model after a change to every weight."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.05)
    return model


def saved(model: MTPModel, folder: Path) -> Path:
    with atomic_folder(folder) as temporary:
        save_model(model, temporary)
    return folder


def differences(first: MTPModel, second: MTPModel) -> list[str]:
    """Names of the tensors that one model lacks or holds otherwise."""
    ours, theirs = first.state_dict(), second.state_dict()
    return sorted(
        name for name in ours.keys() | theirs.keys()
        if name not in ours or name not in theirs or not torch.equal(ours[name], theirs[name])
    )  # fmt: skip


def warnings_of_transformers(folder: Path, caplog: pytest.LogCaptureFixture) -> list[str]:
    """What `AutoModelForCausalLM` says while it loads the folder."""
    transformers_logging.set_verbosity_warning()
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    caplog.clear()
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    finally:
        logger.removeHandler(caplog.handler)
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", PLAIN)
def test_new_modules_on_a_plain_trunk_come_back_exact(kind: str, scheme: str, tmp_path: Path, caplog):
    folder = plain_folder(kind, tmp_path / "theirs")
    model = perturbed(with_modules(folder, SCHEMES[scheme]))
    out = saved(model, tmp_path / "ours")
    again = nextn.load(out)
    assert again.mtp_config == model.mtp_config
    assert differences(model, again) == []
    assert warnings_of_transformers(out, caplog) == []
    assert differences(again, nextn.load(saved(again, tmp_path / "twice"))) == []


@pytest.mark.parametrize("kind", PLAIN)
def test_transformers_reads_the_trunk_alone_and_computes_the_same(kind: str, tmp_path: Path):
    model = perturbed(with_modules(plain_folder(kind, tmp_path / "theirs"), SCHEMES["one recursive module"]))
    theirs = AutoModelForCausalLM.from_pretrained(saved(model, tmp_path / "ours"))
    with torch.no_grad():
        ours = model(IDS).logits
        torch.testing.assert_close(theirs(IDS, attention_mask=torch.ones_like(IDS)).logits, ours, atol=1e-4, rtol=1e-4)


def test_all_that_stood_beside_the_weights_is_still_there(tmp_path: Path):
    folder = plain_folder("llama", tmp_path / "theirs")
    out = saved(with_modules(folder, SCHEMES["shared module"]), tmp_path / "ours")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "LICENSE"):
        assert (out / name).read_bytes() == (folder / name).read_bytes(), name
    before, after = (json.loads((place / "config.json").read_text()) for place in (folder, out))
    assert {key: value for key, value in after.items() if key != "nextn"} == before


def test_another_tokenizer_takes_the_place_of_the_folders_own(tmp_path: Path):
    model = nextn.load(plain_folder("llama", tmp_path / "theirs"))
    model.tokenizer = ByteTokenizer()
    out = saved(model, tmp_path / "ours")
    assert not (out / "chat_template.jinja").exists(), "it was written for the other tokenizer"
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 256
    assert (out / "LICENSE").exists()


@pytest.mark.parametrize("kind", FAMILIES)
def test_released_modules_are_written_back_as_their_family_names_them(kind: str, tmp_path: Path):
    folder = Reference(FAMILIES[kind]).save(tmp_path / "theirs")
    model = perturbed(load_with_transformers(folder))
    out = saved(model, tmp_path / "ours")
    again = load_with_transformers(out)
    assert again.mtp_config == model.mtp_config
    assert differences(model, again) == []
    assert not (out / "mtp").exists()
    names = set(load_file(folder / "model.safetensors"))
    copies = {name for name in names if re.search(r"layers\.[34]\.(embed_tokens|shared_head\.head)", name)}
    assert set(again_names(out)) == names - copies, "copies of embedding and head are the trunk's"


def again_names(folder: Path) -> list[str]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return list(index["weight_map"])


# transformers expects the modules of the others under the layer numbers of the models that were released.
EXPECTED_BY_TRANSFORMERS = (
    *("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "mimo_v2_flash", "ernie4_5_moe", "nemotron_h"),
)


@pytest.mark.parametrize("kind", EXPECTED_BY_TRANSFORMERS)
def test_transformers_says_nothing_about_released_modules(kind: str, tmp_path: Path, caplog):
    model = load_with_transformers(Reference(FAMILIES[kind]).save(tmp_path / "theirs"))
    assert warnings_of_transformers(saved(model, tmp_path / "ours"), caplog) == []


@pytest.mark.parametrize(
    "change", [{"concat": "hidden_first"}, {"trunk_hidden": "pre_norm"}, {"carry": "pre_norm"}, {"head_norm": "shared"}]
)
def test_modules_that_compute_something_else_never_get_the_familys_names(change: dict, tmp_path: Path):
    folder = Reference(FAMILIES["qwen3_5_text"]).save(tmp_path / "theirs")
    loaded = load_with_transformers(folder)
    model = MTPModel(None, MTPConfig(num_depths=1, **change), loaded.trunk)
    model.origin = loaded.origin
    loaded.trunk.initialize(model.scheme, torch.Generator().manual_seed(1))
    out = saved(model, tmp_path / "ours")
    assert json.loads((out / "config.json").read_text())["mtp_num_hidden_layers"] == 0
    assert not any(name.startswith("mtp.") for name in load_file(out / "model.safetensors"))
    again = nextn.load(out)
    assert again.mtp_config == model.mtp_config
    assert differences(model, again) == []


def test_what_a_multimodal_model_holds_beside_its_language_model_is_carried_over(tmp_path: Path):
    folder = Reference(FAMILIES["qwen3_5_text"]).save(tmp_path / "theirs")
    text = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_5", "text_config": text}))
    tensors = load_file(folder / "model.safetensors")
    tensors = {name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name: tensor
               for name, tensor in tensors.items()}  # fmt: skip
    tower = {"model.visual.blocks.0.attn.proj.weight": torch.randn(4, 4)}
    save_file(tensors | tower, folder / "model.safetensors", {"format": "pt"})
    model = perturbed(nextn.load(folder))
    out = saved(model, tmp_path / "ours")
    assert differences(model, nextn.load(out)) == []
    stored: dict[str, Tensor] = {}
    for file in out.glob("*.safetensors"):
        stored |= load_file(file)
    assert torch.equal(
        stored["model.visual.blocks.0.attn.proj.weight"], tower["model.visual.blocks.0.attn.proj.weight"]
    )
    assert stored.keys() == tensors.keys() | tower.keys()


def test_the_doctor_knows_modules_beside_any_trunk(tmp_path: Path):
    model = perturbed(with_modules(plain_folder("llama", tmp_path / "theirs"), SCHEMES["one recursive module"]))
    out = saved(model, tmp_path / "ours")
    diagnosis = examine(out)
    assert diagnosis.is_healthy
    assert (diagnosis.num_declared, diagnosis.num_stored) == (1, 1)
    assert dict(diagnosis.conventions)["concat"] == "embed_first"
    held = load_file(out / "mtp" / "model.safetensors")
    save_file({name: t for name, t in held.items() if "k_proj" not in name}, out / "mtp" / "model.safetensors")
    assert not examine(out).is_healthy, "a tensor that is lost is missed"


def test_greedy_decoding_is_the_same_before_and_after(tmp_path: Path):
    model = perturbed(with_modules(plain_folder("qwen3", tmp_path / "theirs"), SCHEMES["one recursive module"]))
    again = nextn.load(saved(model, tmp_path / "ours"))
    outputs = [nextn.generate(m, [[5, 6, 7]], max_new_tokens=24, draft_length=3).token_ids for m in (model, again)]
    plain = nextn.generate(again, [[5, 6, 7]], max_new_tokens=24, draft_length=0).token_ids
    assert outputs[0] == outputs[1] == plain


MISTAKES = {
    "modules without settings": (lambda t: t.pop("nextn"), None, r"does not say what the modules in mtp/ compute"),
    "settings cut short": (lambda table: table["nextn"]["mtp"].pop("carry"), None, r"nextn\.mtp lacks carry"),
    "a module too few": (None, lambda t: t.pop("mtp.layers.0.eh_proj.weight"), r"missing 1 \(mtp\.layers\.0\.eh_proj"),
    "a tensor too many": (None, lambda t: t.update(extra=torch.ones(1)), r"unexpected 1 \(extra\)"),
    "another shape": (None, lambda t: t.update({"mtp.layers.0.hnorm.weight": torch.ones(3)}), r"has shape \(3,\)"),
    "never initialised": (None, lambda t: t["mtp.layers.0.eh_proj.weight"].fill_(1e18), r"eh_proj.* reaches 1e\+18"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_damaged_modules_are_refused_by_name(mistake: str, tmp_path: Path):
    settings, tensors, found = MISTAKES[mistake]
    model = with_modules(plain_folder("llama", tmp_path / "theirs"), SCHEMES["one recursive module"])
    out = saved(model, tmp_path / "ours")
    if settings is not None:
        table = json.loads((out / "config.json").read_text())
        settings(table)
        (out / "config.json").write_text(json.dumps(table))
    if tensors is not None:
        held = load_file(out / "mtp" / "model.safetensors")
        tensors(held)
        save_file(held, out / "mtp" / "model.safetensors")
    with pytest.raises(CheckpointError, match=found):
        nextn.load(out)


def test_a_store_that_swaps_gates_or_forgets_a_companion_would_be_noticed(tmp_path: Path, monkeypatch):
    model = perturbed(load_with_transformers(Reference(FAMILIES["glm4_moe"]).save(tmp_path / "theirs")))
    right = hf_layout.separate_experts

    def up_before_gate(state):
        return right({name: t.flip(1) if name.endswith("gate_up_proj") else t for name, t in state.items()})

    monkeypatch.setattr(hf_layout, "separate_experts", up_before_gate)
    assert differences(model, load_with_transformers(saved(model, tmp_path / "ours"))) != []
    monkeypatch.undo()
    monkeypatch.setattr(store.Origin, "write", lambda *_: None)
    out = saved(nextn.load(plain_folder("llama", tmp_path / "llama")), tmp_path / "forgetful")
    assert not (out / "LICENSE").exists()


# --------------------------------------------------------------------------------------------- the whole way, by family

EXPECTED_IN_A_SMALL_MODEL = tuple(PLAIN) + EXPECTED_BY_TRANSFORMERS


@pytest.mark.parametrize("kind", EXPECTED_IN_A_SMALL_MODEL)
def test_load_train_the_modules_save_and_load_again(kind: str, tmp_path: Path, caplog):
    """One optimizer step on the modules alone; the folder is whole, exact, quiet in transformers, and decodes alike."""
    if kind in PLAIN:
        model = with_modules(plain_folder(kind, tmp_path / "theirs"), SCHEMES["one recursive module"])
    else:
        Reference(FAMILIES[kind]).save(tmp_path / "theirs")
        model = load_with_transformers(tmp_path / "theirs")
    trunk_before = {name: tensor.clone() for name, tensor in model.trunk.state_dict().items()}
    model.trunk.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.scheme.train()
    model(IDS).loss.backward()
    optimizer.step()
    model.eval()
    out = saved(model, tmp_path / "ours")
    again = nextn.load(out)
    assert differences(model, again) == []
    assert all(torch.equal(tensor, trunk_before[name]) for name, tensor in again.trunk.state_dict().items())
    assert warnings_of_transformers(out, caplog) == []
    texts = [
        nextn.generate(one, [[5, 6, 7]], max_new_tokens=12, draft_length=length).token_ids
        for one, length in ((model, 2), (again, 2), (again, 0))
    ]
    assert texts[0] == texts[1] == texts[2]
