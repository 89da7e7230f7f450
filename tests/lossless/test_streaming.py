"""A stream gives, piece by piece, what `generate` gives at once; it can be cancelled from anywhere."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from nextn.data.tokenizers import REPLACEMENT, ByteTokenizer, SavedTokenizer
from nextn.decoding import Decoder, Piece
from nextn.decoding.row import Row, RowRequest
from nextn.decoding.stopping import StopStrings
from nextn.decoding.stream import _GrowingText
from nextn.errors import GenerationError
from nextn.mtp import MTPModel

from .conftest import random_model
from .test_batches import byte_model, num_held_tensors

PROMPTS = ["abca", "b", "cé", "→→b", "aacb"]
SETTINGS: dict[str, Any] = {"max_new_tokens": 30, "eos_token_id": None}


def decoder(batch_size: int = 2, draft_length: int = 3) -> Decoder:
    return Decoder(byte_model(), batch_size=batch_size, draft_length=draft_length)


def joined(pieces: list[Piece], number: int) -> tuple[str, tuple[int, ...], tuple[int, ...], str | None]:
    own = [piece for piece in pieces if piece.number == number]
    assert all(piece.finish_reason is None for piece in own[:-1]), "only the last piece ends a row"
    return (
        "".join(piece.text for piece in own),
        sum((piece.token_ids for piece in own), ()),
        sum((piece.origins for piece in own), ()),
        own[-1].finish_reason if own else None,
    )


@pytest.mark.parametrize("stop", [(), ("ca",), ("bb", "c→"), ("é", "abcabc")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_joined_pieces_are_the_result_of_generate(stop: tuple[str, ...], temperature: float, batch_size: int):
    arguments = {**SETTINGS, "stop": stop, "temperature": temperature}
    whole = decoder(batch_size).generate(PROMPTS, **arguments)
    pieces = list(decoder(batch_size).stream(PROMPTS, **arguments))
    for number in range(len(PROMPTS)):
        expected = (whole.texts, whole.token_ids, whole.origins, whole.finish_reasons)
        assert joined(pieces, number) == tuple(part[number] for part in expected)
    assert len(pieces) > 2 * len(PROMPTS), "text comes in several pieces"
    for text in stop:
        assert not any(text in piece.text for piece in pieces)


# ---------------------------------------------------------------------------------------------- characters and strings


def shown(tokenizer: Any, chunks: list[list[int]], stop: tuple[str, ...] = ()) -> tuple[list[str], str]:
    """Pieces of a row that gets these tokens cycle by cycle, and its text as `generate` cuts it."""
    model = random_model(0)
    model.tokenizer = tokenizer
    rows = StopStrings(stop, tokenizer) if stop else None
    row = Row(RowRequest(0, [0], sum(map(len, chunks)), stop=None if rows is None else rows.new_row()))
    growing, pieces = _GrowingText(model, max((len(text) - 1 for text in stop), default=0)), []
    for chunk in chunks:
        row.emit(chunk, [0] * len(chunk))
        pieces.append(growing.grow(row))
        if row.finish_reason is not None:
            break
    text = tokenizer.decode(row.token_ids)
    return pieces, text if row.num_chars is None else text[: row.num_chars]


def chunks_of(token_ids: list[int], sizes: list[int]) -> list[list[int]]:
    chunks, start = [], 0
    for size in sizes:
        chunks.append(token_ids[start : start + size])
        start += size
    return [chunk for chunk in [*chunks, token_ids[start:]] if chunk]


TEXTS = st.text(alphabet="ab é→😀", min_size=1, max_size=12)


@given(text=TEXTS, sizes=st.lists(st.integers(1, 4), max_size=12), stop=st.lists(TEXTS, max_size=2))
@settings(derandomize=True, deadline=None)
def test_no_character_is_torn_and_no_stop_string_is_shown(text: str, sizes: list[int], stop: list[str]):
    pieces, whole = shown(ByteTokenizer(), chunks_of(list(text.encode()), sizes), tuple(stop))
    assert "".join(pieces) == whole
    assert not any(REPLACEMENT in piece for piece in pieces)
    ends = [text.encode().find(string.encode()) + len(string.encode()) for string in stop if string in text]
    if ends:
        assert text.encode()[: min(ends)].decode(errors="ignore").startswith(whole)
    assert not any(string in whole for string in stop)


def test_text_is_shown_as_soon_as_it_is_sure():
    pieces, _ = shown(ByteTokenizer(), [[byte] for byte in "a→bSTx".encode()], ("STOP",))
    assert pieces == ["", "", "", "", "", "a", "→", "bSTx"]
    pieces, _ = shown(ByteTokenizer(), [[byte] for byte in "a→b".encode()])
    assert pieces == ["a", "", "", "→", "b"]


def test_bytes_that_are_no_text_are_shown_as_generate_shows_them():
    pieces, whole = shown(ByteTokenizer(), [[0xFF], [0x61], [0xE2, 0x86], [0x62], [0xC3]])
    assert "".join(pieces) == whole == "\ufffda\ufffdb\ufffd"


def spaces_before_words() -> SavedTokenizer:
    """SentencePiece-like: a token's space is not shown at the beginning of a text."""
    words = {"▁": 0, "▁the": 1, "▁cat": 2, "s": 3, "</s>": 4}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(words, unk_token="▁"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["</s>"])
    return SavedTokenizer(tokenizer, "</s>", {})


def test_a_space_that_decoding_drops_at_the_beginning_is_not_streamed_either():
    pieces, whole = shown(spaces_before_words(), [[1], [2], [3, 1]])
    assert whole == "the cats the"
    assert pieces == ["the", " cat", "s the"]


def test_a_model_without_a_tokenizer_streams_tokens():
    model = random_model(0)
    pieces = list(Decoder(model, draft_length=2).stream([[1, 2]], max_new_tokens=6))
    assert {piece.text for piece in pieces} == {""}
    assert joined(pieces, 0)[1] == Decoder(model, draft_length=0).generate([[1, 2]], max_new_tokens=6).token_ids[0]


# ---------------------------------------------------------------------------------------------------------- cancelling


def test_a_cancelled_row_ends_with_a_piece_that_says_so_and_the_others_go_on():
    whole = decoder().generate(PROMPTS, **SETTINGS)
    stream = decoder().stream(PROMPTS, **SETTINGS)
    pieces = []
    for piece in stream:
        pieces.append(piece)
        if piece.number == 0 and len(pieces) == 5:
            stream.cancel(0)
    text, token_ids, _, reason = joined(pieces, 0)
    assert reason == "cancelled"
    assert 0 < len(token_ids) < 30
    assert token_ids == whole.token_ids[0][: len(token_ids)]
    assert whole.texts[0].startswith(text)
    for number in range(1, len(PROMPTS)):
        assert joined(pieces, number)[:2] == (whole.texts[number], whole.token_ids[number])


def test_the_last_text_of_a_cancelled_row_is_not_held_back():
    stream = decoder(1).stream(["abca"], **SETTINGS, stop=["never said by this model"])
    first = next(stream)
    stream.cancel(0)
    pieces = [first, *stream]
    text, token_ids, _, reason = joined(pieces, 0)
    assert (text, reason) == (ByteTokenizer().decode(token_ids), "cancelled")


def test_a_cancelled_rows_place_goes_to_the_next_prompt():
    stream = decoder(batch_size=1).stream(PROMPTS, **SETTINGS)
    numbers = []
    for piece in stream:
        numbers.append(piece.number)
        if piece.finish_reason is None:
            stream.cancel(piece.number)
    assert numbers == [number for prompt in range(len(PROMPTS)) for number in (prompt, prompt)]


def test_a_prompt_cancelled_before_it_began_is_hardly_decoded():
    stream = decoder(batch_size=1).stream(PROMPTS[:2], **SETTINGS)
    stream.cancel(1)
    _, token_ids, _, reason = joined(list(stream), 1)
    assert (len(token_ids), reason) == (1, "cancelled")


def test_cancelling_everything_ends_the_stream_and_leaves_the_decoder_ready():
    model: MTPModel = byte_model().train()
    used = Decoder(model, batch_size=2, draft_length=2, weights="as_stored")
    stream = used.stream(PROMPTS, **SETTINGS)
    next(stream)
    stream.cancel()
    assert list(stream) == [] or len(list(stream)) <= 2
    assert list(stream) == []
    assert model.training, "the mode it had before"
    model.eval()
    assert used.generate(PROMPTS, **SETTINGS).texts == decoder().generate(PROMPTS, **SETTINGS).texts


def test_a_stream_is_cancelled_from_another_thread():
    stream = decoder().stream(PROMPTS[:2], max_new_tokens=50, eos_token_id=None)
    pieces, begun, cancelled = [], threading.Event(), threading.Event()

    def cancel() -> None:
        begun.wait()
        stream.cancel()
        cancelled.set()

    thread = threading.Thread(target=cancel)
    thread.start()
    for piece in stream:
        pieces.append(piece)
        begun.set()
        cancelled.wait()
    thread.join()
    assert 1 <= len(pieces) <= 4
    assert max(len(joined(pieces, number)[1]) for number in range(2)) < 50


def test_async_for_gives_the_pieces_and_leaves_the_event_loop_free():
    async def collect() -> tuple[list[Piece], int]:
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        counting = asyncio.create_task(count())
        pieces = [piece async for piece in decoder().stream(PROMPTS, **SETTINGS)]
        counting.cancel()
        return pieces, turns

    pieces, turns = asyncio.run(collect())
    assert pieces == list(decoder().stream(PROMPTS, **SETTINGS))
    assert turns > 5, "another task ran in between"


def test_a_task_can_cancel_a_stream_that_another_reads():
    async def collect() -> list[Piece]:
        stream = decoder().stream(PROMPTS, **SETTINGS)
        pieces = []
        async for piece in stream:
            pieces.append(piece)
            if len(pieces) == 3:
                await asyncio.create_task(asyncio.to_thread(stream.cancel))
        return pieces

    assert 3 <= len(asyncio.run(collect())) <= 4


def test_cancelled_streams_leave_no_tensor_behind():
    used = decoder(batch_size=2)

    def cancelled() -> None:
        stream = used.stream(PROMPTS, **SETTINGS)
        next(stream)
        stream.cancel()
        list(stream)

    cancelled()
    before = num_held_tensors()
    for _ in range(20):
        cancelled()
    assert num_held_tensors() <= before


def test_a_stream_whose_places_another_call_took_says_so_and_gives_no_wrong_text():
    used = decoder(batch_size=1)
    stream = used.stream(PROMPTS[:1], **SETTINGS)
    next(stream)
    assert used.generate(PROMPTS, **SETTINGS).texts == decoder().generate(PROMPTS, **SETTINGS).texts
    with pytest.raises(GenerationError, match="went to another call of the same decoder"):
        list(stream)
