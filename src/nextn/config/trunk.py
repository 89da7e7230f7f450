"""`[trunk]`: the start of a run, and the weights that are trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nextn.config.fields import require, setting
from nextn.errors import ConfigError


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank factors beside frozen weights (arXiv 2106.09685): W + (alpha / rank) B A."""

    rank: int = setting(16, "columns of B and rows of A")
    alpha: float = setting(32.0, "the product B A is scaled by alpha / rank")
    targets: tuple[str, ...] = setting(
        (), "names of the linear layers that get factors, such as q_proj and v_proj; empty: all of the trunk's layers"
    )

    def __post_init__(self) -> None:
        require(self, "trunk.lora", 1, "rank")
        if not self.alpha > 0:
            raise ConfigError(f"trunk.lora.alpha must be above 0, got {self.alpha:g}")


@dataclass(frozen=True)
class TrunkConfig:
    """The trunk: fresh, by `[model]`, or loaded from a folder, of any family that `nextn.load` takes."""

    from_: str | None = setting(None, "folder of a model or a run to start from; none: fresh weights, by [model]")
    train: Literal["all", "none", "lora"] = setting(
        "all", "which weights of the trunk are trained: all, none (the MTP modules alone), or low-rank factors"
    )
    modules: Literal["auto", "keep", "fresh"] = setting(
        "auto",
        "MTP modules of the folder: keep them, or put fresh ones by [mtp] in their place; auto: keep them where the "
        "folder has any and [mtp] does not ask for others",
    )
    lora: LoraConfig = field(default_factory=LoraConfig, metadata={"doc": "the factors of train = lora"})

    def __post_init__(self) -> None:
        if self.from_ is None:
            changed = {"train": self.train != "all", "modules": self.modules != "auto"}
            for name in (name for name, is_changed in changed.items() if is_changed):
                raise ConfigError(
                    f"trunk.{name} = {getattr(self, name)!r} is about a trunk that is loaded; name its folder with "
                    "trunk.from, or leave it out"
                )
        if self.train != "lora" and self.lora != LoraConfig():
            raise ConfigError(f"trunk.lora has no effect with trunk.train = {self.train!r}; set trunk.train = 'lora'")
