"""Runs that start from somebody else's trunk: what is trained changes, what is not stays, and a kill loses nothing.

As a program (`python -m tests.e2e.test_loaded_trunks TRUNK TRAIN RUN_FOLDER`) this file trains such a run, or goes on
with it.
"""

from __future__ import annotations

import dataclasses
import io
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3_5TextConfig

import nextn
from nextn.config import (
    DataConfig,
    EvaluationConfig,
    LoraConfig,
    ModelConfig,
    MTPConfig,
    OptimizerConfig,
    Recipe,
    TrainingConfig,
    TrunkConfig,
)
from nextn.data import ByteTokenizer
from nextn.errors import CheckpointError, ConfigError
from nextn.files import atomic_folder, list_checkpoints
from nextn.interop.export import export_model
from nextn.interop.start import load_start, start
from nextn.mtp import MTPModel, save_model
from nextn.training import Trainer, TrainingResult, check_run_folder, read_metrics
from tests.e2e import tiny_run
from tests.e2e.test_resume_after_kill import without_times
from tests.parity.released_families import FAMILIES, Reference

torch.set_num_threads(1)
REPOSITORY = Path(__file__).parents[2]
SHAPE = {
    **{"vocab_size": 257, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": 256},
    "pad_token_id": None,
}
LINEAR = {
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    **{"head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
}
TRUNKS = {"llama": LlamaConfig(**SHAPE), "qwen3_5": Qwen3_5TextConfig(**SHAPE | LINEAR)}
TRAINING = TrainingConfig(
    num_steps=24, batch_size=4, device="cpu", precision="float32", log_every=1, evaluate_every=6, checkpoint_every=3
)
RECIPE = Recipe(
    mtp=MTPConfig(num_depths=2, share_weights=True),
    data=DataConfig(sequence_length=32, validation_share=0.3),
    optimizer=OptimizerConfig(learning_rate=3e-3, num_warmup_steps=2),
    training=TRAINING,
    evaluation=EvaluationConfig(num_rows=4, num_prompts=0),
)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with trunks that know bytes, and a small corpus."""
    folder = tmp_path_factory.mktemp("here")
    for kind, config in TRUNKS.items():
        torch.manual_seed(3)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / kind)
        ByteTokenizer().save(folder / kind)
        (folder / kind / "chat_template.jinja").write_text("{{ messages }}")
    own = MTPModel(dataclasses.replace(tiny_run.RECIPE.model, vocab_size=257), MTPConfig(num_depths=0)).initialize(3)
    own.tokenizer = ByteTokenizer()
    with atomic_folder(folder / "own") as temporary:
        save_model(own, temporary)
    (folder / "corpus").mkdir()
    for number in range(12):
        lines = (f"line {line} of file {number}: {'abc' * (line % 7)}" for line in range(40))
        (folder / "corpus" / f"{number}.txt").write_text("\n".join(lines))
    return folder


def recipe_of(here: Path, trunk: str | Path, train: str, **tables: object) -> Recipe:
    isolate = trunk != "qwen3_5"  # its state passes from one document to the next
    data = dataclasses.replace(RECIPE.data, corpus=str(here / "corpus"), isolate_documents=isolate)
    settings = TrunkConfig(
        from_=str(here / trunk), train=train, lora=LoraConfig(rank=2) if train == "lora" else LoraConfig()
    )
    return dataclasses.replace(RECIPE, **{"data": data, "trunk": settings, **tables})


def trained(recipe: Recipe, run_folder: Path) -> TrainingResult:
    """Start the run, or go on with it."""
    resume = (run_folder / "recipe.json").exists()
    check_run_folder(run_folder, recipe, resume=resume)
    recipe, model, data = start(recipe, run_folder)
    trainer = Trainer(
        recipe, model, data.train, data.validation, run_folder,
        evaluate=None, provenance={}, console=Console(file=io.StringIO()),
    )  # fmt: skip
    return trainer.train(resume=resume)


def state_of(folder: Path) -> dict[str, Tensor]:
    return nextn.load(folder).state_dict()


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


@pytest.mark.parametrize("train", ["all", "none", "lora"])
def test_what_is_trained_changes_and_nothing_else(here: Path, tmp_path: Path, train: str):
    result = trained(recipe_of(here, "llama", train), tmp_path / "run")
    before, after = state_of(here / "llama"), state_of(result.checkpoint)
    moved = changed(before, after)
    if train == "none":
        assert moved == set()
    elif train == "all":
        assert moved == set(before)
    else:
        assert moved == {name for name in before if "_proj." in name}, "the linear layers, merged with their factors"
    model = nextn.load(tmp_path / "run")
    assert (model.num_depths, model.mtp_config) == (2, RECIPE.mtp)
    losses = [line["loss_per_depth"][2] for line in read_metrics(result.metrics) if line["kind"] == "evaluation"]
    assert losses[-1] < losses[0] - 0.1, "the modules learn"


@pytest.mark.parametrize("train", ["none", "lora"])
def test_a_trunk_that_is_not_trained_is_written_once(here: Path, tmp_path: Path, train: str):
    result = trained(recipe_of(here, "llama", train), tmp_path / "run")
    assert not list(result.checkpoint.glob("*.safetensors"))
    assert (result.checkpoint / "mtp" / "model.safetensors").exists()
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "trunk").state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(here / "llama").state_dict()
    assert alone.keys() == theirs.keys()
    assert not changed(theirs, alone)


@pytest.mark.parametrize("train", ["all", "none", "lora"])
def test_nextns_own_trunk_is_a_trunk_like_any_other(here: Path, tmp_path: Path, train: str):
    recipe = recipe_of(here, "own", train)
    result = trained(recipe, tmp_path / "run")
    before, after = state_of(here / "own"), state_of(result.checkpoint)
    moved = changed(before, after)
    if train == "none":
        assert moved == set()
    elif train == "lora":
        assert moved
        assert {name for name in moved if "_proj" not in name or ".experts." in name or "kv_b_proj" in name} == set()
    export_model(tmp_path / "run", "hf", tmp_path / "whole")
    assert not changed(after, state_of(tmp_path / "whole"))
    texts = [
        nextn.generate(nextn.load(tmp_path / "whole"), ["line"], max_new_tokens=16, draft_length=n).token_ids
        for n in (0, 2)
    ]
    assert texts[0] == texts[1]


def test_a_frozen_trunk_is_not_balanced_either(here: Path, tmp_path: Path):
    recipe = recipe_of(here, "own", "none")
    recipe, model, data = start(recipe, tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = Trainer(recipe, model, data.train, data.validation, tmp_path, evaluate=None, provenance={})
    trainer.step()
    moved = changed(before, model.state_dict())
    assert all(name.startswith("scheme.") for name in moved)
    assert any("e_score_correction_bias" in name for name in moved), "the modules' own experts are"


def test_the_checkpoint_of_a_frozen_trunk_is_written_whole_again(here: Path, tmp_path: Path):
    trained(recipe_of(here, "llama", "none"), tmp_path / "run")
    export_model(tmp_path / "run", "hf", tmp_path / "whole")
    first, second = state_of(tmp_path / "run"), state_of(tmp_path / "whole")
    assert first.keys() == second.keys()
    assert not changed(first, second)
    assert (tmp_path / "whole" / "chat_template.jinja").exists()
    AutoModelForCausalLM.from_pretrained(tmp_path / "whole")


def test_low_rank_factors_are_read_by_peft_on_the_trunk_that_was_loaded(here: Path, tmp_path: Path):
    peft = pytest.importorskip("peft")
    result = trained(recipe_of(here, "llama", "lora"), tmp_path / "run")
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(here / "llama"), result.checkpoint / "adapter"
    )
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        ours = nextn.load(result.checkpoint)(ids).logits
        torch.testing.assert_close(theirs(ids, attention_mask=torch.ones_like(ids)).logits, ours, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------- kill and resume


KILLED = [
    ("llama", "none"),
    ("qwen3_5", "none"),
    pytest.param("llama", "lora", marks=pytest.mark.slow),
    pytest.param("llama", "all", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("trunk", "train"), KILLED)
def test_a_killed_run_goes_on_bit_for_bit(here: Path, tmp_path: Path, trunk: str, train: str):
    recipe = recipe_of(here, trunk, train)
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "tests.e2e.test_loaded_trunks", str(here), trunk, train, str(killed)]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    deadline = time.monotonic() + 240
    while not list_checkpoints(killed) and process.poll() is None:
        assert time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.01)
    process.kill()
    _, errors = process.communicate()
    assert process.returncode == -9, errors.decode()
    resumed, whole = trained(recipe, killed), trained(recipe, tmp_path / "whole")
    assert without_times(resumed.metrics) == without_times(whole.metrics)
    assert not changed(state_of(whole.checkpoint), state_of(resumed.checkpoint))


def test_a_run_whose_source_has_vanished_goes_on_from_its_own_folder(here: Path, tmp_path: Path):
    source = tmp_path / "source"
    shutil.copytree(here / "llama", source)
    recipe = recipe_of(here, source, "none")
    whole = trained(recipe, tmp_path / "whole")
    cut = list_checkpoints(tmp_path / "whole")
    (source / "model.safetensors").unlink()
    shutil.rmtree(cut[-1])
    again = trained(recipe, tmp_path / "whole")
    assert without_times(again.metrics) == without_times(whole.metrics)


# ------------------------------------------------------------------------------------------------ modules of the folder


def test_modules_of_the_folder_are_kept_and_trained_on(here: Path, tmp_path: Path):
    first = trained(recipe_of(here, "llama", "none"), tmp_path / "first")
    recipe = recipe_of(here, first.checkpoint, "none", mtp=MTPConfig())
    resolved, model, _ = start(recipe, tmp_path / "second")
    assert resolved.mtp == RECIPE.mtp
    assert not changed(state_of(first.checkpoint), model.state_dict())
    deeper, model, _ = start(
        recipe_of(here, first.checkpoint, "none", mtp=dataclasses.replace(RECIPE.mtp, num_depths=4)), tmp_path
    )
    assert model.num_depths == deeper.mtp.num_depths == 4
    assert not changed(state_of(first.checkpoint), model.state_dict()), "one module serves any number of depths"


def test_released_modules_are_trained_and_written_back_under_their_names(tmp_path: Path):
    folder = Reference(FAMILIES["qwen3_5_text"]).save(tmp_path / "theirs")
    recipe = dataclasses.replace(RECIPE, mtp=MTPConfig(), trunk=TrunkConfig(from_=str(folder), train="all"))
    resolved, model = load_start(recipe)
    assert resolved.mtp.num_depths == 1
    with atomic_folder(tmp_path / "ours") as out:
        save_model(model, out)
    assert nextn.load(tmp_path / "ours").mtp_config == resolved.mtp
    assert not (tmp_path / "ours" / "mtp").exists()


def test_initialising_modules_never_touches_the_trunk(here: Path):
    loaded = nextn.load(here / "llama")
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    model = loaded.with_modules(MTPConfig(num_depths=2)).initialize_modules(5)
    assert not changed(before, model.state_dict())
    again = loaded.with_modules(MTPConfig(num_depths=2)).initialize_modules(5)
    assert not changed(model.state_dict(), again.state_dict()), "the same seed gives the same modules"
    other = loaded.with_modules(MTPConfig(num_depths=2)).initialize_modules(6)
    assert changed(model.state_dict(), other.state_dict())


REFUSED = {
    "other modules": ({"mtp": MTPConfig(scheme="independent", num_depths=2)}, "auto", r"of another kind.*scheme"),
    "no modules to keep": ({}, "keep", r"has no MTP modules"),
    "a tokenizer of its own": ({"data": {"tokenizer": "bpe:300"}}, "auto", r"has a tokenizer of its own"),
    "rows too long": ({"data": {"sequence_length": 500}}, "auto", r"length = 500 exceeds the context of .* = 128"),
    "packed documents": ({"data": {"isolate_documents": True}}, "auto", r"recurrent layers.*isolate_documents = false"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused_before_the_first_step(here: Path, tmp_path: Path, what: str):
    tables, modules, found = REFUSED[what]
    trunk: str | Path = "qwen3_5" if what == "packed documents" else "llama"
    if what == "other modules":
        trunk = trained(recipe_of(here, "llama", "none"), tmp_path / "first").checkpoint
    recipe = recipe_of(here, trunk, "none", **{key: value for key, value in tables.items() if key != "data"})
    recipe = dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, **tables.get("data", {})),
        trunk=dataclasses.replace(recipe.trunk, modules=modules),
    )
    with pytest.raises(ConfigError, match=found):
        trained(recipe, tmp_path / "run")
    assert not list_checkpoints(tmp_path / "run")


def with_a_shape() -> Recipe:
    return Recipe(model=ModelConfig(hidden_size=64), trunk=TrunkConfig(from_="x"))


def with_nothing_to_train() -> Recipe:
    return Recipe(mtp=MTPConfig(num_depths=0), trunk=TrunkConfig(from_="x", train="none"))


SETTINGS_REFUSED = {
    "nothing to train": (with_nothing_to_train, "nothing to train"),
    "a shape beside a folder": (with_a_shape, r"\[model\] describes a fresh trunk"),
    "frozen and fresh": (lambda: TrunkConfig(train="none"), r"trunk\.train = 'none' is about a trunk that is loaded"),
    "factors nobody trains": (lambda: TrunkConfig(from_="x", lora=LoraConfig(rank=4)), r"trunk\.lora has no effect"),
    "rank 0": (lambda: LoraConfig(rank=0), r"trunk\.lora\.rank must be at least 1"),
}


@pytest.mark.parametrize("what", SETTINGS_REFUSED)
def test_settings_that_contradict_each_other_are_refused(what: str):
    make, found = SETTINGS_REFUSED[what]
    with pytest.raises(ConfigError, match=found):
        make()


def test_a_checkpoint_torn_from_its_run_says_where_its_trunk_was(here: Path, tmp_path: Path):
    result = trained(recipe_of(here, "llama", "none"), tmp_path / "run")
    shutil.copytree(result.checkpoint, tmp_path / "alone")
    with pytest.raises(CheckpointError, match=r"the trunk lies in \.\./\.\./trunk, which is not there"):
        nextn.load(tmp_path / "alone")


def test_a_missing_folder_is_named(here: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"trunk\.from = .*nowhere.* does not exist"):
        trained(recipe_of(here, "nowhere", "none"), tmp_path / "run")


def test_decoding_after_training_is_that_of_plain_decoding(here: Path, tmp_path: Path):
    trained(recipe_of(here, "llama", "lora"), tmp_path / "run")
    model: MTPModel = nextn.load(tmp_path / "run")
    texts = [nextn.generate(model, ["line 3 of"], max_new_tokens=32, draft_length=n).token_ids for n in (0, 3)]
    assert texts[0] == texts[1]


if __name__ == "__main__":
    here_, trunk_, train_, folder_ = sys.argv[1:]
    trained(recipe_of(Path(here_), trunk_, train_), Path(folder_))
