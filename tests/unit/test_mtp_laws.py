"""Laws of a model with MTP: no leak from the future, packed = separate, sharing is one storage, weight 0 is plain."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from nextn.alignment import PADDING_DOCUMENT, align
from nextn.config import ModelConfig, MTPConfig
from nextn.mtp import MTPModel, Scheme
from nextn.objective import BatchTotals, StepObjective

TINY = ModelConfig(
    vocab_size=23,
    hidden_size=24,
    intermediate_size=32,
    moe_intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    n_routed_experts=4,
    kv_lora_rank=12,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    max_position_embeddings=64,
    initializer_range=0.3,
)
VARIANTS = {
    "untied": MTPConfig(num_depths=3),
    "shared weights": MTPConfig(num_depths=3, share_weights=True),
    "other conventions": MTPConfig(
        num_depths=3, concat="hidden_first", trunk_hidden="pre_norm", carry="pre_norm", head_norm="shared"
    ),
    "dense": MTPConfig(num_depths=3, dense_blocks=True),
    "independent": MTPConfig(scheme="independent", num_depths=3),
    "parallel": MTPConfig(scheme="parallel", num_depths=3, trunk_hidden="pre_norm"),
    "shared module": MTPConfig(scheme="shared_module", num_depths=3, num_layers=2),
    "heads alone": MTPConfig(scheme="shared_module", num_depths=3, num_layers=0),
}


@pytest.fixture(params=VARIANTS, ids=lambda name: name.replace(" ", "_"))
def model(request: pytest.FixtureRequest) -> MTPModel:
    return MTPModel(TINY, VARIANTS[request.param]).initialize(seed=1).double().eval()


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, TINY.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def sees(scheme: Scheme, depth: int, position: int, token: int) -> bool:
    """Whether depth k at position i may and must depend on t[token]."""
    if not scheme.embeds_tokens:
        return token <= position
    if scheme.is_chain or depth == 0:
        return token <= position + depth
    return token <= position or depth <= token <= position + depth  # nobody read what lies between


@torch.no_grad()
def check_dependence(model: MTPModel) -> None:
    """Depth k at position i changes with every token that its scheme lets it see, and with no other."""
    ids = tokens(1, 12)
    before = model(ids).logits_per_depth
    for changed in range(12):
        other = ids.clone()
        other[0, changed] = (other[0, changed] + 1) % TINY.vocab_size
        after = model(other).logits_per_depth
        for depth in range(4):
            same = (before[depth] == after[depth]).all(-1)[0].tolist()
            for position, is_same in enumerate(same):
                if sees(model.scheme, depth, position, changed):
                    assert not is_same, "a token that should matter does not"
                else:
                    assert is_same, "a later token leaked into an earlier prediction"


def test_a_depth_depends_on_every_token_its_scheme_shows_it_and_on_no_later_one(model: MTPModel):
    check_dependence(model)


@pytest.mark.parametrize("mistake", ["embeds one token further", "embeds one token less", "attends to the future"])
def test_a_wrong_shift_or_mask_is_caught(model: MTPModel, monkeypatch: pytest.MonkeyPatch, mistake: str):
    def shifted(by: int):
        def wrong(input_ids, depth, *rest):
            right = align(input_ids, depth, *rest)
            rolled = replace(right, embedded_ids=right.embedded_ids.roll(by, dims=1))
            return rolled if depth else right

        return wrong

    def unmasked(query, key, value, mask, scale):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scale)

    if not model.scheme.embeds_tokens and mistake != "attends to the future":
        pytest.skip("this scheme embeds no future token")
    if mistake == "attends to the future":
        monkeypatch.setattr("nextn.model.attention.attention", unmasked)
    else:
        monkeypatch.setattr("nextn.alignment.align", shifted(-1 if mistake == "embeds one token further" else 1))
    with pytest.raises(AssertionError, match=r"leaked|does not"):
        check_dependence(model)


def test_no_gradient_flows_from_a_prediction_to_later_tokens(model: MTPModel):
    ids = tokens(1, 10)
    embedded = model.trunk.model.embed_tokens.weight[ids].detach().requires_grad_()
    model.trunk.embed = lambda token_ids: embedded[:, -token_ids.shape[1] :]  # depth k embeds the last T-k tokens
    for depth, logits in enumerate(model(ids).logits_per_depth):
        (gradient,) = torch.autograd.grad(logits[0, 4].sum(), embedded, retain_graph=True)
        touched = gradient[0].abs().sum(-1) > 0
        assert touched.tolist() == [sees(model.scheme, depth, 4, token) for token in range(10)]


@torch.no_grad()
def test_packed_documents_give_the_losses_of_separate_ones(model: MTPModel):
    lengths = (1, 2, 5, 9)
    documents = [tokens(1, length, seed=length) for length in lengths]
    packed = torch.cat(documents, dim=1)
    ids = torch.cat([torch.full((1, length), number) for number, length in enumerate(lengths)], dim=1)
    ones = BatchTotals(torch.ones(4, dtype=torch.float64), num_rows=1)
    together = model(packed, document_ids=ids, totals=ones).loss_per_depth
    apart = sum(model(document, totals=ones).loss_per_depth for document in documents)
    torch.testing.assert_close(together, apart)
    leaking = model(packed, totals=ones).loss_per_depth
    assert not torch.allclose(leaking, apart), "documents that see each other must be noticed"


@torch.no_grad()
def test_the_content_of_padding_is_irrelevant(model: MTPModel):
    ids, documents = tokens(2, 10), torch.zeros(2, 10, dtype=torch.int64)
    documents[1, 6:] = PADDING_DOCUMENT
    other = ids.clone()
    other[1, 6:] = tokens(4, seed=9)
    assert torch.equal(
        model(ids, document_ids=documents).loss_per_depth, model(other, document_ids=documents).loss_per_depth
    )


def test_masked_labels_give_neither_loss_nor_count_nor_gradient(model: MTPModel):
    ids = tokens(1, 10)
    labels = ids.clone()
    labels[0, 5] = -100
    out = model(ids, labels=labels)
    (gradient,) = torch.autograd.grad(out.loss, out.logits_per_depth[0])
    assert not gradient[0, 4].any()
    assert gradient[0, 3].any()
    nothing = model(ids, labels=torch.full_like(ids, -100))
    assert nothing.loss_per_depth.tolist() == [0.0] * 4


def test_lambda_zero_and_k_zero_are_bit_for_bit_plain_training():
    ids = tokens(3, 16)
    results = []
    for num_depths in (0, 2):
        model = MTPModel(TINY, MTPConfig(num_depths=num_depths)).initialize(seed=5).train()
        loss = model(ids, objective=StepObjective((0.0,) * num_depths)).loss
        loss.backward()
        results.append((loss, {name: p.grad for name, p in model.trunk.named_parameters()}, model))
    (plain, plain_grads, _), (weightless, grads, model) = results
    assert torch.equal(plain, weightless)
    assert all(torch.equal(grads[name], plain_grads[name]) for name in plain_grads)
    assert all(p.grad is None for p in model.scheme.parameters())


def test_trunk_weights_do_not_depend_on_the_depths():
    plain = MTPModel(TINY, MTPConfig(num_depths=0)).initialize(seed=3).trunk.state_dict()
    with_depths = MTPModel(TINY, MTPConfig(num_depths=2)).initialize(seed=3).trunk.state_dict()
    assert all(torch.equal(plain[name], with_depths[name]) for name in plain)


def test_embedding_and_head_are_shared_with_every_depth():
    model = MTPModel(TINY, MTPConfig(num_depths=2)).initialize(seed=1)
    assert not any("embed" in name or "lm_head" in name for name in model.scheme.state_dict())
    out = model(tokens(1, 8))
    head, embedding = model.trunk.lm_head.weight, model.trunk.model.embed_tokens.weight
    depth_two = out.logits_per_depth[2].sum()
    assert all(g.any() for g in torch.autograd.grad(depth_two, [head, embedding]))


def test_shared_weights_are_one_module_that_every_depth_trains():
    model = MTPModel(TINY, MTPConfig(num_depths=3, share_weights=True)).initialize(seed=1)
    assert len(model.scheme.layers) == 1
    assert model.scheme.module_at(1) is model.scheme.module_at(3)
    untied = MTPModel(TINY, MTPConfig(num_depths=3)).scheme
    assert untied.module_at(2) is not untied.module_at(3)
    assert untied.module_at(7) is untied.module_at(3), "beyond the last depth the last module is used again"


def test_random_tokens_stay_at_ln_v_at_every_depth():
    model = MTPModel(replace(TINY, initializer_range=0.02), MTPConfig(num_depths=3)).initialize(seed=2)
    losses = model(tokens(8, 64)).loss_per_depth
    torch.testing.assert_close(losses, torch.full((4,), math.log(TINY.vocab_size)), atol=0.02, rtol=0)


def test_rows_too_short_for_a_depth_are_zero_and_finite():
    model = MTPModel(TINY, MTPConfig(num_depths=3)).initialize(seed=1)
    out = model(tokens(2, 2))
    out.loss.backward()
    assert out.loss_per_depth[1:].tolist() == [0.0, 0.0, 0.0]
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_training_skips_depths_without_weight_and_evaluation_computes_all():
    model = MTPModel(TINY, MTPConfig(num_depths=2)).initialize(seed=1)
    first_only = StepObjective((0.1, 0.0))
    training = model.train()(tokens(1, 8), objective=first_only)
    assert len(training.logits_per_depth) == 2
    assert training.loss_per_depth[2].isnan()
    assert model.eval()(tokens(1, 8), objective=first_only).loss_per_depth.isfinite().all()
    with pytest.raises(ValueError, match="depth_weights has 1 values, the model has 2 depths"):
        model(tokens(1, 8), objective=StepObjective((0.1,)))
