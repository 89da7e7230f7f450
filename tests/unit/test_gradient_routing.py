"""Where the gradients of the MTP losses stop, switch by switch: exactly there, nowhere else, and values do not move."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nextn.config import DetachConfig, MTPConfig
from nextn.errors import ConfigError
from nextn.mtp import SCHEMES, MTPModel, check_scheme
from nextn.objective import BatchTotals, HeadInput, StepObjective

from .test_mtp_laws import TINY, tokens

SWITCHES = ("trunk", "embedding", "head", "between_depths")
NORM, EMBEDDING, HEAD = "trunk.model.norm.weight", "trunk.model.embed_tokens.weight", "trunk.lm_head.weight"
VARIANTS = {
    "sequential": MTPConfig(num_depths=2),
    "sequential, shared head norm": MTPConfig(num_depths=2, head_norm="shared"),
    "sequential, pre norm": MTPConfig(num_depths=2, trunk_hidden="pre_norm", carry="pre_norm", head_norm="shared"),
    "sequential, shared weights": MTPConfig(num_depths=2, share_weights=True),
    "independent": MTPConfig("independent", num_depths=2),
    "independent, shared head norm": MTPConfig("independent", num_depths=2, head_norm="shared"),
    "parallel": MTPConfig("parallel", num_depths=2, trunk_hidden="pre_norm"),
    "parallel, shared head norm": MTPConfig("parallel", num_depths=2, head_norm="shared"),
    "shared module": MTPConfig("shared_module", num_depths=2, num_layers=2),
    "shared module, shared head norm": MTPConfig("shared_module", num_depths=2, num_layers=2, head_norm="shared"),
    "heads alone": MTPConfig("shared_module", num_depths=2, num_layers=0),
}


def has_effect(mtp: MTPConfig, switch: str) -> bool:
    """Whether there is anything that the switch could cut; all heads of the shared module are its own."""
    scheme = SCHEMES[mtp.scheme]
    uses_trunk_head = mtp.scheme != "shared_module" or (mtp.head_norm == "shared" and mtp.num_layers > 0)
    effects = {"embedding": scheme.embeds_tokens, "head": uses_trunk_head, "between_depths": scheme.is_chain}
    return effects.get(switch, True)


CASES = [(name, switch) for name, mtp in VARIANTS.items() for switch in SWITCHES if has_effect(mtp, switch)]


def is_cut(mtp: MTPConfig, switch: str, name: str) -> bool:
    """Whether no gradient of any MTP loss may reach the parameter: embedding and norm have other ways to some."""
    norm_is_a_head_norm = mtp.head_norm == "shared" and (mtp.scheme != "shared_module" or mtp.num_layers > 0)
    norm_makes_h0 = mtp.trunk_hidden == "post_norm" or (mtp.scheme == "shared_module" and mtp.num_layers == 0)
    if switch == "trunk":
        if name == EMBEDDING:
            return not SCHEMES[mtp.scheme].embeds_tokens
        return name.startswith("trunk.model.layers.") or (name == NORM and not norm_is_a_head_norm)
    if switch == "head":
        return name == HEAD or (name == NORM and not norm_makes_h0)
    return False


def model_of(variant: str) -> MTPModel:
    return MTPModel(TINY, VARIANTS[variant]).initialize(seed=1).double().train()


def losses_and_gradients(
    model: MTPModel, detach: DetachConfig, depths: tuple[int, ...] = (1, 2), chunk_size: int | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """All losses, and the gradients of those of some depths alone: the others are divided by infinity."""
    denominators = torch.tensor([16.0 if depth in depths else float("inf") for depth in range(3)])
    objective = StepObjective((0.5, 0.25), detach=detach, chunk_size=chunk_size)
    out = model(tokens(3, 14), objective=objective, totals=BatchTotals(denominators, num_rows=3))
    found = torch.autograd.grad(out.loss, list(model.parameters()), allow_unused=True)
    gradients = {
        name: torch.zeros_like(parameter) if grad is None else grad
        for (name, parameter), grad in zip(model.named_parameters(), found, strict=True)
    }
    return torch.cat([out.loss.detach()[None], out.loss_per_depth]), gradients


def check_switch(model: MTPModel, switch: str, chunk_size: int | None = None) -> None:
    """Gradients are zero where the switch cuts, non-zero wherever else they were, and no loss moves by a bit."""
    losses, open_gradients = losses_and_gradients(model, DetachConfig(), chunk_size=chunk_size)
    routed_losses, gradients = losses_and_gradients(model, DetachConfig(**{switch: True}), chunk_size=chunk_size)
    assert torch.equal(routed_losses, losses), "a loss changed"
    for name, before in open_gradients.items():
        if is_cut(model.mtp_config, switch, name):
            assert not gradients[name].any(), f"{name} still has a gradient"
        else:
            assert bool(gradients[name].any()) == bool(before.any()), f"{name} has lost its gradient"


@pytest.mark.parametrize("chunk_size", [None, 9])
@pytest.mark.parametrize(("variant", "switch"), CASES)
def test_a_switch_stops_the_gradients_that_it_names_and_no_others(variant: str, switch: str, chunk_size: int | None):
    check_switch(model_of(variant), switch, chunk_size)


def test_without_switches_every_part_is_reached_that_the_scheme_uses():
    for variant, mtp in VARIANTS.items():
        _, gradients = losses_and_gradients(model_of(variant), DetachConfig())
        unreached = {name for name, gradient in gradients.items() if not gradient.any()}
        assert (HEAD in unreached) == (mtp.scheme == "shared_module"), variant
        assert not any(name.startswith(("scheme.", "trunk.model.layers.")) for name in unreached), (variant, unreached)


@pytest.mark.parametrize(("variant", "switch"), CASES)
def test_the_gradients_of_the_main_loss_never_change_by_a_bit(variant: str, switch: str):
    model = model_of(variant)
    _, before = losses_and_gradients(model, DetachConfig(), depths=(0,))
    _, after = losses_and_gradients(model, DetachConfig(**{switch: True}), depths=(0,))
    assert before[HEAD].any()
    assert all(torch.equal(after[name], gradient) for name, gradient in before.items())


# ---------------------------------------------------------------------------- parameters that gradients reach two ways


def check_two_ways(model: MTPModel, name: str, first: str, second: str) -> None:
    """Gradients come one way or the other: with either cut they add up to the whole; with both cut none is left."""
    _, whole = losses_and_gradients(model, DetachConfig())
    parts = [losses_and_gradients(model, DetachConfig(**{switch: True}))[1][name] for switch in (first, second)]
    assert all(part.any() for part in parts)
    torch.testing.assert_close(parts[0] + parts[1], whole[name], rtol=1e-5, atol=1e-9)
    _, nothing = losses_and_gradients(model, DetachConfig(**{first: True, second: True}))
    assert not nothing[name].any()


@pytest.mark.parametrize("variant", [name for name, mtp in VARIANTS.items() if SCHEMES[mtp.scheme].embeds_tokens])
def test_the_embedding_is_reached_through_the_trunk_and_through_future_tokens(variant: str):
    check_two_ways(model_of(variant), EMBEDDING, "trunk", "embedding")


@pytest.mark.parametrize(
    "variant", ["sequential, shared head norm", "independent, shared head norm", "shared module, shared head norm"]
)
def test_a_shared_final_norm_is_reached_through_h0_and_as_the_norm_of_the_heads(variant: str):
    check_two_ways(model_of(variant), NORM, "trunk", "head")


def test_with_tied_embeddings_head_and_embedding_switches_split_one_matrix():
    config = replace(TINY, tie_word_embeddings=True)
    model = MTPModel(config, MTPConfig("independent", num_depths=2)).initialize(seed=1).double().train()
    trunk_off = DetachConfig(trunk=True, embedding=True)
    as_head = losses_and_gradients(model, trunk_off)[1][EMBEDDING]
    as_embedding = losses_and_gradients(model, DetachConfig(trunk=True, head=True))[1][EMBEDDING]
    whole = losses_and_gradients(model, DetachConfig(trunk=True))[1][EMBEDDING]
    assert as_head.any()
    assert as_embedding.any()
    torch.testing.assert_close(as_head + as_embedding, whole)
    assert not losses_and_gradients(model, replace(trunk_off, head=True))[1][EMBEDDING].any()


# ------------------------------------------------------------------------------------------------------ between depths


def check_between_depths(model: MTPModel) -> None:
    """Depth 2's loss trains module 2 and what its heads and embeddings share, but neither module 1 nor the layers."""
    _, before = losses_and_gradients(model, DetachConfig(), depths=(2,))
    _, after = losses_and_gradients(model, DetachConfig(between_depths=True), depths=(2,))
    for name, gradient in before.items():
        if name.startswith(("scheme.layers.0.", "trunk.model.layers.")):
            assert not after[name].any(), f"{name} still has a gradient"
        elif name != NORM:
            assert bool(after[name].any()) == bool(gradient.any()), f"{name} has lost its gradient"
    assert any(gradient.any() for name, gradient in before.items() if name.startswith("scheme.layers.0."))
    _, first = losses_and_gradients(model, DetachConfig(between_depths=True), depths=(1,))
    _, untouched = losses_and_gradients(model, DetachConfig(), depths=(1,))
    assert all(torch.equal(first[name], gradient) for name, gradient in untouched.items()), "depth 1 builds on nothing"


@pytest.mark.parametrize("variant", ["sequential", "sequential, shared head norm", "sequential, pre norm"])
def test_depth_two_does_not_train_module_one_when_nothing_flows_between_depths(variant: str):
    check_between_depths(model_of(variant))


# ------------------------------------------------------------------------------------------------------------- mistakes


def patched_head_inputs(mistake: str):
    """`MTPModel.aligned_head_inputs` with one mistake."""
    right = MTPModel.aligned_head_inputs

    def wrong(self, aligned, document_ids, detach, *rest) -> list[HeadInput]:
        if mistake == "ignores the switch":
            return right(self, aligned, document_ids, DetachConfig(), *rest)
        inputs = right(self, aligned, document_ids, detach, *rest)
        if detach != DetachConfig():
            cut = inputs[:1] if mistake == "cuts the main loss too" else inputs[1:]
            cut = [HeadInput(depth.hidden.detach(), depth.weight, depth.bias) for depth in cut]
            inputs = [*cut, *inputs[1:]] if mistake == "cuts the main loss too" else [inputs[0], *cut]
        return inputs

    return wrong


@pytest.mark.parametrize("switch", ["trunk", "head"])
@pytest.mark.parametrize("variant", ["sequential", "independent", "parallel"])
def test_a_switch_that_is_ignored_or_cuts_too_much_is_caught(
    monkeypatch: pytest.MonkeyPatch, variant: str, switch: str
):
    monkeypatch.setattr(MTPModel, "aligned_head_inputs", patched_head_inputs("ignores the switch"))
    with pytest.raises(AssertionError, match="still has a gradient"):
        check_switch(model_of(variant), switch)
    monkeypatch.undo()
    monkeypatch.setattr(MTPModel, "aligned_head_inputs", patched_head_inputs("cuts the modules too"))
    with pytest.raises(AssertionError, match="has lost its gradient"):
        check_switch(model_of(variant), switch)


def test_ignoring_the_other_switches_or_cutting_the_main_loss_is_caught(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(MTPModel, "aligned_head_inputs", patched_head_inputs("ignores the switch"))
    with pytest.raises(AssertionError, match="still has a gradient"):
        check_between_depths(model_of("sequential"))
    with pytest.raises(AssertionError):
        check_two_ways(model_of("sequential"), EMBEDDING, "trunk", "embedding")
    monkeypatch.undo()
    monkeypatch.setattr(MTPModel, "aligned_head_inputs", patched_head_inputs("cuts the main loss too"))
    with pytest.raises(AssertionError):
        test_the_gradients_of_the_main_loss_never_change_by_a_bit("sequential", "trunk")


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(("variant", "switch"), [(v, s) for v in VARIANTS for s in SWITCHES if (v, s) not in CASES])
def test_a_switch_without_effect_is_refused(variant: str, switch: str):
    mtp = VARIANTS[variant]
    with pytest.raises(ConfigError, match=rf"detach\.{switch} has no effect with mtp\.scheme = '{mtp.scheme}'"):
        check_scheme(mtp, DetachConfig(**{switch: True}))


@pytest.mark.parametrize(("variant", "switch"), CASES)
def test_a_switch_that_is_not_refused_has_an_effect(variant: str, switch: str):
    check_scheme(VARIANTS[variant], DetachConfig(**{switch: True}))
    model = model_of(variant)
    before = losses_and_gradients(model, DetachConfig())[1]
    after = losses_and_gradients(model, DetachConfig(**{switch: True}))[1]
    assert not all(torch.equal(after[name], gradient) for name, gradient in before.items())
