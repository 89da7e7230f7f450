"""A model made ready to decode: its weights prepared and its steps compiled once, then any number of prompts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, TypedDict, Unpack

from nextn.decoding.baselines import DraftModelDrafter, PromptLookupDrafter
from nextn.decoding.batch import Batch, Costs, Rules
from nextn.decoding.draft import Drafter
from nextn.decoding.engine_drafts import AS_TRAINED, RECYCLED, SINGLE_CACHE, usual_drafting
from nextn.decoding.mtp_drafts import DraftOptions, MTPDrafter
from nextn.decoding.policy import policy_of
from nextn.decoding.request import (
    check_counts,
    longest_draft,
    prompt_token_ids,
    resolve_draft_length,
    resolve_verifier,
)
from nextn.decoding.result import GenerationResult
from nextn.decoding.rows import Job, Row
from nextn.decoding.sampling import SamplingConfig
from nextn.decoding.single_cache import SingleCacheDrafter
from nextn.decoding.steps import Steps
from nextn.decoding.stopping import StopStrings
from nextn.decoding.stream import TokenStream
from nextn.decoding.verify import Verifier
from nextn.decoding.vocabulary import DraftVocabulary
from nextn.errors import GenerationError
from nextn.model.device import require_compiler
from nextn.model.prepared import WeightForm, prepared
from nextn.mtp.model import MTPModel

CAPACITY_MULTIPLE = 64
"""Places hold a multiple of so many tokens: compiled steps are then used again for prompts of about the same length."""

PROMPT_LOOKUP = "prompt_lookup"


class Asked(TypedDict, total=False):
    """What a call asks for beside its prompts; meaning and defaults as for `nextn.generate`."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    seed: int | Sequence[int]
    eos_token_id: int | Literal["auto"] | None
    stop: Sequence[str]


class Decoder:
    """Decodes prompts with one model, as many at a time as there are places; one call at a time.

    Args:
        model: trunk and MTP depths.
        batch_size: places (B). A list of any length streams through them.
        draft_length: N, tokens drafted per cycle; 0 is plain decoding; "adaptive" takes the N with the most tokens per
            second, down to 0; None: 3, or as many as can be drafted.
        drafter: "mtp", "prompt_lookup", or another model of the same vocabulary that drafts.
        drafting: "as_trained", "recycled", or as an engine would draft (`engine_drafts`); None: recycled where one
            module serves all depths, which is cheaper, else as trained.
        min_confidence: end a draft when the product of its probabilities falls below.
        draft_vocabulary: the only tokens that are drafted; verification keeps all.
        verifier: "auto" (lossless), "exact", "rejection", or a lossy one, "threshold" or "typical"; or a `Verifier`.
        weights: "packed" (the same numbers, read faster), "as_stored", or "int8", which is another model.
        compiled: compile the steps: seconds to minutes once, for each N, batch size and sampler.
        say: told what is being compiled.

    Raises:
        GenerationError: settings that contradict each other or that this model cannot serve.
    """

    def __init__(
        self,
        model: MTPModel,
        *,
        batch_size: int = 1,
        draft_length: int | Literal["adaptive"] | None = None,
        drafter: str | MTPModel = "mtp",
        drafting: str | None = None,
        min_confidence: float | None = None,
        draft_vocabulary: DraftVocabulary | None = None,
        verifier: str | Verifier = "auto",
        weights: WeightForm = "packed",
        compiled: bool = False,
        say: Callable[[str], None] = lambda _: None,
    ):
        if batch_size < 1:
            raise GenerationError(f"batch_size must be at least 1, got {batch_size}")
        self.model, self.batch_size, self.verifier = model, batch_size, verifier
        self._drafter_name = drafter if isinstance(drafter, str) else "model"
        if self._drafter_name not in ("mtp", PROMPT_LOOKUP, "model"):
            raise GenerationError(f"unknown drafter {drafter!r}; there are: mtp, {PROMPT_LOOKUP}, or a model")
        drafts_with_mtp = self._drafter_name == "mtp"
        if not drafts_with_mtp and (min_confidence, draft_vocabulary, drafting) != (None, None, None):
            raise GenerationError(
                f"min_confidence, draft_vocabulary and drafting are about MTP drafts; the drafter is "
                f"{drafter if isinstance(drafter, str) else 'another model'}"
            )
        if drafting is None:
            drafting = usual_drafting(model.scheme) if min_confidence is None else AS_TRAINED
        if drafting == RECYCLED and min_confidence is not None:
            raise GenerationError("min_confidence needs drafting = 'as_trained'")
        emulated = drafting in SINGLE_CACHE and drafting != RECYCLED
        if emulated and (compiled, min_confidence, draft_vocabulary) != (False, None, None):
            raise GenerationError(
                f"drafting = {drafting!r} emulates an engine eagerly and as it drafts: without compiled steps, "
                "min_confidence and draft_vocabulary"
            )
        if draft_length is None or isinstance(draft_length, int):
            draft_length = resolve_draft_length(model if drafts_with_mtp else None, draft_length, drafting)
        self.policy = policy_of(draft_length, longest_draft(model) if drafts_with_mtp else None, min_confidence)
        self._drafting, self._options = drafting, DraftOptions(min_confidence, draft_vocabulary)
        if compiled:
            require_compiler(model.trunk.device, "compiled=True or --compile", "leave it out")
        self._model = prepared(model, weights)
        self._draft_model = None if isinstance(drafter, str) else prepared(drafter, weights)
        self._compiled, self._say = compiled, say
        self._batch: Batch | None = None
        self._current_call = object()

    def generate(self, prompts: Sequence[str | Sequence[int]], **asked: Unpack[Asked]) -> GenerationResult:
        """Continue each prompt; arguments, result and errors as for `nextn.generate`."""
        jobs, rules = self._checked(prompts, **asked)
        done: dict[int, Row] = {}
        for rows in self._decode(jobs, rules):
            done.update((row.job.number, row) for row in rows)
        costs = Costs() if self._batch is None else self._batch.costs
        ended = [done[number] for number in range(len(jobs))]
        return GenerationResult.of_rows(ended, self.model, self.policy.longest, costs)

    def stream(self, prompts: Sequence[str | Sequence[int]], **asked: Unpack[Asked]) -> TokenStream:
        """The same, as it is decoded: an iterator over pieces, which can be cancelled; arguments as for `generate`."""
        jobs, rules = self._checked(prompts, **asked)
        hold_back = max((len(text) - 1 for text in asked.get("stop", ())), default=0)
        return TokenStream(self._decode(jobs, rules), self.model, hold_back)

    def _decode(self, jobs: list[Job], rules: Rules) -> Generator[list[Row], None, None]:
        batch = self._fitting_batch(jobs)
        self._current_call = call = object()
        with self._evaluating():
            for rows in batch.decode(iter(jobs), self.policy, rules):
                yield rows
                if self._current_call is not call:
                    raise GenerationError(
                        "this stream's places went to another call of the same decoder; read a stream to its end "
                        "before the next call, decode all prompts in one call, or make a Decoder each"
                    )

    def _fitting_batch(self, jobs: Sequence[Job]) -> Batch:
        """The batch of the last call, or a new one where its places are too few or too short."""
        needed = max((job.num_total for job in jobs), default=0)
        models = [self.model] if self._draft_model is None else [self.model, self._draft_model]
        context = min(model.trunk.max_position_embeddings for model in models)
        capacity = max(needed, min(-(-needed // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE, context))
        num_places = self.batch_size if self._compiled else min(self.batch_size, max(len(jobs), 1))
        if self._batch is None or self._batch.capacity < capacity or self._batch.num_places < num_places:
            self._batch = self._new_batch(num_places, capacity)
        return self._batch

    def _new_batch(self, num_places: int, capacity: int) -> Batch:
        trunk, scheme = self._model.trunk, self._model.scheme
        steps = Steps(trunk.device, self._compiled, self._say)  # of this batch alone, which compiled steps keep alive
        drafter: Drafter | None = None
        if self.policy.longest:
            if self._drafter_name == PROMPT_LOOKUP:
                drafter = PromptLookupDrafter(num_places)
            elif self._draft_model is not None:
                drafter = DraftModelDrafter(self._draft_model.trunk, trunk.vocab_size, num_places, capacity, steps)
            elif scheme is not None and self._drafting in SINGLE_CACHE:
                convention = SINGLE_CACHE[self._drafting]
                drafter = SingleCacheDrafter(trunk, scheme, num_places, capacity, convention, steps, self._options)
            elif scheme is not None:
                drafter = MTPDrafter(trunk, scheme, num_places, capacity, self.policy.longest, steps, self._options)
        return Batch(trunk, drafter, num_places, capacity, steps)

    def _checked(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int | Sequence[int] = 0,
        eos_token_id: int | Literal["auto"] | None = "auto",
        stop: Sequence[str] = (),
    ) -> tuple[list[Job], Rules]:
        """What is asked of one call, checked, with what was left out filled in."""
        if isinstance(prompts, str):
            raise ValueError("prompts is a list of prompts, got a single string; write [prompt]")
        sampling = SamplingConfig(temperature, top_k, top_p, min_p, repetition_penalty=repetition_penalty)
        if sampling.is_greedy and (top_k, top_p, min_p) != (None, None, None):
            warnings.warn("top_k, top_p and min_p have no effect at temperature 0 (greedy)", stacklevel=4)
        if eos_token_id == "auto":
            eos_token_id = None if self.model.tokenizer is None else self.model.tokenizer.eos_token_id
        rules = Rules(sampling, resolve_verifier(self.verifier, sampling), eos_token_id)
        seeds = check_counts(len(prompts), max_new_tokens, seed)
        strings = StopStrings(stop, self.model.tokenizer) if stop else None
        jobs = [
            Job(
                number,
                prompt_token_ids(self.model, prompt, number, max_new_tokens),
                max_new_tokens,
                seeds[number],
                None if strings is None else strings.new_row(),
            )
            for number, prompt in enumerate(prompts)
        ]
        return jobs, rules

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        models = [self._model] if self._draft_model is None else [self._model, self._draft_model]
        were_training = [model.training for model in models]
        try:
            for model in models:
                model.eval()
            yield
        finally:
            for model, was_training in zip(models, were_training, strict=True):
                model.train(was_training)
