"""A whole `nextn bench`: the prompts of every setting, all arms in every setting, the other engines, the approaches."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from nextn.bench.approaches import Approach, approaches, trained_model
from nextn.bench.arms import CHECKPOINT, PARALLEL, STANDARD, Arm
from nextn.bench.figures import Setting, SettingFigures
from nextn.bench.peer_engines import peer_arms
from nextn.bench.peers import PeerFigures, measure_peers, our_arm, peer_figures
from nextn.bench.timing import Runner, measure_setting
from nextn.config import EvaluationConfig
from nextn.errors import ExportError, GenerationError
from nextn.evaluation.prompts import CODE, HELD_OUT, STORY, USUAL_NEW_TOKENS, PromptSet, prompt_set
from nextn.mtp import MTPModel
from nextn.provenance import without_absolute_paths
from nextn.training import read_recipe
from nextn.wording import plural


def prompt_sets(
    names: Sequence[str],
    lengths: Sequence[int | None],
    model: MTPModel,
    folder: Path,
    num_prompts: int | None,
    max_new_tokens: int | None,
    largest_batch: int,
    say: Callable[[str], None],
) -> list[tuple[str, PromptSet]]:
    """Every set at every length, with its name; lengths that the model has no room for are cut to what fits.

    Sets of texts stay as long as they are, so they come once. A set that is cut to order fills the largest batch.
    """
    found: dict[tuple[str, int | None], tuple[str, PromptSet]] = {}
    for name in names:
        number, is_cut = num_prompts, name in (HELD_OUT, CODE) or name.partition(":")[0] == STORY
        if number is None and is_cut and largest_batch > EvaluationConfig().num_prompts:
            number = largest_batch
        new_tokens = max_new_tokens or _usual_new_tokens(name, folder)
        room = model.trunk.max_position_embeddings - new_tokens
        for length in lengths:
            shortened = length if length is None else min(length, room)
            if shortened is not None and shortened < 1:
                raise GenerationError(
                    f"{new_tokens} new tokens leave no room for a prompt in the context of "
                    f"{model.trunk.max_position_embeddings}; ask for fewer with --max-new-tokens"
                )
            given = prompt_set(name, model, folder, number, new_tokens, shortened if is_cut else None, say)
            found.setdefault((name, given.source.get("prompt_length")), (without_absolute_paths(name), given))
    return list(found.values())


def _usual_new_tokens(name: str, folder: Path) -> int:
    recipe = folder / "recipe.json"
    return read_recipe(recipe).evaluation.max_new_tokens if name == HELD_OUT and recipe.exists() else USUAL_NEW_TOKENS


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        settings: each with its prompts.
        arms: what decodes.
        num_repeats: timed, of each arm.
        peers: names of other engines.
        peers_are_wanted: the user named them, so that one which cannot serve the model is an error, not a note.
        engines: where they are installed.
        dtype: of the weights.
        folder: the checkpoint.
        model: the same.
    """

    settings: tuple[tuple[Setting, PromptSet], ...]
    arms: tuple[Arm, ...]
    num_repeats: int
    peers: tuple[str, ...]
    peers_are_wanted: bool
    engines: Path
    dtype: str
    folder: Path
    model: MTPModel

    @property
    def num_runs(self) -> int:
        """Decodings of all arms in all settings; other engines are not counted."""
        return len(self.settings) * len(self.arms) * (2 * self.num_repeats + 1)


class Progress(Protocol):
    """Who is told how far it is."""

    def begin(self, text: str) -> None:
        """A setting begins."""
        ...

    def describe(self, text: str) -> None:
        """What is being done now."""
        ...

    def advance(self, arm: str) -> None:
        """A run of that arm is done."""
        ...


def measure(plan: Plan, progress: Progress) -> tuple[list[SettingFigures], tuple[PeerFigures, ...], list[str]]:
    """All settings, the peers, and notes for the reader.

    Decoders are made once for a batch size, and its longest rows come first: what is compiled for them serves the
    shorter ones.
    """
    figures: dict[int, SettingFigures] = {}
    found: list[PeerFigures] = []
    notes: list[str] = []
    for batch_size in dict.fromkeys(setting.batch_size for setting, _ in plan.settings):
        own = [number for number, (setting, _) in enumerate(plan.settings) if setting.batch_size == batch_size]
        runners = [Runner(arm, batch_size, progress.describe) for arm in plan.arms]
        for number in sorted(own, key=lambda number: -_longest_row(plan.settings[number][1])):
            setting, given = plan.settings[number]
            progress.begin(f"{setting.name}: {plural(len(plan.arms), 'arm')}")
            figures[number] = measure_setting(
                setting,
                runners,
                given.prompts,
                given.source,
                max_new_tokens=given.max_new_tokens,
                num_repeats=plan.num_repeats,
                progress=progress.advance,
            )
            if plan.peers and (batch_size, setting.temperature) == (1, 0.0):
                progress.begin(f"{setting.name}: nextn beside {', '.join(plan.peers)}")
                try:
                    found += _measure_peers(plan, figures[number], given, runners, progress)
                except ExportError as error:
                    if plan.peers_are_wanted:
                        raise
                    notes.append(f"other engines were not measured: {error}")
    if plan.peers_are_wanted and plan.peers and not found:
        notes.append("other engines are compared greedily at batch 1, which was not asked for")
    return [figures[number] for number in range(len(plan.settings))], tuple(found), notes


def _measure_peers(
    plan: Plan, figures: SettingFigures, given: PromptSet, runners: Sequence[Runner], progress: Progress
) -> tuple[PeerFigures, ...]:
    """Our fastest plain arm and our fastest MTP arm of one N, beside the other engines."""
    ours = []
    for drafter in (None, "mtp"):
        best = figures.fastest(CHECKPOINT, drafter, fixed=True)
        for runner in runners:
            if best is not None and runner.arm.name == best.name:
                ours.append(our_arm(best.draft_length or 0, runner.decoder.generate))
    tried = [runner.arm.draft_length for runner in runners if runner.arm.drafter == "mtp"]
    lengths = sorted({length for length in tried if isinstance(length, int)})
    with (
        tempfile.TemporaryDirectory() as work,
        peer_arms(
            plan.peers,
            plan.folder,
            plan.model,
            lengths,
            Path(work),
            engines=plan.engines,
            dtype=plan.dtype,
            say=progress.describe,
        ) as theirs,
    ):
        arms = [*ours, *theirs]
        measure_peers(arms, given.prompts, given.max_new_tokens, plan.num_repeats, progress.describe)
        tokenizer = plan.model.tokenizer
        return peer_figures(arms, None if tokenizer is None else tokenizer.eos_token_id, figures.setting.name)


def _longest_row(given: PromptSet) -> int:
    return max(map(len, given.prompts)) + given.max_new_tokens


def approaches_of(
    folders: dict[str, Path], models: dict[str, MTPModel], figures: SettingFigures
) -> tuple[Approach, ...]:
    """The four approaches with what was measured in one setting.

    Args:
        folders: checkpoints, by key of `approaches.NAMES`; `mtp` is the one that is measured.
        models: the same, loaded.
        figures: of the setting.
    """
    target = STANDARD if "standard" in models else CHECKPOINT
    chosen = {
        "standard": figures.fastest(STANDARD, None),
        "mtp": figures.fastest(CHECKPOINT, "mtp"),
        "draft_model": figures.fastest(target, "draft_model"),
        "parallel": figures.fastest(PARALLEL, "mtp"),
    }
    plain = figures.fastest(target, None)
    assert plain is not None, "plain decoding is always measured"
    trained = {
        key: trained_model(folders[key], model)
        for key, model in models.items()
        if key != "mtp" or model.scheme is not None
    }
    return approaches(
        trained,
        {key: (arm.name, statistics.median(arm.decode_tok_per_s)) for key, arm in chosen.items() if arm is not None},
        statistics.median(plain.decode_tok_per_s),
    )
