"""The doctor's laws: each verdict right for a checkpoint that is well, and for each way in which one can be ill."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nextn.config import MTPConfig
from nextn.data import ByteTokenizer
from nextn.errors import CheckpointError
from nextn.files import TensorFiles, atomic_folder, read_json, write_json
from nextn.interop.doctor import Diagnosis, examine, invariants, services, values
from nextn.interop.doctor.stored import declared_in_folder, sort_tensors
from nextn.interop.doctor.values import TensorStatistics
from nextn.interop.engines import reasons_against
from nextn.interop.families import FAMILIES
from nextn.mtp import MTPModel, load_model, save_model
from nextn.mtp.config_file import read_config

from ..parity.released_families import FAMILIES as RELEASED
from ..parity.released_families import Reference
from .test_mtp_laws import TINY

EH_PROJ = "model.layers.2.eh_proj.weight"


def saved(folder: Path, config=TINY, max_shard_bytes: int = 10**9, **mtp) -> Path:
    """A checkpoint whose norms and biases are not as initialised, as if it were trained."""
    model = MTPModel(config, MTPConfig(**mtp)).initialize(seed=1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("norm.weight", "bias")):
                tensor.add_(0.1 * torch.randn_like(tensor))
    with atomic_folder(folder) as temporary:
        save_model(model, temporary, max_shard_bytes)
    return folder


def rewrite(folder: Path, change) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def set_config(folder: Path, **changes) -> None:
    write_json(folder / "config.json", read_json(folder / "config.json") | changes)


def is_mtp(name: str) -> bool:
    return name.startswith("model.layers.2.")


def drop_mtp(state: dict[str, Tensor]) -> None:
    for name in list(filter(is_mtp, state)):
        del state[name]


def problems(diagnosis: Diagnosis) -> list[str]:
    return [finding.what for finding in diagnosis.findings if finding.severity == "problem"]


def warnings(diagnosis: Diagnosis) -> list[str]:
    return [finding.what for finding in diagnosis.findings if finding.severity == "warning"]


# ------------------------------------------------------------------------------------------------------------- healthy


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
@pytest.mark.parametrize(
    "mtp",
    [
        {"num_depths": 1},
        {"num_depths": 2},
        {"num_depths": 3, "share_weights": True, "concat": "hidden_first", "carry": "pre_norm"},
        {"num_depths": 1, "head_norm": "shared"},
        {"num_depths": 1, "dense_blocks": True},
        {"num_depths": 2, "scheme": "independent"},
        {"num_depths": 2, "scheme": "parallel"},
        {"num_depths": 2, "scheme": "shared_module"},
    ],
    ids=str,
)
def test_a_good_checkpoint_is_healthy_whatever_its_scheme_and_shards(tmp_path: Path, mtp, shard_bytes: int):
    diagnosis = examine(saved(tmp_path / "a", max_shard_bytes=shard_bytes, **mtp))
    assert (problems(diagnosis), warnings(diagnosis)) == ([], [])
    assert diagnosis.has_mtp
    assert diagnosis.verdict.startswith("MTP healthy")
    own = read_json(tmp_path / "a" / "config.json")["nextn"]["mtp"]
    assert all(own[name] == value for name, value in diagnosis.conventions)


def test_a_block_that_is_dense_where_every_trunk_layer_has_experts_is_healthy(tmp_path: Path):
    diagnosis = examine(saved(tmp_path / "a", replace(TINY, first_k_dense_replace=0), dense_blocks=True))
    assert diagnosis.is_healthy
    assert warnings(diagnosis) == []  # every name is compared with the settings, if not with the trunk
    assert "complete" in diagnosis.verdict
    set_config(tmp_path / "a", model_type="unheard_of")
    diagnosis = examine(tmp_path / "a")
    assert warnings(diagnosis) == ["block unlike the trunk"]
    assert "complete" not in diagnosis.verdict


def test_no_mtp_at_all_is_healthy_too(tmp_path: Path):
    diagnosis = examine(saved(tmp_path / "a", num_depths=0))
    assert diagnosis.is_healthy
    assert not diagnosis.has_mtp
    assert diagnosis.verdict.startswith("no MTP: neither declared")
    assert services(diagnosis) == ()


def test_a_weights_file_alone_is_examined_by_its_names(tmp_path: Path):
    saved(tmp_path / "a", num_depths=1)
    (tmp_path / "a" / "model.safetensors").rename(tmp_path / "alone.safetensors")
    diagnosis = examine(tmp_path / "alone.safetensors")
    assert (diagnosis.num_declared, diagnosis.num_stored, problems(diagnosis)) == (None, 1, [])
    rewrite_file = load_file(tmp_path / "alone.safetensors")
    del rewrite_file["model.layers.2.mlp.experts.1.up_proj.weight"]
    save_file(rewrite_file, tmp_path / "alone.safetensors")
    assert problems(examine(tmp_path / "alone.safetensors")) == ["MTP incomplete"]


def test_a_shard_that_an_index_beside_it_lists_is_taken_as_the_folder_and_alone_for_what_it_holds(tmp_path: Path):
    folder = saved(tmp_path / "a", max_shard_bytes=30_000)
    shards = sorted(folder.glob("model-*-of-*.safetensors"))
    assert len(shards) > 2
    assert all(examine(shard) == examine(folder) for shard in shards)
    (folder / "model.safetensors.index.json").unlink()
    for diagnosis in map(examine, shards):
        assert diagnosis.is_healthy
        assert diagnosis.verdict.startswith("one shard: ")
        assert "complete" not in diagnosis.verdict


def test_nothing_of_the_trunk_is_read_but_one_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    read, names = TensorFiles.read, []
    monkeypatch.setattr(TensorFiles, "read", lambda files, name: names.append(name) or read(files, name))
    examine(saved(tmp_path / "a"))
    assert len([name for name in names if not is_mtp(name)]) == 1


# ----------------------------------------------------------------------------------------------------------------- ill


def test_a_head_lost_by_fine_tuning_with_transformers_is_found(tmp_path: Path):
    from transformers import AutoModelForCausalLM

    saved(tmp_path / "a", num_depths=1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype="float32")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    ids = torch.randint(0, TINY.vocab_size, (2, 9))
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "b")
    diagnosis = examine(tmp_path / "b")
    assert diagnosis.verdict == (
        "MTP lost: num_nextn_predict_layers in config.json declares 1 module and no tensor of it is stored"
    )
    assert not diagnosis.is_healthy
    assert all(service.runs_mtp is False for service in services(diagnosis))


def swap_norm_shape(state: dict[str, Tensor]) -> None:
    state["model.layers.2.hnorm.weight"] = torch.ones(7)


def zero_mtp(state: dict[str, Tensor]) -> None:
    state.update({name: torch.zeros_like(tensor) for name, tensor in state.items() if is_mtp(name)})


def forget_to_initialise(state: dict[str, Tensor]) -> None:
    name = "model.layers.2.mlp.experts.0.up_proj.weight"
    state[name] = torch.full_like(state[name], 1e18)


def denormals(state: dict[str, Tensor]) -> None:
    state[EH_PROJ] = torch.full_like(state[EH_PROJ], 1e-41)
    state[EH_PROJ][0, 0] = 0.1


def nan_in_the_routing_bias(state: dict[str, Tensor]) -> None:
    state["model.layers.2.mlp.gate.e_score_correction_bias"][1] = float("nan")


def one_value(state: dict[str, Tensor]) -> None:
    state[EH_PROJ] = torch.full_like(state[EH_PROJ], 0.25)


def blind_to_the_embedding(state: dict[str, Tensor]) -> None:
    state[EH_PROJ][:, : TINY.hidden_size] = 0


def a_stranger_for_the_projection(state: dict[str, Tensor]) -> None:
    del state["model.layers.2.self_attn.o_proj.weight"]
    state["model.layers.2.self_attn.k_scale"] = torch.ones(1)


def another_embedding(state: dict[str, Tensor]) -> None:
    state["model.layers.2.embed_tokens.weight"] = state["model.embed_tokens.weight"] + 1


ILLS = {
    "all tensors": (drop_mtp, "MTP lost", "declares 1 module and no tensor of it is stored"),
    "one tensor": (lambda s: s.pop(EH_PROJ), "MTP incomplete", "module 0 lacks 1 tensor"),
    "one expert": (
        lambda s: s.pop("model.layers.2.mlp.experts.3.down_proj.weight"),
        "MTP incomplete",
        "block.mlp.experts.3.down_proj.weight",
    ),
    "shape": (swap_norm_shape, "MTP misshapen", "hnorm.weight is 7 and should be 24"),
    "zeros": (zero_mtp, "MTP zeroed", "tensors"),
    "uninitialised": (forget_to_initialise, "MTP uninitialised", "values up to 1e+18"),
    "denormals": (denormals, "MTP uninitialised", "next to zero"),
    "nan": (nan_in_the_routing_bias, "MTP not finite", "e_score_correction_bias"),
    "constant": (one_value, "MTP constant", EH_PROJ),
    "miscounted": (None, "layers miscounted", "is 3, and the first layer with tensors that only MTP modules have is 2"),
    "head": (lambda s: s.pop("lm_head.weight"), "trunk unlike settings", "1 missing (lm_head.weight)"),
    "trunk shape": (
        lambda s: s.update({"model.norm.weight": torch.ones(7)}),
        "trunk unlike settings",
        "model.norm.weight is 7 and should be 24",
    ),
    "uncompared": (a_stranger_for_the_projection, "MTP unlike settings", "1 missing (model.layers.2.self_attn.o_proj"),
    "embedding": (another_embedding, "copies differ", "embed_tokens.weight is not model.embed_tokens.weight"),
    "head copy": (
        lambda s: s.update({"model.layers.2.shared_head.head.weight": 2 * s["lm_head.weight"]}),
        "copies differ",
        "shared_head.head.weight is not lm_head.weight",
    ),
    "half": (blind_to_the_embedding, "MTP half blind", "reads the embedding is zeros"),
}


def damage(folder: Path, ill: str) -> None:
    change = ILLS[ill][0]
    if change is None:
        set_config(folder, num_hidden_layers=TINY.num_hidden_layers + 1)
    else:
        rewrite(folder, change)


@pytest.mark.parametrize("ill", ILLS)
def test_every_ill_has_its_own_verdict(tmp_path: Path, ill: str):
    _, what, detail = ILLS[ill]
    damage(saved(tmp_path / "a", num_depths=1), ill)
    diagnosis = examine(tmp_path / "a")
    assert what in problems(diagnosis)
    assert diagnosis.verdict.startswith(f"{what}: ")
    assert detail in diagnosis.verdict
    assert not diagnosis.has_mtp


@pytest.mark.parametrize("ill", ["miscounted", "head", "trunk shape", "uncompared", "embedding", "head copy"])
def test_what_passes_for_whole_by_its_modules_alone_does_not_load(tmp_path: Path, ill: str):
    saved(tmp_path / "a", num_depths=1)
    load_model(tmp_path / "a")
    damage(tmp_path / "a", ill)
    with pytest.raises(CheckpointError):
        load_model(tmp_path / "a")


def test_a_half_is_named_by_the_order_that_the_checkpoint_states(tmp_path: Path):
    rewrite(saved(tmp_path / "a", concat="hidden_first"), blind_to_the_embedding)
    assert "reads the hidden state is zeros" in examine(tmp_path / "a").verdict


def test_modules_that_are_stored_and_not_declared_are_found(tmp_path: Path):
    folder = saved(tmp_path / "a", num_depths=1)
    table = read_json(folder / "config.json")
    del table["nextn"], table["num_nextn_predict_layers"]
    write_json(folder / "config.json", table)
    assert "MTP undeclared" in problems(examine(folder))
    saved(tmp_path / "b", num_depths=2)
    set_config(tmp_path / "b", num_nextn_predict_layers=1)
    assert examine(tmp_path / "b").verdict.startswith("settings disagree")
    set_config(tmp_path / "b", num_nextn_predict_layers=3)
    assert "MTP lost in part" in problems(examine(tmp_path / "b"))


def test_modules_of_a_scheme_that_only_nextn_runs_can_be_lost_too(tmp_path: Path):
    def drop(state):
        for name in [name for name in state if name.startswith("mtp.")]:
            del state[name]

    rewrite(saved(tmp_path / "a", scheme="parallel", num_depths=2), drop)
    assert examine(tmp_path / "a").verdict.startswith("MTP lost: nextn.mtp: scheme parallel, num_depths = 2")
    rewrite(saved(tmp_path / "b", scheme="parallel", num_depths=2), lambda s: s.pop(next(n for n in s if "mtp." in n)))
    assert problems(examine(tmp_path / "b")) == ["MTP incomplete"]


def test_a_block_copied_from_the_trunk_and_norms_as_initialised_are_warnings(tmp_path: Path):
    def graft(state: dict[str, Tensor]) -> None:
        state.update({n.replace("layers.1.", "layers.2."): t.clone() for n, t in state.items() if "layers.1." in n})

    rewrite(saved(tmp_path / "a"), graft)
    assert warnings(examine(tmp_path / "a")) == ["MTP copies the trunk"]
    shutil.copytree(
        tmp_path / "a", tmp_path / "frozen"
    )  # the smallest matrix alone is the trunk's: a router not trained
    rewrite(
        tmp_path / "frozen", lambda s: s.update({n: t + 1e-3 for n, t in s.items() if is_mtp(n) and "gate." not in n})
    )
    assert warnings(examine(tmp_path / "frozen")) == []
    rewrite(tmp_path / "a", lambda s: s.update({n: t + 1e-3 for n, t in s.items() if is_mtp(n)}))
    assert warnings(examine(tmp_path / "a")) == []
    fresh = {n: torch.ones_like(t) for n, t in load_file(tmp_path / "a" / "model.safetensors").items() if "norm" in n}
    rewrite(tmp_path / "a", lambda s: s.update({n: t for n, t in fresh.items() if is_mtp(n)}))
    diagnosis = examine(tmp_path / "a")
    assert warnings(diagnosis) == ["norms as initialised"]
    assert diagnosis.verdict.endswith("but look at: norms as initialised")


@pytest.mark.parametrize("scheme", ["sequential", "independent"])
def test_norms_as_initialised_are_found_in_one_module_of_two(tmp_path: Path, scheme: str):
    second = "model.layers.3." if scheme == "sequential" else "mtp.layers.1."
    rewrite(
        saved(tmp_path / "a", num_depths=2, scheme=scheme),
        lambda s: s.update({n: torch.ones_like(t) for n, t in s.items() if n.startswith(second) and "norm" in n}),
    )
    found = next(f for f in examine(tmp_path / "a").findings if f.what == "norms as initialised")
    assert found.detail.startswith("every norm of module 1 is exactly 1")
    rewrite(tmp_path / "a", lambda s: s.update({n: t + 0.1 for n, t in s.items() if n.startswith(second)}))
    assert warnings(examine(tmp_path / "a")) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e8m0fnu])
def test_scales_that_are_all_one_power_of_two_are_healthy_and_weights_that_are_one_value_are_not(tmp_path: Path, dtype):
    def quantise(state: dict[str, Tensor]) -> None:
        for name in [name for name in state if "_proj" in name and not name.startswith(EH_PROJ)]:
            rows, columns = (-(-size // 8) for size in state[name].shape)
            state[name] = (state[name] * 2**8).to(torch.float8_e4m3fn)
            state[name + "_scale_inv"] = torch.full((rows, columns), 2.0**-8).to(dtype)

    folder = saved(tmp_path / "a")
    rewrite(folder, quantise)
    set_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [8, 8]})
    assert (problems(examine(folder)), warnings(examine(folder))) == ([], [])
    load_model(folder)
    rewrite(folder, one_value)
    assert problems(examine(folder)) == ["MTP constant"]


def test_settings_that_mean_nothing_are_findings(tmp_path: Path):
    folder = saved(tmp_path / "a")
    own = read_json(folder / "config.json")["nextn"]["mtp"]
    for mtp in ({"scheme": "bogus"}, own | {"scheme": "bogus"}, own | {"scheme": ["bogus"]}):
        set_config(folder, nextn={"mtp": mtp})
        assert examine(folder).verdict.startswith("settings unread: ")
    set_config(folder, nextn={"mtp": own | {"concat": "bogus"}})
    assert warnings(examine(folder)) == ["settings unread"]
    set_config(folder, model_type=["deepseek_v3"])
    assert "model_type should be a name" in examine(folder).verdict
    set_config(folder, model_type="deepseek_v3", nextn={"mtp": own | {"scheme": "parallel", "num_depths": 0}})
    rewrite(folder, drop_mtp)
    set_config(folder, num_nextn_predict_layers=0)
    assert examine(folder).verdict == "no MTP: nextn.mtp: scheme parallel, num_depths = 0, and none is stored"


def test_files_that_cannot_be_read_are_a_verdict(tmp_path: Path):
    folder = saved(tmp_path / "a", max_shard_bytes=30_000)
    shard = sorted(folder.glob("model-*"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    assert "unreadable" in examine(folder).verdict
    assert "truncated" in examine(folder).verdict
    shard.unlink()
    assert "are missing: " + shard.name in examine(folder).verdict
    (folder / "config.json").write_text("{")
    assert "is not JSON" in examine(folder).verdict
    torch.save({}, tmp_path / "model.bin")
    assert "is a pickle file" in examine(tmp_path / "model.bin").verdict
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "config.json").write_text("{}")
    torch.save({}, tmp_path / "p" / "pytorch_model.bin")
    assert "only pickle files" in examine(tmp_path / "p").verdict


def test_what_is_no_checkpoint_is_the_users_error(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    for path, message in (
        (tmp_path / "empty", "neither a checkpoint"),
        (tmp_path / "notes.txt", "is no checkpoint"),
        (tmp_path / "nowhere", "does not exist"),
    ):
        with pytest.raises(CheckpointError, match=message):
            examine(path)


# ---------------------------------------------------------------------------------------------------------- laws alone


def test_quantised_trunks_do_not_make_a_module_incomplete_but_lost_scales_do():
    layer = {"block.mlp.up_proj.qweight": (4, 1), "block.mlp.up_proj.scales": (4, 1), "block.norm.weight": (8,)}
    fusion = {"enorm.weight": (8,), "hnorm.weight": (8,), "eh_proj.weight": (8, 16), "shared_head.norm.weight": (8,)}
    module = fusion | {"block.mlp.up_proj.weight": (4, 8), "block.norm.weight": (8,)}
    assert [f.what for f in invariants.completeness(0, module, {0: layer}, 8)] == ["MTP complete"]
    del module["block.mlp.up_proj.weight"]
    assert [f.what for f in invariants.completeness(0, module, {0: layer}, 8)] == ["MTP incomplete"]
    assert invariants.scales({"a.weight": "F8_E4M3", "a.weight_scale_inv": "F32", "b.weight": "BF16"}) == []
    assert invariants.scales({"a.weight": "F8_E4M3"})[0].what == "MTP scales lost"


def test_statistics_leave_values_that_are_not_finite_out():
    found = TensorStatistics.of(torch.tensor([3.0, -4.0, float("nan"), float("inf"), 0.0, 1e-40]))
    assert (found.num_not_finite, found.smallest, found.largest, found.share_tiny) == (2, -4.0, 3.0, 0.25)
    assert found.rms == pytest.approx(2.5)
    assert TensorStatistics.of(torch.ones(3).to(torch.float8_e4m3fn)).is_constant
    assert TensorStatistics.of(torch.empty(0)).is_zero


def test_zeros_are_usual_in_biases_in_zero_centred_norms_and_in_routers_of_experts_always_on():
    zeros = TensorStatistics.of(torch.zeros(4))
    matrix = TensorStatistics.of(torch.zeros(4, 4))
    assert values.zeroed({"q.bias": zeros, "gate.e_score_correction_bias": zeros}) == []
    assert values.zeroed({"enorm.weight": zeros})[0].severity == "problem"
    assert values.zeroed({"enorm.weight": zeros}, norms_are_zero_centred=True) == []
    assert values.zeroed({"mlp.gate.weight": matrix})[0].severity == "warning"


def test_every_family_is_examined_in_its_own_layout(tmp_path: Path):
    for family in FAMILIES:
        matrix = (
            "block.0.mixer.o_proj.weight" if "nemotron_h" in family.model_types else "block.self_attn.o_proj.weight"
        )
        inside = ["enorm.weight", "hnorm.weight", "eh_proj.weight", matrix]
        inside += ["shared_head.norm.weight"] * (family.head_norm == "own")
        shapes = {"eh_proj.weight": (4, 8), matrix: (4, 4)}
        state = {family.layout.stored_name(0, name, 2): torch.randn(shapes.get(name, (4,))) for name in inside}
        state["model.layers.1.self_attn.o_proj.weight"] = torch.randn(4, 4)
        table = {"model_type": family.model_types[0], "num_hidden_layers": 2, "hidden_size": 4}
        if family.count_key:
            table[family.count_key] = 1
        folder = tmp_path / family.model_types[0]
        folder.mkdir()
        write_json(folder / "config.json", table)
        save_file(state, folder / "model.safetensors")
        diagnosis = examine(folder)
        assert problems(diagnosis) == [], family.name
        assert (diagnosis.num_stored, diagnosis.num_mtp_tensors) == (1, len(inside)), family.name
        assert dict(diagnosis.conventions)["concat"] == family.concat
        projection = family.layout.stored_name(0, "eh_proj.weight", 2)
        rewrite(folder, lambda s, name=projection: s.pop(name))
        assert problems(examine(folder)) == ["MTP incomplete"], family.name


def test_whole_checkpoints_of_every_family_are_healthy_until_a_tensor_goes(tmp_path: Path):
    for kind, released in RELEASED.items():
        (tmp_path / kind).mkdir()
        folder = Reference(released).save(tmp_path / kind)
        diagnosis = examine(folder)
        unlike = ["block unlike the trunk"] * (kind == "nemotron_h")  # whose block is two of the trunk's layers
        assert (problems(diagnosis), warnings(diagnosis)) == ([], unlike), kind
        assert diagnosis.num_stored == released.num_modules
        lost = "eh_proj.weight" if unlike else "o_proj.weight"
        modules = sort_tensors(TensorFiles.open(folder), declared_in_folder(folder)).modules
        names = [name for name in modules[0].values() if name.endswith(lost)]
        rewrite(folder, lambda state, names=names: [state.pop(name) for name in names])
        assert "MTP incomplete" in problems(examine(folder)), kind


def test_the_json_is_stable_and_plain(tmp_path: Path):
    table = examine(saved(tmp_path / "a")).to_table()
    assert list(table) == [
        "path", "kind", "verdict", "is_healthy", "model_type", "num_declared_modules", "num_stored_modules",
        "num_mtp_tensors", "conventions", "findings",
    ]  # fmt: skip
    assert json.loads(json.dumps(table)) == table
    assert all(list(finding) == ["severity", "what", "detail", "how_to_fix"] for finding in table["findings"])


# ------------------------------------------------------------------------------------------------------------- engines


def test_engines_that_cannot_run_the_modules_say_why(tmp_path: Path):
    found = {s.engine: s for s in services(examine(saved(tmp_path / "a", num_depths=2)))}
    assert found["transformers"].runs_mtp
    assert found["transformers"].launch_line
    assert not found["vllm"].runs_mtp
    settings = read_config(read_json(tmp_path / "a" / "config.json"), tmp_path / "a")
    assert list(found["vllm"].reasons) == reasons_against("vllm", *settings) != []
    found = {s.engine: s for s in services(examine(saved(tmp_path / "b", concat="hidden_first")))}
    assert found["transformers"].export.startswith("nextn export")


def test_no_export_is_promised_that_would_fail(tmp_path: Path):
    folder = saved(tmp_path / "a b", replace(TINY, q_lora_rank=8, vocab_size=257))

    def llamacpp():
        return next(service for service in services(examine(folder)) if service.engine == "llamacpp")

    assert (llamacpp().runs_mtp, llamacpp().export) == (False, "")
    assert "no tokenizer.json" in llamacpp().reasons[0]
    (folder / "tokenizer.json").write_text("{}")
    assert (llamacpp().runs_mtp, llamacpp().export) == (False, "")
    ByteTokenizer().save(folder)
    assert llamacpp().runs_mtp
    words = shlex.split(llamacpp().export)
    assert words == ["nextn", "export", str(folder), "--to", "gguf", "--out", f"{folder}.gguf"]
    set_config(folder, quantization_config={"quant_method": "gptq"})
    assert warnings(examine(folder)) == ["weights unread"]
    assert all(
        (one.runs_mtp or False, one.export, one.launch_line) == (False, "", "") for one in services(examine(folder))
    )
    assert "quant_method is 'gptq'" in llamacpp().reasons[0]
    set_config(folder, quantization_config={"quant_method": "fp8"})  # one factor per matrix, which nextn does not read
    rewrite(folder, lambda s: s.update({"lm_head.weight_scale": torch.ones(1)}))
    assert (problems(examine(folder)), warnings(examine(folder))) == ([], ["weights unread"])


def test_a_checkpoint_is_examined_from_inside_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = saved(tmp_path / "a", replace(TINY, q_lora_rank=8, vocab_size=257))
    ByteTokenizer().save(folder)
    (folder / "below").mkdir()
    for place, path in ((folder, "."), (folder / "below", "..")):
        monkeypatch.chdir(place)
        export = next(service.export for service in services(examine(Path(path))) if service.engine == "llamacpp")
        assert export == f"nextn export {path} --to gguf --out {tmp_path / 'a.gguf'}"


# ----------------------------------------------------------------------------------------------------------------- GGUF


def gguf_of(tmp_path: Path, **mtp) -> Path:
    from nextn.interop.gguf import write_gguf

    pytest.importorskip("gguf")
    config = replace(TINY, q_lora_rank=8, vocab_size=257)
    saved(tmp_path / "a", config, **mtp)
    ByteTokenizer().save(tmp_path / "a")
    write_gguf(tmp_path / "a", tmp_path / "a.gguf", "f32")
    return tmp_path / "a.gguf"


def test_a_gguf_file_with_mtp_is_healthy_and_llamacpp_runs_it(tmp_path: Path):
    diagnosis = examine(gguf_of(tmp_path, num_depths=1))
    assert (problems(diagnosis), warnings(diagnosis), diagnosis.has_mtp) == ([], [], True)
    found = {service.engine: service for service in services(diagnosis)}
    assert "--spec-type draft-mtp" in found["llamacpp"].launch_line
    assert found["vllm"].runs_mtp is False


def test_a_gguf_file_without_mtp_says_so_and_a_truncated_one_is_unreadable(tmp_path: Path):
    path = gguf_of(tmp_path, num_depths=0)
    assert examine(path).verdict.startswith("no MTP: neither declared (deepseek2.nextn_predict_layers is absent or 0)")
    path.write_bytes(path.read_bytes()[:-1000])
    assert examine(path).verdict.startswith("unreadable")
    path.write_bytes(b"GGML" + bytes(100))
    assert examine(path).verdict.startswith("unreadable")


class Renamed:
    """A GGUF file some of whose contents are hidden: what a careless converter writes."""

    def __init__(self, path: Path, metadata=None, without: str = "?"):
        from nextn.interop.gguf import GgufFile

        self.file = GgufFile(path)
        self.metadata = self.file.metadata | (metadata or {})
        self.names = tuple(name for name in self.file.names if without not in name)
        self.shape, self.dtype, self.read = self.file.shape, self.file.dtype, self.file.read


def test_a_gguf_file_that_lost_its_mtp_tensors_or_their_declaration_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = gguf_of(tmp_path, num_depths=1)
    cases = (
        ({"without": "blk.2."}, "MTP lost"),
        ({"without": "nextn.eh_proj"}, "MTP incomplete"),
        ({"metadata": {"deepseek2.nextn_predict_layers": 0}}, "MTP undeclared"),
    )
    for changes, what in cases:

        class Careless(Renamed):
            def __init__(self, path: Path, changes=changes):
                super().__init__(path, **changes)

        monkeypatch.setattr("nextn.interop.doctor.examination.GgufFile", Careless)
        assert problems(examine(path)) == [what]


def test_a_part_of_a_split_gguf_file_is_one_shard_and_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = gguf_of(tmp_path, num_depths=1)
    for metadata, without in (({"split.count": 2}, "blk.2."), ({"split.count": 2, "general.architecture": None}, "?")):

        class Part(Renamed):
            def __init__(self, path: Path, metadata=metadata, without=without):
                super().__init__(path, metadata, without)

        monkeypatch.setattr("nextn.interop.doctor.examination.GgufFile", Part)
        diagnosis = examine(path)
        assert problems(diagnosis) == []
        assert diagnosis.verdict.startswith("one shard: one file of several")
        assert all(not service.runs_mtp for service in services(diagnosis))
    monkeypatch.undo()
    part = path.rename(tmp_path / "a-00001-of-00002.gguf")
    assert examine(part).verdict.startswith("one shard: one file of several")
