"""Defines a study as its TOML file does: variants, seeds, evaluation and claims.

title = "How many future tokens?"
question = "Which number of extra depths pays?"
base = "base-{scale}.toml"          # the training recipe that is varied; {scale} is what --scale says
baseline = "next token"             # the variant that all others are compared with
seeds = [0, 1, 2]

[[variants]]                        # one way to train ...
name = "next token"
set.mtp.num_depths = 0

[grid]                              # ... and/or every combination of these values
mtp.num_depths = [1, 3]

[evaluation]
num_prompts = 8

[[claims]]
text = "Three extra depths are best"
tests = [{ metric = "loss", best = "num_depths = 3" }]
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nextn.config import Recipe
from nextn.config.fields import require, setting
from nextn.errors import ConfigError


@dataclass(frozen=True)
class ModelEvaluationConfig:
    """`[evaluation]`: how much is measured of every trained model."""

    num_rows: int = setting(256, "held-out rows for the losses, by depth and by position")
    num_prompts: int = setting(32, "held-out prompts decoded for acceptance; 0 decodes none")
    prompt_length: int = setting(128, "tokens in a prompt")
    max_new_tokens: int = setting(128, "tokens decoded per prompt")
    num_timed_prompts: int = setting(2, "of these prompts, how many are decoded for tokens per second; 0 times none")
    num_repeats: int = setting(3, "timed repeats, plain and speculative decoding in turn")
    num_completions: int = setting(256, "sampled completions of Python functions that are parsed; 0 samples none")
    completion_length: int = setting(128, "tokens of such a completion")
    tasks: tuple[str, ...] = setting((), "tasks of lm-evaluation-harness (needs the lm-eval extra)")
    task_limit: int | None = setting(None, "questions per task; none asks all")

    def __post_init__(self) -> None:
        require(
            self, "evaluation", 1, "num_rows", "prompt_length", "max_new_tokens", "num_repeats", "completion_length"
        )
        require(self, "evaluation", 0, "num_prompts", "num_timed_prompts", "num_completions")
        if self.num_timed_prompts > self.num_prompts:
            raise ConfigError(
                f"evaluation.num_timed_prompts = {self.num_timed_prompts} exceeds evaluation.num_prompts = "
                f"{self.num_prompts}"
            )


@dataclass(frozen=True)
class Variant:
    """One way to train: the base recipe with some settings changed.

    Attributes:
        name: of the variant, one per study.
        changes: nested tables as in a recipe, with the changed keys alone.
        against: name of the variant that it is compared with; empty: the study's baseline.
        draft_model: name of the variant whose model of the same seed drafts for this one; empty: MTP depths draft.
    """

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    against: str = ""
    draft_model: str = ""


@dataclass(frozen=True)
class Criterion:
    """What would make a claim true: `variant` lies within `low` and `high`, or `best` is the best of `among`."""

    metric: str = setting("", "name of a metric, see docs/studies.md")
    low: float | None = setting(None, "what is claimed of `variant`: the metric is at least this")
    high: float | None = setting(None, "and at most this")
    against_baseline: bool = setting(False, "low and high bound the difference from the baseline instead")
    best: str = setting("", "the variant claimed to be the best in the metric ...")
    among: tuple[str, ...] = setting((), "... of these variants; empty: of all")
    variant: str = setting("", "the variant of which low and high are claimed")

    def __post_init__(self) -> None:
        if bool(self.variant) == bool(self.best):
            raise ConfigError(
                f"a claim's test names either a variant (with low, high or both) or the best one, got variant = "
                f"{self.variant!r}, best = {self.best!r}"
            )
        if self.variant and self.low is None and self.high is None:
            raise ConfigError(f"the test of {self.metric!r} for {self.variant!r} needs low, high or both")


@dataclass(frozen=True)
class Claim:
    """A sentence, and the tests that must all hold for it to be true."""

    text: str = setting("", "the claim in words")
    tests: tuple[Criterion, ...] = setting((), "all must hold")


@dataclass(frozen=True)
class Study:
    """A study's file, resolved; see the module's docstring for the file itself."""

    title: str = setting("", "what the page is called")
    question: str = setting("", "what the study asks, in a sentence")
    base: str = setting("", "path of the training recipe, from the study's folder; {scale} stands for --scale")
    baseline: str = setting("", "name of the variant that others are compared with; empty: the first")
    seeds: tuple[int, ...] = setting((0, 1, 2), "training.seed of the runs; variants are paired by it")
    ladder: tuple[float, ...] = setting(
        (),
        "lengths at which the baseline is trained besides its own, as multiples of its steps: what it would do "
        "with other budgets is read between them",
    )
    target_losses: tuple[float, ...] = setting((), "losses (nats per token) whose steps, FLOPs and time are read off")
    evaluation: ModelEvaluationConfig = field(
        default_factory=ModelEvaluationConfig, metadata={"doc": "what is measured of every model"}
    )
    claims: tuple[Claim, ...] = setting((), "what is tested")


@dataclass(frozen=True)
class LoadedStudy:
    """A study with its variants, and the recipe of each of them.

    Attributes:
        name: stem of the file.
        study: its tables.
        scale: which base recipe was taken.
        variants: baseline first.
        recipes: by variant's name, with the first seed.
    """

    name: str
    study: Study
    scale: str
    variants: tuple[Variant, ...]
    recipes: dict[str, Recipe]

    @property
    def baseline(self) -> Variant:
        """What all others are compared with."""
        return self.variants[0]
