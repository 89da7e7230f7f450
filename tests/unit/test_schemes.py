"""Every scheme: saved and loaded exactly, shared where it says so, of the size and cost worked out by hand."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nextn.config import ModelConfig, MTPConfig
from nextn.files import atomic_folder
from nextn.model.moe import MixtureOfExperts
from nextn.mtp import SCHEMES, MTPModel, load_model, released, save_model
from nextn.mtp.cost import model_cost

from .test_mtp_laws import TINY, VARIANTS, tokens

TIED = replace(TINY, tie_word_embeddings=True)


def test_every_scheme_is_among_the_variants():
    assert {mtp.scheme for mtp in VARIANTS.values()} == set(SCHEMES)


# ------------------------------------------------------------------------------------------------------------- storage


def saved_and_loaded(model: MTPModel, folder: Path) -> MTPModel:
    with atomic_folder(folder) as temporary:
        save_model(model, temporary)
    return load_model(folder)


@torch.no_grad()
def check_save_perturb_save_load(model: MTPModel, folder: Path) -> None:
    """What comes back is what was saved last: weights, routing biases, logits of every depth."""
    before = saved_and_loaded(model, folder).state_dict()
    for tensor in {id(t): t for t in [*model.parameters(), *model.buffers()]}.values():
        if tensor.is_floating_point():
            tensor.add_(torch.rand_like(tensor))
    model.trunk.rotary = MTPModel(model.config, MTPConfig(num_depths=0)).trunk.rotary  # a constant: never saved
    loaded = saved_and_loaded(model, folder)
    assert (loaded.config, loaded.mtp_config) == (model.config, model.mtp_config)
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), f"{name} came back changed"
        assert not torch.equal(before[name], tensor), f"{name} was not perturbed"
    pairs = zip(loaded(tokens(2, 9)).logits_per_depth, model.eval()(tokens(2, 9)).logits_per_depth, strict=True)
    assert all(torch.equal(theirs, ours) for theirs, ours in pairs), "logits came back changed"


@pytest.mark.parametrize("config", [TINY, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_save_perturb_save_load_is_exact(tmp_path: Path, variant: str, config: ModelConfig):
    model = MTPModel(config, VARIANTS[variant]).initialize(seed=1)
    check_save_perturb_save_load(model, tmp_path / "a")
    table = json.loads((tmp_path / "a" / "config.json").read_text())
    released = {"untied": 3, "shared weights": 1, "other conventions": 3, "dense": 3}
    assert table["num_nextn_predict_layers"] == released.get(variant, 0), "engines serve the sequential scheme only"


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_tensor_that_is_not_written_anew_or_comes_back_wrong_is_caught(tmp_path: Path, monkeypatch, variant: str):
    right_write, right_read = released.to_released_names, released.from_released_names
    first: dict[str, Tensor] = {}

    def writes_the_first_norm(state, *arguments):
        released = right_write(state, *arguments)
        first.setdefault("norm", released["model.norm.weight"].clone())
        return released | {"model.norm.weight": first["norm"]}

    def reads_up_before_gate(*arguments):
        state = right_read(*arguments)
        return {name: t.flip(1) if name.endswith("gate_up_proj") else t for name, t in state.items()}

    for name, broken in (("to_released_names", writes_the_first_norm), ("from_released_names", reads_up_before_gate)):
        monkeypatch.setattr(released, name, broken)
        with pytest.raises(AssertionError, match="came back changed"):
            check_save_perturb_save_load(MTPModel(TINY, VARIANTS[variant]).initialize(seed=1), tmp_path / name)
        monkeypatch.undo()


def check_sharing(model: MTPModel) -> None:
    """Embedding, head and shared modules are one storage each, wherever a depth uses them."""
    trunk, scheme, mtp = model.trunk, model.scheme, model.mtp_config
    embedding, head = trunk.model.embed_tokens.weight.data_ptr(), trunk.output_head.weight.data_ptr()
    assert (embedding == head) == model.config.tie_word_embeddings, "tied embeddings"
    heads = [scheme.head(trunk, depth).weight.data_ptr() for depth in (1, 2, 3)]
    if mtp.scheme == "shared_module":
        assert len({head, *heads}) == 4, "a head of its own for each depth"
    else:
        assert {head} == set(heads), "every depth has the trunk's head"
    storages = [parameter.data_ptr() for parameter in model.parameters()]
    assert len(storages) == len(set(storages)), "two parameters in one storage"
    num_copies = {"shared_module": mtp.num_layers, "sequential": 1 if mtp.share_weights else 3}.get(mtp.scheme, 3)
    attentions = [p for name, p in scheme.named_parameters() if name.endswith("o_proj.weight")]
    assert len({attention.data_ptr() for attention in attentions}) == num_copies, "blocks of the scheme"
    if mtp.share_weights:
        modules = [scheme.module_at(depth).eh_proj.weight.data_ptr() for depth in (1, 2, 3, 7)]
        assert len(set(modules)) == 1, "one module at every depth"


@pytest.mark.parametrize("config", [TINY, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_shared_stays_one_storage_when_loaded_copied_or_cast(tmp_path: Path, variant: str, config: ModelConfig):
    model = MTPModel(config, VARIANTS[variant]).initialize(seed=1)
    check_sharing(model)
    loaded = saved_and_loaded(model, tmp_path / "a")
    for other in (loaded, load_model(tmp_path / "a", dtype="bfloat16"), copy.deepcopy(model)):
        check_sharing(other)
        assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in other.parameters()}
    check_sharing(model.to(torch.bfloat16))
    if config.tie_word_embeddings:
        model.trunk.lm_head.weight = torch.nn.Parameter(model.trunk.lm_head.weight.clone())
        with pytest.raises(AssertionError, match="tied embeddings"):
            check_sharing(model)


# -------------------------------------------------------------------------------------------------------- size and cost


def block_weights(config: ModelConfig, dense: bool, active: bool) -> int:
    """Weights of one layer's matrices, of all experts or of those that a token uses."""
    width, heads = config.hidden_size, config.num_attention_heads
    attention = width * heads * config.qk_head_dim + width * (config.kv_lora_rank + config.qk_rope_head_dim)
    attention += config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    attention += heads * config.v_head_dim * width
    if dense:
        return attention + 3 * width * config.intermediate_size
    num_experts = config.n_shared_experts + (config.num_experts_per_tok if active else config.n_routed_experts)
    return attention + 3 * width * config.moe_intermediate_size * num_experts + width * config.n_routed_experts


def parameters_by_hand(config: ModelConfig, mtp: MTPConfig) -> int:
    width, depths = config.hidden_size, mtp.num_depths
    block = block_weights(config, mtp.dense_blocks, active=False) + 2 * width + config.kv_lora_rank  # and its norms
    own_norm = width if mtp.head_norm == "own" else 0
    fusion = 2 * width + 2 * width * width + block + own_norm  # enorm and hnorm, eh_proj
    heads = depths * (width * config.vocab_size + config.vocab_size)
    return {
        "sequential": (1 if mtp.share_weights else depths) * fusion,
        "independent": depths * fusion,
        "parallel": depths * (block + own_norm),
        "shared_module": mtp.num_layers * block + (own_norm if mtp.num_layers else 0) + heads,
    }[mtp.scheme]


def flops_by_hand(config: ModelConfig, mtp: MTPConfig, length: int) -> float:
    """Of all depths, summed over the T - k positions of each, per token of a row."""
    per_key = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    block = 2 * (block_weights(config, mtp.dense_blocks, active=True) + per_key * (length + 1) / 2)
    head, eh_proj = 2 * config.hidden_size * config.vocab_size, 4 * config.hidden_size**2
    total = 0.0
    for depth in range(1, mtp.num_depths + 1):
        of_depth = {
            "parallel": head + block,
            "shared_module": head + (mtp.num_layers * block if depth == 1 else 0),
        }.get(mtp.scheme, head + block + eh_proj)
        total += of_depth * (length - depth) / length
    return total


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_and_flops_are_those_worked_out_by_hand(variant: str):
    mtp = VARIANTS[variant]
    cost = model_cost(MTPModel(TINY, mtp), 32)
    assert cost.num_mtp_parameters == parameters_by_hand(TINY, mtp)
    assert cost.mtp_flops_per_token == pytest.approx(flops_by_hand(TINY, mtp, 32))
    another_depth = flops_by_hand(TINY, replace(mtp, num_depths=4), 32)
    assert cost.mtp_flops_per_token != pytest.approx(another_depth), "a depth more must be noticed"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_dense_blocks_have_no_experts_where_the_trunk_has(scheme: str):
    def num_moe(module: torch.nn.Module) -> int:
        return sum(isinstance(child, MixtureOfExperts) for child in module.modules())

    with_experts = MTPModel(TINY, MTPConfig(scheme, num_depths=2))
    dense = MTPModel(TINY, MTPConfig(scheme, num_depths=2, dense_blocks=True))
    assert (num_moe(with_experts.scheme), num_moe(dense.scheme)) == (1 if scheme == "shared_module" else 2, 0)
    assert num_moe(dense.trunk) == num_moe(with_experts.trunk) == 1


# ----------------------------------------------------------------------------------------------------- identical depths


def with_identical_depths(variant: str) -> MTPModel:
    """Every depth of its own is a copy of the first."""
    model = MTPModel(TINY, VARIANTS[variant]).initialize(seed=1).double().eval()
    state = model.state_dict()
    per_depth = "scheme.heads." if model.mtp_config.scheme == "shared_module" else "scheme.layers."
    for name in [name for name in state if name.startswith(f"{per_depth}0.")]:
        for depth in (1, 2):
            state[name.replace(f"{per_depth}0.", f"{per_depth}{depth}.")] = state[name]
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("variant", ["parallel", "shared module", "heads alone"])
def test_identical_depths_that_embed_no_token_predict_the_same_at_the_same_position(variant: str):
    logits = with_identical_depths(variant)(tokens(2, 12)).logits_per_depth
    for depth in (2, 3):
        torch.testing.assert_close(logits[depth], logits[1][:, : 12 - depth])
    own = MTPModel(TINY, VARIANTS[variant]).initialize(seed=1).double()(tokens(2, 12)).logits_per_depth
    assert not torch.allclose(own[2], own[1][:, :10]), "depths of their own must differ"


def test_a_chain_of_identical_modules_is_the_chain_of_one_shared_module():
    shared = MTPModel(TINY, VARIANTS["shared weights"]).initialize(seed=1).double()
    copies = MTPModel(TINY, VARIANTS["untied"]).double()
    copies.load_state_dict({name: shared.state_dict()[_of_first_module(name)] for name in copies.state_dict()})
    losses = []
    for model in (shared, copies):
        out = model.train()(tokens(2, 12))
        out.loss.backward()
        losses.append(out.loss_per_depth)
    assert torch.equal(*losses)
    gradients = dict(copies.named_parameters())
    for name, parameter in shared.scheme.named_parameters():
        parts = [gradients[f"scheme.{name}".replace("layers.0.", f"layers.{i}.")].grad for i in range(3)]
        torch.testing.assert_close(parameter.grad, torch.stack(parts).sum(0), rtol=1e-5, atol=1e-9)


def _of_first_module(name: str) -> str:
    return re.sub(r"scheme\.layers\.\d", "scheme.layers.0", name)
