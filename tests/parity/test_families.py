"""Each family's released checkpoint loads, and trunk and MTP modules compute what the family's own code does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

import nextn
from nextn.decoding import plain_reference
from nextn.interop.families import FAMILIES as TABLE
from nextn.interop.families import Family, family_of
from nextn.interop.load import load_with_transformers
from nextn.mtp import MTPModel

from .conftest import relative_error
from .released_families import FAMILIES, VOCABULARY, Reference

TOLERANCE = 1e-5
IDS = torch.randint(0, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(5))


@pytest.fixture(params=FAMILIES)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Reference, Path]]:
    """Every family's reference and its checkpoint, written once."""
    references = {kind: Reference(released) for kind, released in FAMILIES.items()}
    return {kind: (made, made.save(tmp_path_factory.mktemp(kind))) for kind, made in references.items()}


@pytest.fixture(scope="module")
def models(saved: dict[str, tuple[Reference, Path]]) -> dict[str, MTPModel]:
    """The same by nextn, with transformers' trunk."""
    return {kind: load_with_transformers(folder) for kind, (_, folder) in saved.items()}


@torch.no_grad()
def test_logits_of_every_depth_are_those_of_the_familys_own_code(kind, saved, models):
    theirs, ours = saved[kind][0].logits(IDS), models[kind](IDS).logits_per_depth
    assert len(ours) == len(theirs) == FAMILIES[kind].num_modules + 1
    for mine, reference in zip(ours, theirs, strict=True):
        assert relative_error(mine, reference) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("mistake", ["concat", "trunk_hidden", "head_norm"])
def test_the_reference_tells_every_convention_from_its_opposite(kind, mistake, saved, models):
    opposite = {"concat": "hidden_first", "trunk_hidden": "trunk_post_norm", "head_norm": "own_norm"}[mistake]
    reference, released = saved[kind][0], FAMILIES[kind]
    reference.released = replace(released, **{opposite: not getattr(released, opposite)})
    try:
        theirs = reference.logits(IDS)[1]
    finally:
        reference.released = released
    assert relative_error(models[kind](IDS).logits_per_depth[1], theirs) > 100 * TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("kind", ["deepseek_v3", "mimo_v2_flash"])
def test_what_is_carried_on_shows_at_the_second_depth(kind, saved, models):
    reference, released = saved[kind][0], FAMILIES[kind]
    reference.released = replace(released, carry_post_norm=not released.carry_post_norm)
    try:
        theirs = reference.logits(IDS)[2]
    finally:
        reference.released = released
    assert relative_error(models[kind](IDS).logits_per_depth[2], theirs) > 100 * TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("kind", ["deepseek_v3", "glm4_moe"])
def test_logits_are_those_of_transformers_own_mtp_model(kind, saved, models, monkeypatch):
    folder, released = saved[kind][1], FAMILIES[kind]
    trunk_class = type(models[kind].trunk.model)
    own_layers = [rf"model\.layers\.{3 + module}\." for module in range(released.num_modules)]
    monkeypatch.setattr(trunk_class, "_keys_to_ignore_on_load_unexpected", own_layers)
    hf = trunk_class.from_pretrained(folder, num_nextn_predict_layers=released.num_modules).eval()
    mtp, cache = MtpModel.from_pretrained(hf).eval(), None
    ids, logits = IDS[:1], models[kind](IDS[:1]).logits_per_depth
    states, cache = hf.model(ids, attention_mask=torch.ones_like(ids)).last_hidden_state, MtpCache(config=mtp.config)
    for depth in range(1, released.num_modules + 1):
        positions = torch.arange(depth, ids.shape[1])[None]
        states = mtp.forward_layer(
            depth - 1, states[:, : len(positions[0])], positions, cache, input_ids=ids[:, depth:]
        )
        assert relative_error(logits[depth], mtp._project_to_logits(states)) < TOLERANCE


@torch.no_grad()
def test_nextns_own_trunk_and_transformers_one_agree_on_a_deepseek_checkpoint(saved, models):
    native = nextn.load(saved["deepseek_v3"][1])
    assert type(native.trunk) is not type(models["deepseek_v3"].trunk)
    for mine, theirs in zip(native(IDS).logits_per_depth, models["deepseek_v3"](IDS).logits_per_depth, strict=True):
        assert relative_error(mine, theirs) < TOLERANCE


@pytest.mark.filterwarnings("ignore:.*recurrent layers")
def test_greedy_speculation_gives_the_tokens_of_plain_decoding(kind, models):
    model = models[kind]
    prompt = IDS[0, :6].tolist()
    result = nextn.generate(model, [prompt], max_new_tokens=12, draft_length=2)
    assert list(result.token_ids[0]) == plain_reference(model, prompt, 12)


def test_the_table_names_every_family_of_these_tests_and_a_source_for_each_entry():
    assert all(family_of({"model_type": kind}) is not None for kind in FAMILIES)
    assert all(family.source for family in TABLE)
    kinds = [kind for family in TABLE for kind in family.model_types]
    assert len(kinds) == len(set(kinds))


def test_a_stored_name_leads_to_the_place_it_was_made_from():
    for family in TABLE:
        for module in range(2 if any("{" in stored for stored, _ in list(family.layout)[:1]) else 1):
            for _, inside in family.layout:
                name = family.layout.stored_name(module, f"{inside}weight", num_layers=4)
                located = family.layout.locate(name, num_layers=4)
                assert located is not None
                assert located[1] == f"{inside}weight"
                assert located[0] in (0, module)


@pytest.mark.parametrize("kind", ["deepseek_v3", "mimo_v2_flash"])
def test_every_weight_of_a_module_comes_from_the_file(kind, saved):
    """Loading twice into differently initialised modules gives the same model: nothing is left as it was drawn."""
    torch.manual_seed(1)
    first = load_with_transformers(saved[kind][1])
    torch.manual_seed(2)
    second = load_with_transformers(saved[kind][1])
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def documented(family: Family) -> str:
    """The family's row in docs/families.md."""
    kinds = ", ".join(f"`{kind}`" for kind in family.model_types)
    key = f"`{family.count_key}`" if family.count_key else "nothing"
    block = [stored for stored, inside in family.layout if inside.startswith("block.")][-1]
    conventions = (family.concat, family.trunk_hidden, family.carry, family.head_norm)
    loads = "no" if family.refusal else "yes"
    return f"| {' | '.join((family.name, kinds, key, f'`{block}`', *map(str, conventions), loads))} |"


def test_the_documentation_says_what_the_table_says():
    text = " ".join((Path(__file__).parents[2] / "docs" / "families.md").read_text().split())  # lines are wrapped
    for family in TABLE:
        assert documented(family) in text
        assert family.disputed in text
        assert family.refusal in text
