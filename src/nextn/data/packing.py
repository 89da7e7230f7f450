"""From documents to rows of tokens: packing, the sampler of training rows, validation rows and prompts.

Documents become one stream of tokens, each followed by the end of text, and rows are cut from the stream without
regard to the ends of documents. `document_ids` keeps the document of each token, so that later steps keep documents
apart. A row is T tokens. Labels are the same tokens; only `nextn.alignment` shifts them.

Worked example, documents "ab" and "c" in bytes, T = 4:

    token_ids      97  98 256  99 256
    document_ids    0   0   0   1   1
    a row          [97  98 256  99]   with document ids [0 0 0 1]
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nextn.data.corpora import Document
from nextn.data.tokenizers import Tokenizer
from nextn.errors import DataError


def _no_tokens() -> np.ndarray:
    return np.empty(0, dtype=np.int32)


@dataclass(frozen=True)
class PackedTokens:
    """Documents as one stream.

    Attributes:
        token_ids: all documents in order, each ended by the end of text, int32 [n].
        document_ids: index of the document each token belongs to (its end of text included), 0-based, int32 [n].
        num_bytes: UTF-8 bytes of the text, ends of text not counted: what bits per byte divide by.
        line_end_ids: ids of the tokens whose bytes end with a line feed, perhaps with spaces or tabs after it (the next
            line's indentation), int32; prompts begin after one.
    """

    token_ids: np.ndarray
    document_ids: np.ndarray
    num_bytes: int
    line_end_ids: np.ndarray = field(default_factory=_no_tokens)

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per token, ends of text counted as tokens of no bytes."""
        return self.num_bytes / len(self)


@dataclass(frozen=True)
class Batch:
    """Rows of tokens: `input_ids` and `document_ids`, both int64 [B, T]."""

    input_ids: Tensor
    document_ids: Tensor


def pack(documents: Iterable[Document], tokenizer: Tokenizer) -> PackedTokens:
    """Encode documents and join them, each ended by the tokenizer's end of text. No documents give an empty stream."""
    token_ids: list[np.ndarray] = []
    num_bytes = 0
    end_of_text = np.array([tokenizer.eos_token_id], dtype=np.int32)
    for document in documents:
        token_ids += [tokenizer.encode(document.text), end_of_text]
        num_bytes += len(document.text.encode("utf-8"))
    lengths = [len(tokens) + 1 for tokens in token_ids[::2]]
    line_ends = [i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i).rstrip(b" \t").endswith(b"\n")]
    return PackedTokens(
        token_ids=np.concatenate(token_ids or [_no_tokens()]),
        document_ids=np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
        num_bytes=num_bytes,
        line_end_ids=np.array(line_ends, dtype=np.int32),
    )


# ---------------------------------------------------------------------------------------------------------------- rows


class RowSampler:
    """Training rows in a seeded random order, without end.

    An epoch cuts the stream into rows of T tokens that do not overlap, from a random offset below T on (so that rows
    differ between epochs), and visits each once in a random order; tokens before the offset and after the last whole
    row wait for another epoch. A batch that an epoch cannot fill is filled from the next. Offset and order are
    functions of (seed, epoch) alone, so the whole state is three numbers, and a sampler that loads it goes on bit for
    bit as the one that saved it would have, whatever the batch sizes of either.

    Args:
        packed: the stream, n tokens.
        sequence_length: tokens in a row (T).
        batch_size: rows in a batch (B).
        seed: decides offsets and orders.

    Raises:
        DataError: the stream is shorter than one row.
        ValueError: `sequence_length` or `batch_size` is below 1, or `seed` negative.
    """

    def __init__(self, packed: PackedTokens, sequence_length: int, batch_size: int, seed: int) -> None:
        if sequence_length < 1 or batch_size < 1 or seed < 0:
            raise ValueError(
                "sequence_length and batch_size must be at least 1 and seed at least 0, "
                f"got {sequence_length}, {batch_size} and {seed}"
            )
        require_row(packed, sequence_length, "training")
        self._packed = packed
        self._sequence_length = sequence_length
        self._batch_size = batch_size
        self._seed = seed
        self._index = 0  # rows of the epoch already given out
        self._start_epoch(0)

    def next_batch(self) -> Batch:
        """The next B rows: int64 [B, T] each."""
        starts: list[int] = []
        while len(starts) < self._batch_size:
            if self._index == len(self._row_starts):
                self._index = 0
                self._start_epoch(self._epoch + 1)
            taken = self._row_starts[self._index : self._index + self._batch_size - len(starts)]
            self._index += len(taken)
            starts.extend(taken.tolist())
        return _rows(self._packed, np.array(starts), self._sequence_length)

    def state_dict(self) -> dict[str, int]:
        """The sampler's position (`seed`, `epoch`, `index`) and its stream (`sequence_length`, `num_tokens`)."""
        return {
            "seed": self._seed,
            "epoch": self._epoch,
            "index": self._index,
            "sequence_length": self._sequence_length,
            "num_tokens": len(self._packed),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state, with its seed.

        Raises:
            DataError: the state was saved for another row length or a stream of another length.
        """
        here = self.state_dict()
        for name in ("sequence_length", "num_tokens"):
            if state[name] != here[name]:
                raise DataError(
                    f"cannot resume the order of training rows: it was saved with {name} = {state[name]}, and here "
                    f"{name} = {here[name]}. Resume with the corpus, tokenizer and data settings of the saved run"
                )
        self._seed = state["seed"]
        self._start_epoch(state["epoch"])
        self._index = state["index"]

    def _start_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        random = np.random.default_rng([self._seed, epoch])
        length = self._sequence_length
        offset = int(random.integers(min(length, len(self._packed) - length + 1)))
        num_rows = (len(self._packed) - offset) // length
        self._row_starts = offset + length * random.permutation(num_rows)


def validation_rows(packed: PackedTokens, sequence_length: int, num_rows: int, seed: int = 0) -> Batch:
    """Rows of T tokens spread evenly over the stream, without overlap; the same arguments give the same rows.

    The stream is divided into `num_rows` equal parts, and a row starts at the same seeded offset in each. Where the
    stream has fewer than `num_rows` rows, there are as many as it has: the batch is int64 [min(num_rows, n // T), T].

    Raises:
        DataError: the stream is shorter than one row.
        ValueError: `num_rows` or `sequence_length` is below 1.
    """
    if num_rows < 1 or sequence_length < 1:
        raise ValueError(f"num_rows and sequence_length must be at least 1, got {num_rows} and {sequence_length}")
    require_row(packed, sequence_length, "validation")
    num_rows = min(num_rows, len(packed) // sequence_length)
    part = len(packed) / num_rows
    place = np.random.default_rng(seed).uniform(0, part - sequence_length)
    starts = np.floor(place + part * np.arange(num_rows)).astype(np.int64)
    return _rows(packed, starts, sequence_length)


def _rows(packed: PackedTokens, starts: np.ndarray, sequence_length: int) -> Batch:
    positions = starts[:, None] + np.arange(sequence_length)  # [B, T]
    return Batch(
        input_ids=torch.from_numpy(packed.token_ids[positions].astype(np.int64)),
        document_ids=torch.from_numpy(packed.document_ids[positions].astype(np.int64)),
    )


def require_row(packed: PackedTokens, sequence_length: int, split: str) -> None:
    """Raise DataError unless the stream of `split` ("training" or "validation") holds at least one row."""
    if len(packed) < sequence_length:
        raise DataError(
            f"the {split} part of the corpus has {len(packed)} tokens, fewer than one row of data.sequence_length = "
            f"{sequence_length}; lower sequence_length or take a longer corpus"
            + (" (or a larger data.validation_share)" if split == "validation" else "")
        )


# -------------------------------------------------------------------------------------------------------------- prompts


def validation_prompts(
    packed: PackedTokens, prompt_length: int, continuation_length: int, num_prompts: int, seed: int = 0
) -> list[np.ndarray]:
    """Prompts cut from held-out documents, with what follows: int32 [prompt_length + continuation_length] each.

    They come from as many different documents as there are, chosen evenly over the stream, and in the order of the
    stream. A prompt and its continuation lie within one document and do not contain its end of text. A prompt starts at
    the start of the document or of a line; where lines are too few, anywhere. The same arguments give the same prompts,
    and no two start at the same token.

    Args:
        packed: the held-out stream.
        prompt_length: tokens in a prompt.
        continuation_length: tokens of the document after it; may be 0.
        num_prompts: how many.
        seed: decides documents and positions.

    Raises:
        DataError: the documents have too few tokens for that many prompts of that length.
        ValueError: `prompt_length` or `num_prompts` is below 1, or `continuation_length` negative.
    """
    if prompt_length < 1 or num_prompts < 1 or continuation_length < 0:
        raise ValueError(
            "prompt_length and num_prompts must be at least 1 and continuation_length at least 0, "
            f"got {prompt_length}, {num_prompts} and {continuation_length}"
        )
    length = prompt_length + continuation_length
    random = np.random.default_rng(seed)
    ends = np.flatnonzero(np.diff(packed.document_ids, append=-1))  # where each document's end of text is
    starts = np.concatenate([[0], ends[:-1] + 1])
    documents = np.flatnonzero(ends - starts >= length)
    if len(documents) > num_prompts:  # one in each of num_prompts equal parts of the list
        part = len(documents) / num_prompts
        documents = documents[np.floor(random.uniform(0, part) + part * np.arange(num_prompts)).astype(np.int64)]
    # Every document gives its best place; more are taken from all of them together, the best kind of place first.
    candidates = [
        (rank > 0, kind, rank, place)
        for document in documents
        for rank, (kind, place) in enumerate(
            _prompt_places(packed, int(starts[document]), int(ends[document]), length, num_prompts, random)
        )
    ]
    found = sorted(place for *_, place in sorted(candidates)[:num_prompts])
    if len(found) < num_prompts:
        raise DataError(
            f"prompts wanted: {num_prompts}, of {prompt_length} tokens, each followed by {continuation_length} more in "
            f"its document; the held-out documents have room for {len(found)}. Ask for fewer prompts, shorter ones or "
            "fewer new tokens, or set a larger data.validation_share"
        )
    return [packed.token_ids[start : start + length].copy() for start in found]


def _prompt_places(
    packed: PackedTokens, start: int, end: int, length: int, at_most: int, random: np.random.Generator
) -> list[tuple[int, int]]:
    """(kind, place) for up to `at_most` places in the document of tokens start..end-1, best (lowest) kind first."""
    places = np.arange(start, end - length + 1)
    at_line = np.isin(packed.token_ids[places - 1], packed.line_end_ids) | (places == start)
    kinds = (~at_line).astype(np.int64)
    order = np.lexsort([random.random(len(places)), kinds])[:at_most]
    return list(zip(kinds[order].tolist(), places[order].tolist(), strict=True))
