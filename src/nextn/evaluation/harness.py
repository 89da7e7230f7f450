"""A checkpoint as lm-evaluation-harness sees a model: what continuations are worth, and what it writes.

Only the main head is scored: no MTP depth is computed for a log-likelihood. Generation decodes with MTP, losslessly, so
that it is faster and not different. Text is cut into tokens as the harness's own adapter of transformers models does
(`lm_eval.models.huggingface.HFLM`, lm-eval 0.4.13), with one exception: characters that spell a special token stay
characters. The rows scored and the decoding are ours.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nextn.data.text_marks import TextMarks
from nextn.data.tokenizers import Tokenizer
from nextn.decoding import generate
from nextn.decoding.resolve import resolve_draft_length
from nextn.errors import ConfigError, DataError, GenerationError
from nextn.mtp import MTPModel
from nextn.objective import HeadInput, chunked_predictions

try:
    import lm_eval.utils  # type: ignore[import-untyped]
    from lm_eval.api.model import TemplateLM  # type: ignore[import-untyped]
    from lm_eval.models.utils import normalize_gen_kwargs  # type: ignore[import-untyped]
    from tqdm import tqdm  # type: ignore[import-untyped]
except ModuleNotFoundError as error:
    raise ConfigError(
        f"--tasks needs lm-evaluation-harness, and {error.name} is not installed; install it with pip install lm-eval"
    ) from None

CHUNK_SIZE = 1024
"""Positions whose logits are held at once."""

USUAL_NEW_TOKENS = 256
"""Tokens generated where a task sets no limit, as in the harness's own models."""

FIRST_STAGE = 32
"""Greedy text is looked through for stop strings after this many tokens, and then whenever it has doubled."""

NEUTRAL_SETTINGS = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1, "length_penalty": 1}
"""Settings of other decoders, with the value that asks for nothing."""


class HarnessModel(TemplateLM):
    """The harness's model interface over an `MTPModel`.

    Args:
        model: with a tokenizer; put into evaluation mode.
        marks: what its tokenizer puts around texts.
        batch_size: rows scored at once; results do not depend on it but for rounding.
        draft_length: N, tokens drafted per cycle when generating; 0 is plain decoding, None what `generate` takes.
            Greedy texts do not depend on it.

    Attributes:
        num_truncated: how many requests of each kind lost tokens at the left because they exceed the context.
    """

    def __init__(self, model: MTPModel, marks: TextMarks, batch_size: int = 8, draft_length: int | None = None) -> None:
        super().__init__()
        if model.tokenizer is None:
            raise DataError("the model has no tokenizer; tasks are texts, and need one")
        self.model = model.eval()
        self.text: Tokenizer = model.tokenizer
        self.marks, self.batch_size = marks, batch_size
        self.draft_length = resolve_draft_length(model, draft_length)
        self.num_truncated = {"loglikelihood": 0, "generate_until": 0}

    @property
    def eot_token_id(self) -> int:
        """Id of the end of text."""
        return self.text.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Id that stands before a text without context."""
        return self.marks.prefix

    @property
    def max_length(self) -> int:
        """Most tokens that the model reads at once."""
        return self.model.trunk.max_position_embeddings

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text, after what opens every text unless `add_special_tokens` is false."""
        opening = () if add_special_tokens is False else self.marks.opening
        return [*opening, *self.text.encode(string).tolist()]

    # ------------------------------------------------------------------------------------------------ log-likelihoods

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each (context, continuation): log-probability of the continuation in nats, and whether it is greedy's.

        Raises DataError for a continuation without tokens of its own, or longer than the model's context.
        """
        for request in requests:
            if request.args[1] == "":
                raise DataError(f"task {request.task_name}: a continuation is empty, so it has no probability")
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, in nats; texts beyond the context are read in windows, none twice."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            rolling = lm_eval.utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [lm_eval.utils.make_disjoint_window(window) for window in rolling]
            windows += [(None, context, continuation) for context, continuation in pairs]
            owners += [owner] * len(pairs)
        totals = [0.0] * len(requests)
        for owner, (log_probability, _is_greedy) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += log_probability
        return totals

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Score continuations given as tokens, longest rows first; equal rows are computed once."""
        requests_of: dict[tuple[int, ...], list[int]] = {}
        for number, (_text, context, continuation) in enumerate(requests):
            requests_of.setdefault(self._row(context, continuation), []).append(number)
        rows = sorted(requests_of, key=len, reverse=True)
        answers: dict[int, tuple[float, bool]] = {}
        with _progress(len(requests), "log-likelihoods") as bar:
            for first in range(0, len(rows), self.batch_size):
                batch = rows[first : first + self.batch_size]
                asked = [(index, number) for index, row in enumerate(batch) for number in requests_of[row]]
                spans = [(index, len(batch[index]), requests[number][2]) for index, number in asked]
                for (_index, number), answer in zip(asked, self._score(batch, spans), strict=True):
                    answers[number] = answer
                bar.update(len(asked))
        return [answers[number] for number in range(len(requests))]

    def _row(self, context: list[int], continuation: list[int]) -> tuple[int, ...]:
        """What the model reads: all but the last token, cut at the left to the model's context.

        Worked example, context [A B C], continuation [D E]: it reads [A B C D], whose last two states predict D and E;
        with a `max_length` of 3, [B C D].
        """
        if not continuation:
            raise DataError(
                "a continuation has no tokens of its own: together with the end of its context it is encoded as the "
                "context alone; change where the task cuts the two"
            )
        if len(continuation) > self.max_length:
            raise DataError(
                f"a continuation has {len(continuation)} tokens, and the model reads {self.max_length} at most "
                "(max_position_embeddings); take a task with shorter ones"
            )
        self.num_truncated["loglikelihood"] += len(context) + len(continuation) > self.max_length + 1
        return tuple([*context, *continuation][-self.max_length - 1 : -1])

    def _score(
        self, rows: Sequence[tuple[int, ...]], spans: Sequence[tuple[int, int, list[int]]]
    ) -> list[tuple[float, bool]]:
        """Log-probabilities in nats, and whether every token is the likeliest, from one forward of the trunk.

        Args:
            rows: token ids, of unequal lengths; the longer ones' places are filled at the right, where attention is
                causal and nothing looks.
            spans: index of a row, its length n, and a continuation of m tokens, predicted by states n-m..n-1.
        """
        longest, device = max(map(len, rows)), self.model.trunk.device
        padded = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
        (read,) = self.model.head_inputs(padded, depths=())
        hidden = torch.cat([read.hidden[index, end - len(ids) : end] for index, end, ids in spans])
        labels = torch.tensor([token_id for *_, ids in spans for token_id in ids], device=device)
        nats, choices = chunked_predictions(HeadInput(hidden[None], read.weight, read.bias), labels[None], CHUNK_SIZE)
        lengths = [len(ids) for *_, ids in spans]
        hits = (choices[0] == labels).split(lengths)
        return [
            (-float(part.double().sum()), bool(hit.all()))
            for part, hit in zip(nats[0].split(lengths), hits, strict=True)
        ]

    # ----------------------------------------------------------------------------------------------------- generation

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Each context's continuation, up to the first stop string, the end of text or the task's limit of tokens.

        Contexts that leave no room for the limit are cut at the left. Random numbers of a sampled text depend on the
        request's place in the list only.

        Raises:
            GenerationError: the limit exceeds the model's context, or the task asks for another kind of decoding.
        """
        texts = []
        for number, request in enumerate(_progress(requests, "generation")):
            context, settings = request.args
            texts.append(self._continue(context, _Decoding.of_task(settings, request.task_name), number))
        return texts

    def _continue(self, context: str, decoding: _Decoding, number: int) -> str:
        room = self.max_length - decoding.max_new_tokens
        if room < 1:
            raise GenerationError(
                f"a task asks for {decoding.max_new_tokens} new tokens (generation_kwargs.max_gen_toks) and the model "
                f"reads {self.max_length} in all (max_position_embeddings); set a lower limit in the task"
            )
        prompt = self.tok_encode(context) or [self.prefix_token_id]
        self.num_truncated["generate_until"] += len(prompt) > room
        prompt = prompt[-room:]
        stop_ids = {self.marks.special[stop] for stop in decoding.until if stop in self.marks.special}
        new_ids: list[int] = []
        while True:
            num_left = decoding.max_new_tokens - len(new_ids)
            is_greedy = decoding.sampling["temperature"] == 0
            result = generate(
                self.model,
                [prompt + new_ids],
                max_new_tokens=min(num_left, max(FIRST_STAGE, len(new_ids))) if is_greedy else num_left,
                draft_length=self.draft_length,
                seed=number,
                **decoding.sampling,
            )
            new_ids += result.token_ids[0]
            ended = result.finish_reasons[0] == "eos" or len(new_ids) >= decoding.max_new_tokens
            if stop_ids & set(new_ids):
                new_ids, ended = new_ids[: min(new_ids.index(i) for i in stop_ids if i in new_ids)], True
            text = self.text.decode(new_ids)
            if ended or any(stop in text for stop in decoding.until):
                return _before_first(text, decoding.until)


@dataclass(frozen=True)
class _Decoding:
    """How a task wants text: stop strings, most new tokens, and `generate`'s sampling settings."""

    until: tuple[str, ...]
    max_new_tokens: int
    sampling: dict[str, Any]

    @classmethod
    def of_task(cls, settings: Mapping[str, Any], task: str | None) -> _Decoding:
        """From a task's `generation_kwargs`, read as the harness reads them: greedy unless a temperature is set."""
        table = dict(normalize_gen_kwargs(dict(settings), USUAL_NEW_TOKENS))
        until = tuple(stop for stop in table.pop("until") if stop)
        max_new_tokens = table.pop("max_gen_toks")
        sampling = {"temperature": table.pop("temperature", 0.0)}
        filters = {name: table.pop(name, None) for name in ("top_k", "top_p", "min_p")}
        if sampling["temperature"] > 0:
            sampling |= filters
        table.pop("do_sample")
        unknown = [name for name, value in table.items() if NEUTRAL_SETTINGS.get(name) != value]
        if unknown:
            raise GenerationError(
                f"task {task}: generation_kwargs has {', '.join(unknown)}, which nextn's decoding does not do; it "
                "knows until, max_gen_toks, do_sample, temperature, top_k, top_p and min_p"
            )
        return cls(until, max_new_tokens, sampling)


def _before_first(text: str, stops: Iterable[str]) -> str:
    """The text up to the first of the stop strings.

    >>> _before_first("4\\nQ: 2", ["Q:", "\\n"])
    '4'
    """
    for stop in stops:
        text = text.partition(stop)[0]
    return text


def _progress(what: int | Sequence[Any], name: str) -> Any:
    """A bar with rate and time left, on standard error; a line every ten seconds where that is no terminal."""
    sized = {"total": what} if isinstance(what, int) else {"iterable": what}
    return tqdm(**sized, desc=name, unit="request", mininterval=0.1 if sys.stderr.isatty() else 10.0)
