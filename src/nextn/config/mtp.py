"""`[mtp]`: the extra depths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nextn.config.fields import require, setting


@dataclass(frozen=True)
class MTPConfig:
    """Multi-token prediction: the scheme and the conventions in which implementations differ.

    A field that the scheme does not read must keep its default (`nextn.mtp.check_scheme`).
    """

    scheme: str = setting("sequential", "sequential, independent, shared_module or parallel")
    num_depths: int = setting(1, "extra tokens predicted per position in training (K); 0 is plain next-token training")
    share_weights: bool = setting(False, "sequential: one module used at every depth")
    num_layers: int = setting(1, "shared_module: layers of the one module that all depths share; 0 is heads alone")
    dense_blocks: bool = setting(False, "MTP blocks have a dense feed-forward even where the trunk has experts")
    concat: Literal["embed_first", "hidden_first"] = setting("embed_first", "order of eh_proj's two inputs")
    trunk_hidden: Literal["post_norm", "pre_norm"] = setting(
        "post_norm", "h[0]: the trunk's state after or before its final norm"
    )
    carry: Literal["post_norm", "pre_norm"] = setting(
        "post_norm", "sequential: what depth k+1 receives, after or before depth k's head norm"
    )
    head_norm: Literal["own", "shared"] = setting(
        "own", "norm before the output head: the module's own or the trunk's final norm"
    )

    def __post_init__(self) -> None:
        require(self, "mtp", 0, "num_depths", "num_layers")
