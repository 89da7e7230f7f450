"""Prompts cut from texts, so that what comes after is a completion: inside functions, or after words."""

from __future__ import annotations

import ast
import bisect
import itertools
import re
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from nextn.data import Document, Tokenizer
from nextn.data.corpora import hash_position
from nextn.errors import DataError, GenerationError

T = TypeVar("T")

UNREADABLE = (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError)
"""What Python raises for source that it cannot read; the last two for brackets nested too deep."""

LONGEST_TOKEN = 32
"""Characters that a prompt's tokens are looked for in, each; only white space has much longer ones."""


def completions(
    documents: Sequence[Document],
    places: Callable[[str], list[int]],
    tokenizer: Tokenizer,
    opening: Sequence[int],
    prompt_length: int,
    num_prompts: int,
) -> tuple[list[int], ...]:
    """Prompts of exactly `prompt_length` tokens, each the end of a document's text before one of its places.

    Every document gives one prompt before any gives two. Documents come in the order of a hash of their names, which
    also shuffles each one's places, so that a prompt stays when other documents are added or changed.

    Args:
        documents: texts.
        places: characters after which a text may be cut, ascending.
        tokenizer: of the prompts.
        opening: ids that open every prompt and count as its tokens.
        prompt_length: in tokens.
        num_prompts: how many.

    Raises:
        DataError: there is no room for so many.
        GenerationError: the opening fills the prompt.
    """
    length = prompt_length - len(opening)
    if length < 1:
        raise GenerationError(
            f"prompts of {prompt_length} tokens have no room for text: {len(opening)} special tokens open every text"
        )
    ends = round_robin(documents, lambda document: _ends_of(document, places, tokenizer, length))
    found = tuple([*opening, *end] for end in itertools.islice(ends, num_prompts))
    if len(found) < num_prompts:
        raise DataError(
            f"prompts wanted: {num_prompts}, of {prompt_length} tokens; the {len(documents)} documents that the model "
            f"was not trained on have room for {len(found)}. Ask for fewer prompts or shorter ones, or give more text"
        )
    return found


def round_robin(documents: Sequence[Document], candidates: Callable[[Document], Iterator[T]]) -> Iterator[T]:
    """Candidates of all documents, in the order of a hash of their names; each gives one before any gives two.

    >>> documents = [Document("a", "12"), Document("b", "345")]
    >>> list(round_robin(documents, lambda document: iter(document.text)))
    ['3', '1', '4', '2', '5']
    """
    waiting = deque(candidates(one) for one in sorted(documents, key=lambda document: hash_position(document.name)))
    while waiting:
        of_one = waiting.popleft()
        for candidate in itertools.islice(of_one, 1):
            yield candidate
            waiting.append(of_one)


def _ends_of(
    document: Document, places: Callable[[str], list[int]], tokenizer: Tokenizer, length: int
) -> Iterator[list[int]]:
    """The `length` tokens before each place that has as many before it, in an order that depends on the name only."""

    def before(place: int) -> np.ndarray:
        return tokenizer.encode(document.text[max(0, place - LONGEST_TOKEN * length) : place])[-length:]

    found = places(document.text)
    first = bisect.bisect_left(found, length, key=lambda place: len(before(place)))
    order = np.random.default_rng(int(hash_position(document.name) * 2**53)).permutation(len(found) - first)
    for number in order:
        token_ids = before(found[first + number])
        if len(token_ids) == length:
            yield token_ids.tolist()


def inside_functions(text: str) -> list[int]:
    """Where Python source is cut: before the middle statement of each function's body, and never before its second.

    A function of one statement, or on one line, gives no place, and text that is not Python (as this interpreter reads
    it) gives none. Returns numbers of characters, ascending; the text before a place ends without white space.

    >>> source = "def f(x):\\n    y = x + 1\\n    return y\\n"
    >>> [source[:place] for place in inside_functions(source)]
    ['def f(x):\\n    y = x + 1']
    """
    tree = read_python(text)
    if tree is None:
        return []
    line_starts = [0, *(match.end() for match in re.finditer(r"\r\n?|\n", text))]
    places = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and len(node.body) > 1:
            statement = node.body[len(node.body) // 2]
            if statement.lineno > (node.body[0].end_lineno or 0):
                places.add(len(text[: line_starts[statement.lineno - 1]].rstrip()))
    return sorted(places)


def read_python(text: str) -> ast.Module | None:
    """The syntax tree of Python source; None if it is not Python, as this interpreter reads it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the text's own escapes and comparisons
            return ast.parse(text)
    except UNREADABLE:
        return None


def after_words(text: str) -> list[int]:
    """Where a story is cut: before white space that more text follows. Returns numbers of characters, ascending.

    >>> after_words("Once upon\\n a time ")
    [4, 9, 12]
    """
    return [match.start() for match in re.finditer(r"(?<=\S)\s+(?=\S)", text)]
