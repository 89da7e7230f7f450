"""What is counted, stepped, computed again and compiled of transformers' trunks, against what really runs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    Gemma3TextConfig,
    Glm4MoeConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from nextn.config import DetachConfig, MTPConfig, OptimizerConfig
from nextn.errors import ConfigError
from nextn.interop import layer_cost
from nextn.interop.adapter import TransformersTrunk
from nextn.mtp import MTPModel
from nextn.mtp.cost import model_cost, step_flops
from nextn.objective import StepObjective
from nextn.training.optimizer import TrainingOptimizer, parameter_roles

TOLERANCE = 0.02
SHAPE = {
    **{"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": None},
    "eos_token_id": None,
}
EXPERTS = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
    "mistral, a window": MistralConfig(**SHAPE, head_dim=8, sliding_window=5),
    "gemma3, two kinds": Gemma3TextConfig(**SHAPE, head_dim=8, query_pre_attn_scalar=8, sliding_window=5),
    "qwen3_moe": Qwen3MoeConfig(**SHAPE, **EXPERTS, head_dim=8, num_experts=4),
    "glm4_moe": Glm4MoeConfig(**SHAPE, **EXPERTS, head_dim=8, n_routed_experts=4, first_k_dense_replace=1),
}


def pair_by_pair(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, **_):
    """Attention that multiplies what the mask admits and nothing else."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    rows = []
    for position in range(query.shape[2]):
        seen = mask[0, 0, position] == 0
        scores = query[:, :, position : position + 1] @ key[:, :, seen].transpose(2, 3) * scaling
        rows.append(scores.softmax(-1) @ value[:, :, seen])
    return torch.cat(rows, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register("pair_by_pair", pair_by_pair)


def trunk_of(name: str) -> TransformersTrunk:
    torch.manual_seed(0)
    hf_model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), experts_implementation="eager")
    return TransformersTrunk(hf_model)


def model_of(name: str, num_depths: int) -> MTPModel:
    trunk = trunk_of(name)
    trunk.config._attn_implementation = "pair_by_pair"  # of the modules' blocks too, which are built from it
    return MTPModel(None, MTPConfig(num_depths=num_depths), trunk).initialize_modules(1).train()


def counted(model: MTPModel, active: tuple[int, ...], detach: DetachConfig) -> float:
    """FLOPs per token of the products that a step really runs."""
    weights = tuple(0.3 if depth in active else 0.0 for depth in range(1, model.num_depths + 1))
    ids = torch.randint(61, (2, 14), generator=torch.Generator().manual_seed(0))
    mapping = {torch.ops.aten.addmm_: lambda _, left, right, **__: 2 * left[0] * left[1] * right[1]}
    with FlopCounterMode(display=False, custom_mapping=mapping) as products:
        objective = StepObjective(weights, detach=detach, chunk_size=16)
        model(ids, objective=objective).loss.backward()
    return products.get_total_flops() / ids.numel()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("active", [(), (1,), (1, 2)], ids=str)
def test_a_step_takes_the_flops_that_a_counter_sees(name: str, active: tuple[int, ...]):
    model = model_of(name, 2)
    assert step_flops(model, 14, active) == pytest.approx(counted(model, active, DetachConfig()), rel=TOLERANCE)


def test_a_frozen_trunk_takes_its_forward_pass_alone():
    model = model_of("llama", 2)
    model.trunk.requires_grad_(False)
    assert step_flops(model, 14, (1, 2)) == pytest.approx(counted(model, (1, 2), DetachConfig()), rel=TOLERANCE)


def test_low_rank_factors_take_no_gradients_of_the_weights_beside_them():
    pytest.importorskip("peft")
    from nextn.config import LoraConfig
    from nextn.interop.lora import add_factors

    model = model_of("llama", 1)
    add_factors(model, LoraConfig(rank=1), 0)
    assert step_flops(model, 14, (1,)) == pytest.approx(counted(model, (1,), DetachConfig()), rel=0.05)


@pytest.mark.parametrize("break_it", ["every expert", "no pairs"])
def test_a_wrong_count_is_caught(break_it: str, monkeypatch: pytest.MonkeyPatch):
    model = model_of("qwen3_moe", 1)
    right = counted(model, (1,), DetachConfig())
    if break_it == "every expert":
        monkeypatch.setattr(layer_cost, "chosen_share", lambda config: 1.0)
    else:
        monkeypatch.setattr(layer_cost, "_pairs", lambda *_: 0.0)
    assert step_flops(model, 14, (1,)) != pytest.approx(right, rel=TOLERANCE)


def test_parameters_are_split_by_owner_and_use():
    model = model_of("qwen3_moe", 1)
    cost = model_cost(model, 14)
    per_expert = 3 * 32 * 24
    assert cost.num_mtp_parameters == sum(p.numel() for p in model.scheme.parameters())
    assert cost.num_active_parameters == cost.num_parameters - cost.num_mtp_parameters - 3 * 2 * per_expert


# -------------------------------------------------------------------------------------------------------------- roles


def test_roles_follow_what_a_weight_is():
    roles = parameter_roles(MTPModel(None, MTPConfig(num_depths=1), trunk_of("qwen3_moe")))
    expected = {
        "trunk.model.model.embed_tokens.weight": "embedding",
        "trunk.model.lm_head.weight": "embedding",
        "trunk.model.model.layers.0.mlp.gate.weight": "router",
        "trunk.model.model.layers.0.mlp.experts.gate_up_proj": "matrix",
        "trunk.model.model.layers.0.self_attn.q_norm.weight": "vector",
        "trunk.model.model.layers.0.self_attn.q_proj.weight": "matrix",
        "scheme.layers.0.eh_proj.weight": "matrix",
    }
    assert {name: roles[name] for name in expected} == expected


def test_gpt2s_tables_are_no_hidden_matrices_and_its_transposed_linear_layers_are():
    roles = parameter_roles(GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=1, n_head=2, n_positions=32)))
    assert roles["transformer.wte.weight"] == roles["transformer.wpe.weight"] == "embedding"
    assert roles["transformer.h.0.attn.c_attn.weight"] == roles["transformer.h.0.mlp.c_proj.weight"] == "matrix"


def test_gpt2_is_refused_with_the_parts_that_it_lacks():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=1, n_head=2, n_positions=32))
    with pytest.raises(ConfigError, match=r"GPT2LMHeadModel has no `layers` and no final norm.*no trunk"):
        TransformersTrunk(model)


def test_low_rank_factors_and_gates_of_one_row_never_go_to_muon():
    pytest.importorskip("peft")
    from nextn.config import LoraConfig
    from nextn.interop.lora import add_factors

    model = MTPModel(None, MTPConfig(num_depths=1), trunk_of("qwen3")).initialize_modules(1)
    add_factors(model, LoraConfig(rank=2), 0)
    roles = parameter_roles(model)
    assert {role for name, role in roles.items() if ".lora_" in name} == {"factor"}
    optimizer = TrainingOptimizer(model, OptimizerConfig(name="muon"), 4)
    assert set(optimizer.parameters) == {n for n in roles if ".lora_" in n or n.startswith("scheme.")}
    stepped = {name for group in optimizer._peaks[1][0].param_groups for p in group["params"]
               for name, q in model.named_parameters() if q is p}  # fmt: skip
    assert stepped
    assert not any(".lora_" in name for name in stepped)
    assert parameter_roles(nn.ModuleDict({"shared_expert_gate": nn.Linear(8, 1, bias=False)})) == {
        "shared_expert_gate.weight": "router"
    }


# ------------------------------------------------------------------------------------------ recomputed and compiled


@pytest.mark.parametrize("name", ["llama", "gemma3, two kinds", "qwen3_moe"])
def test_layers_computed_again_give_the_same_gradients_and_keep_less(name: str):
    ids = torch.randint(61, (2, 14), generator=torch.Generator().manual_seed(0))
    kept, gradients = {}, {}
    for recompute in (False, True):
        model = MTPModel(None, MTPConfig(num_depths=2), trunk_of(name)).initialize_modules(1).train()
        if recompute:
            model.recompute_layers()
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            model(ids).loss.backward()
        kept[recompute] = sum(sizes)
        gradients[recompute] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients[True].keys() == gradients[False].keys()
    for parameter, gradient in gradients[False].items():
        torch.testing.assert_close(gradients[True][parameter], gradient)


@pytest.mark.slow
def test_compiled_layers_of_another_trunk_give_the_same_losses():
    ids = torch.randint(61, (2, 14), generator=torch.Generator().manual_seed(0))
    losses = []
    for compiled in (False, True):
        model = MTPModel(None, MTPConfig(num_depths=1), trunk_of("llama")).initialize_modules(1).train()
        if compiled:
            model.compile_layers()
        output = model(ids)
        output.loss.backward()
        losses.append((output.loss.item(), model.scheme.layers[0].eh_proj.weight.grad.norm().item()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
