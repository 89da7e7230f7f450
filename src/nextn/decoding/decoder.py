"""A model made ready to decode: its weights prepared and its steps compiled once, then any number of prompts."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from nextn.data.tokenizers import REPLACEMENT
from nextn.decoding.baselines import DraftModelDrafter, PromptLookupDrafter
from nextn.decoding.batch import Batch, Costs, Rules
from nextn.decoding.draft import Drafter, DraftOptions, MTPDrafter
from nextn.decoding.engine_drafts import AS_TRAINED, RECYCLED, SINGLE_CACHE, SingleCacheDrafter, usual_drafting
from nextn.decoding.policy import DraftPolicy, policy_of
from nextn.decoding.request import (
    check_counts,
    longest_draft,
    prompt_token_ids,
    resolve_draft_length,
    resolve_verifier,
)
from nextn.decoding.rows import FinishReason, Job, Row
from nextn.decoding.sampling import SamplingConfig
from nextn.decoding.statistics import AcceptanceStatistics
from nextn.decoding.steps import Steps
from nextn.decoding.stopping import StopStrings
from nextn.decoding.verify import Verifier
from nextn.decoding.vocabulary import DraftVocabulary
from nextn.errors import GenerationError
from nextn.model.prepared import WeightForm, prepared
from nextn.mtp.model import MTPModel

CAPACITY_MULTIPLE = 64
"""Places hold a multiple of so many tokens: compiled steps are then used again for prompts of about the same length."""

PROMPT_LOOKUP = "prompt_lookup"


@dataclass(frozen=True)
class GenerationResult:
    """What was generated, one entry per prompt, and what it took.

    Attributes:
        texts: the new text, without the prompt, a final EOS or a stop string; empty tuple if the model has no
            tokenizer.
        token_ids: the new tokens, a final EOS or the token that completes a stop string included.
        origins: where each new token came from: 0 = the trunk (first token, correction or bonus), k = the k-th draft of
            its cycle, accepted.
        finish_reasons: "eos", "stop" (a stop string), "length" (`max_new_tokens` were emitted) or "cancelled".
        stats: accepted lengths of all rows' cycles.
        num_changed_tokens: accepted drafts that the lossless verifier would have refused; 0 unless a lossy one ran.
        num_trunk_forwards: trunk forwards in all, of the whole batch each, prompts included.
        costs: seconds spent on what.
    """

    texts: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]
    origins: tuple[tuple[int, ...], ...]
    finish_reasons: tuple[FinishReason, ...]
    stats: AcceptanceStatistics
    num_changed_tokens: int
    num_trunk_forwards: int
    costs: Costs

    @property
    def prefill_s(self) -> float:
        """Seconds spent reading prompts with the trunk and choosing each first token."""
        return self.costs.prefill_s

    @property
    def decode_s(self) -> float:
        """Seconds for all further tokens; the drafter's reading of the prompts is part of it."""
        return self.costs.draft_s + self.costs.verify_s

    @property
    def decode_tok_per_s(self) -> float:
        """New tokens per second of decoding; each row's first token, which reading the prompt gives, is not counted."""
        num_tokens = sum(len(ids) - 1 for ids in self.token_ids if ids)
        return num_tokens / self.decode_s if num_tokens else 0.0

    @property
    def changed_share(self) -> float:
        """Share of the new tokens that a lossy verifier changed; 0 without one."""
        return self.num_changed_tokens / max(sum(map(len, self.token_ids)), 1)


@dataclass(frozen=True)
class Piece:
    """What one cycle added to one prompt.

    Attributes:
        number: which prompt.
        text: new text; a character or possible stop string that is not complete yet comes with a later piece.
        token_ids: new tokens.
        origins: as in `GenerationResult`.
        finish_reason: why the row ended; None while it goes on.
    """

    number: int
    text: str
    token_ids: tuple[int, ...]
    origins: tuple[int, ...]
    finish_reason: FinishReason | None


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
                f"min_confidence, draft_vocabulary and drafting are about MTP drafts; the drafter is {drafter!r}"
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
        longest = longest_draft(model) if drafts_with_mtp else None
        if draft_length is None or isinstance(draft_length, int):
            draft_length = resolve_draft_length(model if drafts_with_mtp else None, draft_length, drafting)
        self._draft_length: int | Literal["adaptive"] = draft_length
        self._min_confidence, self._longest = min_confidence, longest
        self.policy: DraftPolicy = self._new_policy()
        self._drafting, self._options = drafting, DraftOptions(min_confidence, draft_vocabulary)
        self._model = prepared(model, weights)
        self._draft_model = None if isinstance(drafter, str) else prepared(drafter, weights)
        self._compiled, self._say = compiled, say
        self._batch: Batch | None = None
        self._current_call = object()

    def generate(
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
    ) -> GenerationResult:
        """Continue each prompt; arguments, result and errors as for `nextn.generate`."""
        sampling = SamplingConfig(temperature, top_k, top_p, min_p, repetition_penalty=repetition_penalty)
        rules = self._rules(sampling, eos_token_id)
        jobs = self._jobs(prompts, max_new_tokens, seed, stop)
        done: dict[int, Row] = {}
        with self._evaluating():
            for rows in self._decode(jobs, rules):
                done.update((row.job.number, row) for row in rows)
        return self._result([done[number] for number in range(len(jobs))])

    def stream(
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
    ) -> TokenStream:
        """The same, as it is decoded: an iterator over pieces, which can be cancelled; arguments as for `generate`."""
        sampling = SamplingConfig(temperature, top_k, top_p, min_p, repetition_penalty=repetition_penalty)
        rules = self._rules(sampling, eos_token_id)
        jobs = self._jobs(prompts, max_new_tokens, seed, stop)
        hold_back = max((len(text) - 1 for text in stop), default=0)
        return TokenStream(self._streamed(jobs, rules), self.model, hold_back)

    def _streamed(self, jobs: list[Job], rules: Rules) -> Generator[list[Row], None, None]:
        with self._evaluating():
            yield from self._decode(jobs, rules)

    def _decode(self, jobs: list[Job], rules: Rules) -> Iterator[list[Row]]:
        needed = max((job.num_total for job in jobs), default=0)
        models = [self.model] if self._draft_model is None else [self.model, self._draft_model]
        context = min(model.trunk.max_position_embeddings for model in models)
        capacity = max(needed, min(-(-needed // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE, context))
        num_places = self.batch_size if self._compiled else min(self.batch_size, max(len(jobs), 1))
        if self._batch is None or self._batch.capacity < capacity or self._batch.num_places < num_places:
            self._batch = self._new_batch(num_places, capacity)
        self.policy = self._new_policy() if self.policy.longest == 0 else self.policy
        self._current_call = call = object()
        for rows in self._batch.decode(iter(jobs), self.policy, rules):
            yield rows
            if self._current_call is not call:
                raise GenerationError(
                    "this stream's places went to another call of the same decoder; read a stream to its end before "
                    "the next call, decode all prompts in one call, or make a Decoder each"
                )

    def _new_batch(self, num_places: int, capacity: int) -> Batch:
        trunk, scheme = self._model.trunk, self._model.scheme
        steps = Steps(
            trunk.device, self._compiled, self._say
        )  # a compiled step belongs to one batch and keeps it alive
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

    def _new_policy(self) -> DraftPolicy:
        return policy_of(self._draft_length, self._longest, self._min_confidence)

    def _rules(self, sampling: SamplingConfig, eos_token_id: int | Literal["auto"] | None) -> Rules:
        if sampling.is_greedy and (sampling.top_k, sampling.top_p, sampling.min_p) != (None, None, None):
            warnings.warn("top_k, top_p and min_p have no effect at temperature 0 (greedy)", stacklevel=4)
        if eos_token_id == "auto":
            eos_token_id = None if self.model.tokenizer is None else self.model.tokenizer.eos_token_id
        return Rules(sampling, resolve_verifier(self.verifier, sampling), eos_token_id)

    def _jobs(
        self,
        prompts: Sequence[str | Sequence[int]],
        max_new_tokens: int,
        seed: int | Sequence[int],
        stop: Sequence[str],
    ) -> list[Job]:
        if isinstance(prompts, str):
            raise ValueError("prompts is a list of prompts, got a single string; write [prompt]")
        seeds = check_counts(len(prompts), max_new_tokens, seed)
        strings = StopStrings(stop, self.model.tokenizer) if stop else None
        return [
            Job(
                number,
                prompt_token_ids(self.model, prompt, number, max_new_tokens),
                max_new_tokens,
                seeds[number],
                None if strings is None else strings.new_row(),
            )
            for number, prompt in enumerate(prompts)
        ]

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

    def _result(self, rows: Sequence[Row]) -> GenerationResult:
        costs = Costs() if self._batch is None else self._batch.costs
        return GenerationResult(
            texts=() if self.model.tokenizer is None else tuple(_text(self.model, row) for row in rows),
            token_ids=tuple(tuple(row.token_ids) for row in rows),
            origins=tuple(tuple(row.origins) for row in rows),
            finish_reasons=tuple(row.finish_reason or "cancelled" for row in rows),
            stats=AcceptanceStatistics.of_cycles(self.policy.longest, [cycle for row in rows for cycle in row.cycles]),
            num_changed_tokens=sum(row.num_changed for row in rows),
            num_trunk_forwards=costs.num_prefills + sum(costs.num_cycles.values()),
            costs=costs,
        )


class TokenStream:
    """Pieces of text as they are decoded; `for piece in stream`, or `async for`, which leaves the event loop free.

    `cancel` may be called from any thread or task: the rows end before the next cycle, and their places go to others.
    """

    def __init__(self, cycles: Generator[list[Row], None, None], model: MTPModel, hold_back: int):
        self._cycles, self._model, self._hold_back = cycles, model, hold_back
        self._rows: dict[int, Row] = {}
        self._texts: dict[int, _GrowingText] = {}
        self._cancelled: set[int] = set()
        self._all_cancelled = False
        self._waiting: list[Piece] = []

    def cancel(self, number: int | None = None) -> None:
        """End prompt `number`, or all of them (None), those included that have not begun."""
        if number is None:
            self._all_cancelled = True
        else:
            self._cancelled.add(number)
        for row in list(self._rows.values()):
            row.is_cancelled |= self._all_cancelled or row.job.number in self._cancelled

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        """Raises StopIteration when all rows have ended or all were cancelled."""
        while not self._waiting:
            if self._all_cancelled:
                self._cycles.close()
                raise StopIteration
            for row in next(self._cycles):
                self._take(row)
        return self._waiting.pop(0)

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """Each cycle runs in a worker thread."""
        while True:
            piece = await asyncio.to_thread(next, self, None)
            if piece is None:
                return
            yield piece

    def _take(self, row: Row) -> None:
        number = row.job.number
        if number not in self._texts:
            self._rows[number] = row
            self._texts[number] = _GrowingText(self._model, self._hold_back)
            row.is_cancelled |= self._all_cancelled or number in self._cancelled
        text = self._texts[number]
        if text.is_finished or (len(row.token_ids) == text.num_tokens and row.finish_reason is None):
            return
        first = text.num_tokens
        new_text = text.grow(row)
        if row.finish_reason is not None:
            del self._rows[number]
        self._waiting.append(
            Piece(number, new_text, tuple(row.token_ids[first:]), tuple(row.origins[first:]), row.finish_reason)
        )


class _GrowingText:
    """The text of a row so far, cut where no character is torn and no stop string may be under way.

    All of the row is decoded anew each time: what a token's text is can depend on the tokens before it.
    """

    def __init__(self, model: MTPModel, hold_back: int):
        self._model, self._hold_back = model, hold_back
        self._num_shown = 0
        self.num_tokens = 0
        self.is_finished = False

    def grow(self, row: Row) -> str:
        """Text that can be shown since the last call."""
        self.num_tokens, self.is_finished = len(row.token_ids), row.finish_reason is not None
        if self._model.tokenizer is None:
            return ""
        text = _text(self._model, row)
        if not self.is_finished:
            text = text.rstrip(REPLACEMENT)  # of a torn character
            text = text[: max(len(text) - self._hold_back, self._num_shown)]
        new_text = text[self._num_shown :]
        self._num_shown += len(new_text)
        return new_text


def _text(model: MTPModel, row: Row) -> str:
    assert model.tokenizer is not None, "texts need a tokenizer"
    token_ids = row.token_ids[:-1] if row.finish_reason == "eos" else row.token_ids
    text = model.tokenizer.decode(token_ids)
    return text if row.num_chars is None else text[: row.num_chars]
