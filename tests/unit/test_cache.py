"""The cache holds one latent per token and layer, and nothing of what was rolled back is ever seen."""

from __future__ import annotations

import torch

from nextn.model import Transformer

from .test_mtp_laws import TINY, tokens


def test_bytes_per_token_are_latent_width_times_layers_times_element_size():
    cache = Transformer(TINY).new_cache(num_rows=3, capacity=10)
    per_token = (TINY.kv_lora_rank + TINY.qk_rope_head_dim) * TINY.num_hidden_layers * 4
    assert cache.num_bytes == 3 * 10 * per_token


@torch.no_grad()
def test_rolling_back_is_going_on_from_an_earlier_position():
    trunk = Transformer(TINY).eval()
    trunk.initialize(trunk, torch.Generator().manual_seed(1))
    right, wrong = tokens(1, 12), tokens(1, 12, seed=5)
    cache = trunk.new_cache(num_rows=1, capacity=12)

    def read(ids: torch.Tensor, first: int, end: int) -> torch.Tensor:
        return trunk.hidden_states(ids[:, first:end], trunk.cached_context(torch.arange(first, end)[None]), cache)

    read(right, 0, 6)
    read(wrong, 6, 11)  # rejected drafts
    resumed = read(right, 6, 12)
    torch.testing.assert_close(resumed, trunk.hidden_states(right)[:, 6:])
    read(wrong, 4, 6)  # a stale slot that is not written again shows
    assert not torch.allclose(read(right, 6, 12), resumed)
