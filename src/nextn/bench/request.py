"""What a user asks of `nextn bench`: read from the options' text, and refused here where it contradicts itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from nextn.bench.arms import ADAPTIVE, DraftLength
from nextn.bench.peer_engines import check_peers
from nextn.bench.peers import TRANSFORMERS
from nextn.decoding.resolve import resolve_verifier
from nextn.decoding.sampling import SamplingConfig
from nextn.decoding.verify import VERIFIERS
from nextn.errors import GenerationError
from nextn.evaluation.prompts import check_prompt_set

USUAL = {"batch_sizes": "1", "temperatures": "0,1", "context": ""}
FULL = {"batch_sizes": "1,4,16", "temperatures": "0,1", "context": "128,768"}
"""What is measured, without and with `--full`, where an option does not say otherwise."""

FULL_DRAFT_LENGTH = 5

LOSSY = tuple(name for name, verifier in VERIFIERS.items() if not verifier.is_lossless)

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class BenchRequest:
    """Everything that `nextn bench` is asked for. Nothing is loaded yet.

    Attributes:
        path: a checkpoint or a run folder.
        prompts: names of prompt sets; empty: the usual one of the checkpoint.
        num_prompts: prompts decoded of each set; None: as many as the set usually has.
        prompt_lengths: in tokens, for sets that are cut to order; None: as the set has them.
        max_new_tokens: tokens per prompt, at least 2; None: as trained, or 128.
        batch_sizes: rows decoded at a time.
        temperatures: 0 is greedy.
        num_repeats: how often each arm is timed.
        draft_lengths: N, and "adaptive"; None: the usual ones of the model.
        usual_draft_length: the longest of the usual N, as far as the scheme can draft; None: as trained.
        drafting: how the MTP depths draft (`engine_drafts`); None: as is usual for the scheme.
        compiled: compile the steps, unless the drafting is an engine's.
        verifier: a lossy one, which adds an arm; None: no such arm.
        draft_model, standard, parallel: checkpoints of other models to measure (`arms_of`).
        peers: names of other engines.
        peers_are_wanted: the user named them, so one that cannot serve the model is an error and not a note.
        engines: folder in which engines are installed.
        device, dtype: where and in what the models compute.

    Raises:
        GenerationError: a number out of range, or a verifier that adds no lossy arm.
        ConfigError: an engine that is unknown or not installed.
        DataError: an unknown prompt set.
    """

    path: Path
    prompts: tuple[str, ...] = ()
    num_prompts: int | None = None
    prompt_lengths: tuple[int | None, ...] = (None,)
    max_new_tokens: int | None = None
    batch_sizes: tuple[int, ...] = (1,)
    temperatures: tuple[float, ...] = (0.0, 1.0)
    num_repeats: int = 3
    draft_lengths: tuple[DraftLength, ...] | None = None
    usual_draft_length: int | None = None
    drafting: str | None = None
    compiled: bool = True
    verifier: str | None = None
    draft_model: Path | None = None
    standard: Path | None = None
    parallel: Path | None = None
    peers: tuple[str, ...] = (TRANSFORMERS,)
    peers_are_wanted: bool = False
    engines: Path = Path(".engines")
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for temperature in self.temperatures:
            SamplingConfig(temperature)
        if min((*self.batch_sizes, *(length for length in self.prompt_lengths if length is not None))) < 1:
            raise GenerationError(
                f"--batch-sizes and --context take numbers above 0, got {list(self.batch_sizes)} and "
                f"{list(self.prompt_lengths)}"
            )
        if self.verifier is not None:
            if self.verifier.partition(":")[0] not in LOSSY:
                raise GenerationError(f"--verifier adds a lossy arm: {', '.join(LOSSY)}; got {self.verifier!r}")
            resolve_verifier(self.verifier, SamplingConfig())
        check_peers(self.peers, self.engines)
        for name in self.prompts:
            check_prompt_set(name)

    @property
    def other_models(self) -> dict[str, Path]:
        """The paths of other models that were named, by key of `approaches.NAMES`."""
        named = {"standard": self.standard, "draft_model": self.draft_model, "parallel": self.parallel}
        return {key: path for key, path in named.items() if path is not None}


def numbers(option: str, text: str, kind: Callable[[str], Number]) -> tuple[Number, ...]:
    """Numbers separated by commas, each once, in their order. Raises GenerationError.

    >>> numbers("--batch-sizes", "1,4,1", int)
    (1, 4)
    """
    try:
        return tuple(dict.fromkeys(kind(part) for part in text.split(","))) if text else ()
    except ValueError:
        raise GenerationError(f"{option} takes numbers separated by commas, such as 1,4; got {text!r}") from None


def draft_lengths_of(text: str) -> tuple[DraftLength, ...]:
    """Each N once, in growing order, adaptive last. Raises GenerationError.

    >>> draft_lengths_of("3,adaptive,1,3")
    (1, 3, 'adaptive')
    """
    parts = [part.strip() for part in text.split(",")]
    try:
        fixed = {int(part) for part in parts if part != ADAPTIVE}
    except ValueError:
        raise GenerationError(
            f"--draft-lengths takes whole numbers and adaptive, separated by commas, such as 1,2,3,adaptive; "
            f"got {text!r}"
        ) from None
    return (*sorted(fixed), *([ADAPTIVE] if ADAPTIVE in parts else []))


def peers_of(text: str) -> tuple[str, ...]:
    """Names of engines separated by commas, each once.

    >>> peers_of("vllm, transformers,vllm"), peers_of("none")
    (('vllm', 'transformers'), ())
    """
    return tuple(name for name in dict.fromkeys(part.strip() for part in text.split(",")) if name not in ("", "none"))
