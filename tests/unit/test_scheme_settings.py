"""A setting that a scheme would silently ignore is refused, and so are drafts that it cannot make."""

from __future__ import annotations

import pytest

from nextn.cli.generate import _usual_draft_length
from nextn.config import MTPConfig
from nextn.errors import ConfigError
from nextn.mtp import SCHEMES, MTPModel, check_scheme

from .test_mtp_laws import TINY

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
def test_the_generate_command_drafts_three_tokens_or_as_many_as_the_scheme_can(
    scheme: str, num_depths: int, usual: int
):
    assert _usual_draft_length(MTPModel(TINY, MTPConfig(scheme=scheme, num_depths=num_depths))) == usual
