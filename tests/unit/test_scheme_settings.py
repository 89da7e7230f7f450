"""A setting that a scheme would silently ignore is refused, and so are drafts that it cannot make."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from nextn.config import MTPConfig
from nextn.decoding.resolve import resolve_draft_length
from nextn.errors import ConfigError
from nextn.mtp import SCHEMES, MTPModel, check_scheme
from nextn.mtp.shared_module import SharedModule

from .test_mtp_laws import TINY, tokens

UNREAD = {
    "share_weights": True,
    "num_layers": 3,
    "dense_blocks": True,
    "concat": "hidden_first",
    "trunk_hidden": "pre_norm",
    "carry": "pre_norm",
    "head_norm": "shared",
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_setting_that_the_scheme_does_not_read_is_refused(scheme: str):
    for name, value in UNREAD.items():
        config = MTPConfig(scheme, num_depths=2, **{name: value})
        if name in SCHEMES[scheme].reads:
            check_scheme(config)
        else:
            with pytest.raises(ConfigError, match=rf"mtp\.{name} = .* has no effect with mtp\.scheme = '{scheme}'"):
                check_scheme(config)
            with pytest.raises(ConfigError, match=name):
                MTPModel(TINY, config)


HEADS_ALONE = MTPConfig("shared_module", num_depths=2, num_layers=0)
CONFIGS = [*(MTPConfig(scheme, num_depths=2) for scheme in SCHEMES), HEADS_ALONE]


@torch.no_grad()
def logits(config: MTPConfig) -> tuple[Tensor, ...]:
    """Of every depth, even if a setting is refused; norms have random weights, so that each has an effect."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nextn.mtp.model.check_scheme", lambda config: None)
        model = MTPModel(TINY, config).initialize(seed=1).eval()
    generator = torch.Generator().manual_seed(2)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.copy_(torch.rand(weight.shape, generator=generator) + 0.5)
    output = model(tokens(1, 9)).logits_per_depth
    assert output is not None
    return output


def check_refusals(config: MTPConfig) -> None:
    """A setting changes some logits iff it is allowed."""
    before = logits(config)
    for name, value in UNREAD.items():
        changed = dataclasses.replace(config, **{name: value})
        has_effect = not all(map(torch.equal, before, logits(changed)))
        try:
            check_scheme(changed)
        except ConfigError:
            assert not has_effect, f"{name} is refused, though it changes the logits"
        else:
            assert has_effect, f"{name} is allowed, though it changes nothing"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.scheme}-{config.num_layers}")
def test_exactly_the_settings_without_effect_are_refused(config: MTPConfig):
    check_refusals(config)


def test_a_list_of_settings_read_that_is_too_long_or_too_short_is_caught(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(SharedModule, "settings_read", classmethod(lambda cls, config: cls.reads))
    with pytest.raises(AssertionError, match="dense_blocks is allowed"):
        check_refusals(HEADS_ALONE)
    monkeypatch.setattr(SharedModule, "settings_read", classmethod(lambda cls, config: frozenset({"num_layers"})))
    with pytest.raises(AssertionError, match="dense_blocks is refused"):
        check_refusals(MTPConfig("shared_module", num_depths=2))


@pytest.mark.parametrize("name", ["trunk_hidden", "head_norm", "dense_blocks"])
def test_heads_alone_refuse_what_only_layers_read_and_say_why(name: str):
    wanted = rf"mtp\.{name} = .* mtp\.scheme = 'shared_module' \(num_layers = 0\); .*read then: num_layers\)"
    with pytest.raises(ConfigError, match=wanted):
        check_scheme(dataclasses.replace(HEADS_ALONE, **{name: UNREAD[name]}))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_only_a_chain_drafts_further_than_it_was_trained(scheme: str):
    config = MTPConfig(scheme, num_depths=2)
    check_scheme(config, draft_length=2)
    if SCHEMES[scheme].is_chain:
        check_scheme(config, draft_length=9)
    else:
        with pytest.raises(ConfigError, match=r"draft_length = 3.* at most 2 here"):
            check_scheme(config, draft_length=3)


def test_an_unknown_scheme_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"sequential, independent, shared_module, parallel, got 'medusa'"):
        check_scheme(MTPConfig("medusa"))


@pytest.mark.parametrize(
    ("scheme", "num_depths", "usual"), [("sequential", 1, 3), ("parallel", 2, 2), ("parallel", 4, 3)]
)
def test_three_tokens_are_drafted_or_as_many_as_the_scheme_can_unless_said_otherwise(
    scheme: str, num_depths: int, usual: int
):
    assert resolve_draft_length(MTPModel(TINY, MTPConfig(scheme=scheme, num_depths=num_depths)), None) == usual
