"""A model made ready to decode: its weights prepared and its steps compiled once, then any number of prompts."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Unpack

from nextn.decoding.drafters.factory import new_drafter
from nextn.decoding.loop import BatchLoop, Costs
from nextn.decoding.request import DraftLength, DraftSettings, Request, RequestOptions
from nextn.decoding.resolve import given_once, resolve_draft, resolve_request
from nextn.decoding.result import GenerationResult
from nextn.decoding.row import Row, RowRequest
from nextn.decoding.sampling import SamplingConfig
from nextn.decoding.steps import Steps
from nextn.decoding.stream import TokenStream
from nextn.decoding.verify import Verifier
from nextn.decoding.vocabulary import DraftVocabulary
from nextn.errors import GenerationError
from nextn.model.device import require_compiler
from nextn.model.prepared import WeightForm, prepared
from nextn.mtp.model import MTPModel

CAPACITY_MULTIPLE = 64
"""Slots hold a multiple of so many tokens: compiled steps are then used again for prompts of about the same length."""


class Decoder:
    """Decodes prompts with one model, as many at a time as there are slots; one call at a time.

    Args:
        model: trunk and MTP depths.
        draft: how to draft and verify; or give its fields by keyword: `draft_length` is its length, `drafting` its
            convention, `draft_vocabulary` its vocabulary.
        batch_size: slots (B). A list of any length streams through them.
        draft_length, drafter, drafting, min_confidence, draft_vocabulary, verifier: see `DraftSettings`.
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
        draft: DraftSettings | None = None,
        batch_size: int = 1,
        draft_length: DraftLength = None,
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
        named = DraftSettings(drafter, drafting, draft_length, min_confidence, draft_vocabulary, verifier)
        draft, self.policy = resolve_draft(given_once(draft, named), model, compiled)
        if compiled:
            require_compiler(model.trunk.device, "compiled=True or --compile", "leave it out")
        if isinstance(draft.drafter, MTPModel):
            draft = replace(draft, drafter=prepared(draft.drafter, weights))
        self.model, self.batch_size, self.draft = model, batch_size, draft
        self._model = prepared(model, weights)
        self._compiled, self._say = compiled, say
        self._loop: BatchLoop | None = None
        self._current_call = object()

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        request: Request | None = None,
        **options: Unpack[RequestOptions],
    ) -> GenerationResult:
        """Continue each prompt.

        Args:
            prompts: texts (need the model's tokenizer) or token ids; at least one token each.
            request: what is asked for; or give its fields by keyword, as for `nextn.generate`.
            options: the same by keyword.

        Returns, Raises:
            As `nextn.generate`.
        """
        requests, sampling, verifier = self._resolved(prompts, given_once(request, Request.of(**options)))
        done: dict[int, Row] = {}
        for rows in self._decode(requests, sampling, verifier):
            done.update((row.request.number, row) for row in rows)
        costs = Costs() if self._loop is None else self._loop.costs
        ended = [done[number] for number in range(len(requests))]
        return GenerationResult.of_rows(ended, self.model, self.policy.longest, costs)

    def stream(
        self,
        prompts: Sequence[str | Sequence[int]],
        request: Request | None = None,
        **options: Unpack[RequestOptions],
    ) -> TokenStream:
        """The same, as it is decoded: an iterator over pieces, which can be cancelled; arguments as for `generate`."""
        asked = given_once(request, Request.of(**options))
        requests, sampling, verifier = self._resolved(prompts, asked)
        hold_back = max((len(text) - 1 for text in asked.stop), default=0)
        return TokenStream(self._decode(requests, sampling, verifier), self.model, hold_back)

    def _resolved(
        self, prompts: Sequence[str | Sequence[int]], request: Request
    ) -> tuple[list[RowRequest], SamplingConfig, Verifier]:
        rows, verifier = resolve_request(request, self.draft.verifier, self.model, prompts)
        return rows, request.sampling, verifier

    def _decode(
        self, requests: list[RowRequest], sampling: SamplingConfig, verifier: Verifier
    ) -> Generator[list[Row], None, None]:
        loop = self._fitting_loop(requests)
        self._current_call = call = object()
        with self._evaluating():
            for rows in loop.decode(iter(requests), self.policy, sampling, verifier):
                yield rows
                if self._current_call is not call:
                    raise GenerationError(
                        "this stream's slots went to another call of the same decoder; read a stream to its end "
                        "before the next call, decode all prompts in one call, or make a Decoder each"
                    )

    def _fitting_loop(self, requests: Sequence[RowRequest]) -> BatchLoop:
        """The loop of the last call, or a new one where its slots are too few or too short."""
        needed = max((request.num_total for request in requests), default=0)
        context = min(model.trunk.max_position_embeddings for model in self._models)
        capacity = max(needed, min(-(-needed // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE, context))
        num_slots = self.batch_size if self._compiled else min(self.batch_size, max(len(requests), 1))
        if self._loop is None or self._loop.capacity < capacity or self._loop.num_slots < num_slots:
            trunk = self._model.trunk
            steps = Steps(trunk.device, self._compiled, self._say)  # of this loop alone: it keeps compiled steps alive
            drafter = new_drafter(self.draft, self._model, self.policy.longest, num_slots, capacity, steps)
            self._loop = BatchLoop(trunk, drafter, num_slots, capacity, steps)
        return self._loop

    @property
    def _models(self) -> list[MTPModel]:
        """The model that verifies, and the one that drafts if it is another."""
        return [self._model, *([self.draft.drafter] if isinstance(self.draft.drafter, MTPModel) else [])]

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        were_training = [model.training for model in self._models]
        try:
            for model in self._models:
                model.eval()
            yield
        finally:
            for model, was_training in zip(self._models, were_training, strict=True):
                model.train(was_training)
