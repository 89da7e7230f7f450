"""What a `nextn bench` measures: the models loaded, the arms that they give, and every scenario with its prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nextn.bench.arms import ADAPTIVE, Arm, DraftLength, arms_of
from nextn.bench.figures import Scenario
from nextn.bench.request import BenchRequest
from nextn.config import EvaluationConfig
from nextn.decoding.drafters.engine_drafts import AS_TRAINED, RECYCLED, usual_drafting
from nextn.decoding.resolve import longest_draft, policy_of, resolve_draft_length
from nextn.errors import GenerationError
from nextn.evaluation.prompts import CODE, HELD_OUT, STORY, USUAL_NEW_TOKENS, PromptSet, prompt_set
from nextn.interop.load import load
from nextn.mtp import MTPModel, find_checkpoint
from nextn.provenance import without_absolute_paths
from nextn.training import read_recipe


@dataclass(frozen=True)
class BenchPlan:
    """A request with its models.

    Attributes:
        request: what was asked.
        prompt_sets: every set that is decoded, once.
        scenarios: each with its prompts.
        arms: what decodes.
        drafting: how the MTP depths draft.
        folders: checkpoints, by key of `approaches.NAMES`; `mtp` is the one that is measured.
        models: the same, loaded.
    """

    request: BenchRequest
    prompt_sets: tuple[PromptSet, ...]
    scenarios: tuple[tuple[Scenario, PromptSet], ...]
    arms: tuple[Arm, ...]
    drafting: str
    folders: dict[str, Path]
    models: dict[str, MTPModel]

    @property
    def num_runs(self) -> int:
        """Decodings of all arms in all scenarios; other engines are not counted."""
        return len(self.scenarios) * len(self.arms) * (2 * self.request.num_repeats + 1)

    @property
    def emulates_an_engine(self) -> bool:
        """Whether drafts are made as an engine makes them, eagerly."""
        return emulates_an_engine(self.drafting)

    @property
    def compiled(self) -> bool:
        """Whether the steps are compiled."""
        return self.request.compiled and not self.emulates_an_engine


def plan_bench(request: BenchRequest, say: Callable[[str], None] = lambda _: None) -> BenchPlan:
    """Load the models and cut the prompts. Raises NextnError for what the models cannot do.

    Args:
        request: what is asked.
        say: called with a progress message before each slow step.
    """
    folders = {"mtp": find_checkpoint(request.path)}
    folders |= {key: find_checkpoint(path) for key, path in request.other_models.items()}
    models = {key: load(folder, device=request.device, dtype=request.dtype) for key, folder in folders.items()}
    model = models["mtp"]
    if request.parallel is not None and models["parallel"].scheme is None:
        raise GenerationError(
            f"--parallel {request.parallel} has no MTP depths, so it cannot draft; name one that was trained with them"
        )
    drafting = request.drafting or usual_drafting(model.scheme)
    arms = arms_of(
        model,
        draft_lengths_for(model, request, drafting),
        compiled=request.compiled and not emulates_an_engine(drafting),
        drafting=drafting,
        verifier=request.verifier,
        draft_model=models.get("draft_model"),
        standard=models.get("standard"),
        parallel=models.get("parallel"),
    )
    named = named_prompt_sets(request, model, folders["mtp"], say)
    scenarios = tuple(
        (Scenario(name, given.source.get("prompt_length"), size, temperature), given)
        for size in request.batch_sizes
        for name, given in named
        for temperature in request.temperatures
    )
    prompt_sets = tuple(given for _, given in named)
    return BenchPlan(request, prompt_sets, scenarios, tuple(arms), drafting, folders, models)


def emulates_an_engine(drafting: str) -> bool:
    """Whether a way to draft is an engine's."""
    return drafting not in (AS_TRAINED, RECYCLED)


def draft_lengths_for(model: MTPModel, request: BenchRequest, drafting: str) -> list[DraftLength]:
    """The N to measure, in growing order, adaptive last.

    Where no N is wanted: 1 to `request.usual_draft_length`, as far as the scheme can draft, and adaptive.
    Raises GenerationError for an N that this model cannot draft.
    """
    if request.draft_lengths is None:
        return _usual_draft_lengths(model, request.usual_draft_length, drafting)
    fixed = {resolve_draft_length(model, length, drafting) for length in request.draft_lengths if length != ADAPTIVE}
    lengths: list[DraftLength] = sorted(fixed - {0})
    if ADAPTIVE in request.draft_lengths:
        if emulates_an_engine(drafting) or policy_of(ADAPTIVE, longest_draft(model)).longest == 0:
            raise GenerationError(
                "adaptive needs MTP depths, drafting as no engine does; leave it out of --draft-lengths"
            )
        lengths.append(ADAPTIVE)
    return lengths


def _usual_draft_lengths(model: MTPModel, usual: int | None, drafting: str) -> list[DraftLength]:
    longest = resolve_draft_length(model, None, drafting)
    if emulates_an_engine(drafting):
        return [longest] if drafting == "transformers" else list(range(1, longest + 1))
    if usual is not None and longest:
        most = longest_draft(model)
        longest = usual if most is None else min(usual, most)
    return [*range(1, longest + 1), ADAPTIVE] if longest else []


def named_prompt_sets(
    request: BenchRequest, model: MTPModel, folder: Path, say: Callable[[str], None] = lambda _: None
) -> list[tuple[str, PromptSet]]:
    """Every prompt set at every length, with its name; lengths that the model has no room for are cut to what fits.

    Sets of texts stay as long as they are, so they come once. A set that is cut to order fills the largest batch.
    """
    found: dict[tuple[str, int | None], tuple[str, PromptSet]] = {}
    for name in request.prompts or [HELD_OUT if (folder / "recipe.json").exists() else CODE]:
        number, is_cut = request.num_prompts, name in (HELD_OUT, CODE) or name.partition(":")[0] == STORY
        if number is None and is_cut and max(request.batch_sizes) > EvaluationConfig().num_prompts:
            number = max(request.batch_sizes)
        new_tokens = request.max_new_tokens or _usual_new_tokens(name, folder)
        room = model.trunk.max_position_embeddings - new_tokens
        for length in request.prompt_lengths:
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
