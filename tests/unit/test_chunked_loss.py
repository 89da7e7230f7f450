"""The chunked loss is the plain one: values, every gradient, in every scheme."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nextn.alignment import IGNORED
from nextn.config import DetachConfig, MTPConfig
from nextn.mtp import MTPModel
from nextn.objective import (
    BatchTotals,
    HeadInput,
    StepObjective,
    chunked_losses,
    chunked_predictions,
    summed_cross_entropy,
    total_loss,
)
from nextn.objective import chunked as chunked_module

from .test_mtp_laws import TINY, VARIANTS, tokens


@dataclass(frozen=True)
class Case:
    """Arguments of `chunked_losses` but the chunk size, and the leaves that gradients flow to."""

    inputs: list[HeadInput]
    labels: list[Tensor]
    coefficients: list[Tensor]
    weights: tuple[float, ...]
    leaves: list[Tensor]


def random_case(seed: int, heads: Sequence[str], weights: Sequence[float], with_bias: bool, length: int = 7) -> Case:
    """Depth d has length - d positions and a head: the first one, that one as a constant, or one of its own."""
    generator = torch.Generator().manual_seed(seed)
    width, vocab_size, num_rows = 4, 9, 3

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    first = (leaf(vocab_size, width), leaf(vocab_size) if with_bias else None)
    leaves = [tensor for tensor in first if tensor is not None]
    inputs, labels, coefficients = [], [], []
    for depth, kind in enumerate(["first", *heads]):
        head = first
        if kind == "constant":
            head = (first[0].detach(), None if first[1] is None else first[1].detach())
        elif kind == "own":
            head = (leaf(vocab_size, width), leaf(vocab_size))
            leaves += head
        shape = (num_rows, length - depth)
        inputs.append(HeadInput(leaf(*shape, width), *head))
        counted = torch.rand(shape, generator=generator) < 0.7
        ids = torch.randint(0, vocab_size, shape, generator=generator)
        labels.append(ids.where(counted | (ids < 4), IGNORED))  # a coefficient of 0 lets the label be anything
        coefficients.append(torch.rand(shape, generator=generator, dtype=torch.float64) * counted)
    leaves += [depth_input.hidden for depth_input in inputs]
    return Case(inputs, labels, coefficients, (1.0, *weights), leaves)


def plain_losses(case: Case) -> tuple[Tensor, Tensor]:
    """The reference: all logits, `summed_cross_entropy`, `total_loss`."""
    losses = [
        summed_cross_entropy(depth_input.logits(), labels, coefficients)
        for depth_input, labels, coefficients in zip(case.inputs, case.labels, case.coefficients, strict=True)
    ]
    return total_loss(losses[0], losses[1:], case.weights[1:]), torch.stack(losses).detach()


def gradients(loss: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Of every leaf; zeros where none flows."""
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found, strict=True)]


def check_equals_plain(case: Case, chunk_size: int) -> None:
    """Total, loss per depth and the gradient of every state, weight and bias."""
    total, losses = chunked_losses(case.inputs, case.labels, case.coefficients, case.weights, chunk_size)
    plain_total, expected = plain_losses(case)
    torch.testing.assert_close(total, plain_total)
    torch.testing.assert_close(losses, expected)
    pairs = zip(gradients(total, case.leaves), gradients(plain_total, case.leaves), strict=True)
    for grad, expected_grad in pairs:
        torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-12)


HEADS = st.lists(st.sampled_from(["first", "constant", "own"]), max_size=3)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), HEADS, st.integers(4, 8), st.integers(1, 30), st.booleans(), st.data())
def test_the_chunked_loss_and_its_gradients_are_the_plain_ones(seed, heads, length, chunk_size, with_bias, data):
    weights = data.draw(st.lists(st.sampled_from([0.0, 0.3, 2.0]), min_size=len(heads), max_size=len(heads)))
    check_equals_plain(random_case(seed, heads, weights, with_bias, length), chunk_size)


def test_the_softmax_may_be_taken_on_smaller_blocks_than_the_chunk(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chunked_module, "BLOCK_BYTES", 1)  # 16 rows, which is the least
    check_equals_plain(random_case(1, ["first", "own"], [0.3, 0.3], True, length=20), chunk_size=40)


def broken_depth(mistake: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """`_one_depth` with one mistake."""
    right = chunked_module._one_depth

    def wrong(states, head, labels, coefficients, weight_in_total, chunk_size, needs_states):
        def run(kept: int, labels: Tensor, coefficients: Tensor, depth_weight: float = weight_in_total):
            parts = (states[:kept], head, labels[:kept], coefficients[:kept])
            return right(*parts, depth_weight, chunk_size, needs_states)

        if mistake == "forgets the last partial chunk":
            kept = len(states) // chunk_size * chunk_size
            loss, gradient = run(kept, labels, coefficients)
            return loss, F.pad(gradient, (0, 0, 0, len(states) - kept))
        no_gradients = replace(head, weight_gradient=None, bias_gradient=None)
        loss, _ = right(states, no_gradients, labels, coefficients, weight_in_total, chunk_size, False)
        if mistake == "no coefficient in the gradient":
            return loss, run(len(states), labels, coefficients.sign())[1]
        if mistake == "no weight of the depth in the gradient":
            return loss, run(len(states), labels, coefficients, 1.0)[1]
        return loss, run(len(states), labels.clamp(min=0).roll(1), coefficients)[1]

    return wrong


MISTAKES = [
    "forgets the last partial chunk",
    "no coefficient in the gradient",
    "no weight of the depth in the gradient",
    "one-hot at the wrong place",
]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_chunked_loss_is_caught(monkeypatch: pytest.MonkeyPatch, mistake: str):
    case = random_case(1, ["first", "own"], [0.3, 0.3], True)
    check_equals_plain(case, chunk_size=4)
    monkeypatch.setattr(chunked_module, "_one_depth", broken_depth(mistake))
    with pytest.raises(AssertionError, match="not close"):
        check_equals_plain(case, chunk_size=4)


# --------------------------------------------------------------------------------------------------- through the model


def model_results(model: MTPModel, chunk_size: int | None) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Total, loss per depth and all gradients in training, under masked labels, documents and importance.

    Weights and denominators are powers of two, so that it makes no difference, even in float32, when they are applied.
    """
    ids = tokens(3, 12, seed=4)
    documents = (torch.arange(12)[None] > torch.tensor([[4], [7], [99]])).long()
    labels = ids.masked_fill(torch.rand(3, 12, generator=torch.Generator().manual_seed(1)) < 0.2, IGNORED)
    out = model.train()(
        ids,
        labels,
        documents,
        label_weights=torch.rand(3, 12, generator=torch.Generator().manual_seed(2)),
        objective=StepObjective((0.5, 0.25, 0.125), balance_alpha=0.01, chunk_size=chunk_size),
        totals=BatchTotals(torch.tensor([32.0, 16.0, 16.0, 8.0]), num_rows=3),
    )
    assert (out.logits is None) == (chunk_size is not None)
    return out.loss.detach(), out.loss_per_depth, gradients(out.loss, list(model.parameters()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_in_every_scheme_the_chunked_loss_is_the_plain_one(monkeypatch: pytest.MonkeyPatch, variant: str):
    model = MTPModel(TINY, VARIANTS[variant]).initialize(seed=1).double()

    def check() -> None:
        for ours, expected in zip(model_results(model, 7), model_results(model, None), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)  # the router works in float32

    check()
    monkeypatch.setattr(chunked_module, "_one_depth", broken_depth("one-hot at the wrong place"))
    with pytest.raises(AssertionError, match="not close"):
        check()


@pytest.mark.parametrize("variant", VARIANTS)
def test_under_autocast_the_chunked_loss_errs_no_more_than_the_plain_one(variant: str):
    model = MTPModel(TINY, VARIANTS[variant]).initialize(seed=1)
    exact = model_results(model, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain, chunked = model_results(model, None), model_results(model, 7)

    def error(results: tuple[Tensor, Tensor, list[Tensor]]) -> Tensor:
        """Of the losses, and of all gradients taken as one vector, relative."""
        difference = torch.cat([(a - b).flatten() for a, b in zip(results[2], exact[2], strict=True)])
        whole = torch.cat([b.flatten() for b in exact[2]])
        return torch.stack([(results[1] - exact[1]).norm() / exact[1].norm(), difference.norm() / whole.norm()])

    assert (error(chunked) <= 1.2 * error(plain) + 1e-3).all(), (error(chunked), error(plain))
    torch.testing.assert_close(chunked[1], plain[1], rtol=1e-5, atol=0)  # the same logits; softmax in float32
    assert (error(plain) < 0.1).all()


# --------------------------------------------------------------------------------------------------------- predictions


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.integers(1, 30), st.booleans())
def test_chunked_predictions_are_argmax_and_cross_entropy_of_whole_logits(seed, chunk_size, with_bias):
    case = random_case(seed, [], [], with_bias)
    nats, choices = chunked_predictions(case.inputs[0], case.labels[0], chunk_size)
    logits = case.inputs[0].logits()
    assert torch.equal(choices, logits.argmax(-1))
    expected = F.cross_entropy(logits.flatten(0, 1), case.labels[0].flatten(), reduction="none")
    torch.testing.assert_close(nats, expected.view_as(nats))
    last_first = chunked_predictions(case.inputs[0], case.labels[0].flip(1), chunk_size)[0]
    assert not torch.allclose(last_first, expected.view_as(nats)), "labels of other positions must be noticed"


# ------------------------------------------------------------------------------------------------------- corner cases


def test_a_second_backward_pass_is_refused():
    case = random_case(1, ["first"], [0.3], False)
    total, losses = chunked_losses(case.inputs, case.labels, case.coefficients, case.weights, 4)
    assert not losses.requires_grad
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="there is no second"):
        total.backward()


def test_the_gradient_of_the_total_scales_every_gradient():
    case = random_case(1, ["first"], [0.3], False)
    totals = [chunked_losses(case.inputs, case.labels, case.coefficients, case.weights, 4)[0] for _ in range(2)]
    for once, thrice in zip(gradients(totals[0], case.leaves), gradients(3 * totals[1], case.leaves), strict=True):
        torch.testing.assert_close(thrice, 3 * once)


@pytest.mark.parametrize("variant", VARIANTS)
def test_with_all_labels_masked_loss_and_gradients_are_exactly_zero(variant: str):
    model = MTPModel(TINY, VARIANTS[variant]).initialize(seed=1)
    ids = tokens(2, 9)
    out = model(ids, torch.full_like(ids, IGNORED), objective=StepObjective((0.1,) * 3, chunk_size=4))
    assert (out.loss.item(), out.loss_per_depth.tolist()) == (0.0, [0.0] * 4)
    found = gradients(out.loss, list(model.parameters()))
    assert all(grad.isfinite().all() and not grad.any() for grad in found)


def test_a_label_outside_the_vocabulary_is_refused_where_it_counts_and_ignored_where_it_does_not():
    head_input = HeadInput(torch.randn(1, 3, 4), torch.randn(6, 4))
    for wrong in (-1, 6):
        labels = [torch.tensor([[1, wrong, 2]])]
        with pytest.raises((IndexError, RuntimeError)):
            chunked_losses([head_input], labels, [torch.ones(1, 3)], [1.0], chunk_size=2)
        loss, _ = chunked_losses([head_input], labels, [torch.tensor([[1.0, 0.0, 1.0]])], [1.0], chunk_size=2)
        assert loss.isfinite()


def test_heads_that_share_a_weight_but_not_a_bias_are_two_heads():
    hidden, weight, bias = torch.randn(1, 3, 4), torch.randn(6, 4), torch.randn(6)
    labels, ones = [torch.tensor([[1, 0, 2]])] * 2, [torch.ones(1, 3)] * 2
    inputs = [HeadInput(hidden, weight), HeadInput(hidden, weight, bias)]
    _, losses = chunked_losses(inputs, labels, ones, [1.0, 1.0], chunk_size=2)
    torch.testing.assert_close(losses, torch.stack([summed_cross_entropy(i.logits(), labels[0]) for i in inputs]))


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_a_depth_that_is_off_and_read_detached_by_the_next_is_not_trained_at_all(chunk_size: int | None):
    model = MTPModel(TINY, MTPConfig(num_depths=2)).initialize(seed=1).train()
    objective = StepObjective(
        (0.0, 0.3), detach=DetachConfig(between_depths=True), balance_alpha=0.1, chunk_size=chunk_size
    )
    out = model(tokens(2, 12), objective=objective)
    out.loss.backward()
    first, second = model.scheme.layers
    assert all(parameter.grad is None for parameter in first.parameters()), "zeros would still decay it"
    assert all(parameter.grad is not None for parameter in second.parameters())
    assert {name.split(".")[2] for name in out.expert_loads if name.startswith("scheme.")} == {"1"}, "no bias update"


@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize("scheme", ["independent", "parallel", "shared_module"])
def test_a_depth_that_is_off_before_one_that_is_on_is_not_trained_at_all(scheme: str, chunk_size: int | None):
    model = MTPModel(TINY, MTPConfig(scheme=scheme, num_depths=2)).initialize(seed=1).train()
    out = model(tokens(2, 12), objective=StepObjective((0.0, 0.3), balance_alpha=0.1, chunk_size=chunk_size))
    out.loss.backward()
    own = model.scheme.heads[0] if scheme == "shared_module" else model.scheme.layers[0]
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in own.parameters())
    if scheme != "shared_module":
        assert all(parameter.grad is None for parameter in own.parameters()), "zeros would still move its momentum"
        assert out.loss_per_depth[1].isnan()
        assert not any(name.startswith("scheme.layers.0") for name in out.expert_loads)
    assert any(parameter.grad.any() for parameter in model.scheme.parameters() if parameter.grad is not None)
