"""Measures how much sampled Python parses: prompts from held-out functions, and a parser of their completions."""

from __future__ import annotations

import ast
import codeop
import itertools
import re
import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from nextn.data import Document
from nextn.data.corpora import hash_position
from nextn.evaluation.completions import UNREADABLE, read_python, round_robin


def _any(prompt: str) -> bool:
    return True


def function_prompts(
    documents: Sequence[Document], num_prompts: int, fits: Callable[[str], bool] = _any, seed: int = 0
) -> tuple[str, ...]:
    """Beginnings of top-level functions: their lines from `def` on, up to the first statement of the body.

    Every document gives one function before any gives two. Documents come in the order of a hash of their names, the
    functions of each in an order that depends on its name and the seed, so a prompt stays when other documents change.
    Documents that are not Python, as this interpreter reads it, give none, and neither do functions on one line.

    Args:
        documents: texts of any kind.
        num_prompts: how many at most; there are fewer where the documents have no more.
        fits: says of a prompt whether it is short enough.
        seed: 0 or more.

    >>> source = "import os\\n\\n@cache\\ndef f(\\n    x,\\n):\\n    return x\\n\\ndef g(): pass\\n"
    >>> function_prompts([Document("a.py", source), Document("b.txt", "Once upon a time")], num_prompts=8)
    ('def f(\\n    x,\\n):\\n',)
    """
    found = round_robin(documents, lambda document: _shuffled_functions(document, fits, seed))
    return tuple(itertools.islice(found, num_prompts))


def _shuffled_functions(document: Document, fits: Callable[[str], bool], seed: int) -> Iterator[str]:
    found = _function_beginnings(document.text)
    random = np.random.default_rng([seed, int(hash_position(document.name) * 2**53)])
    for index in random.permutation(len(found)):
        if fits(found[index]):
            yield found[index]


def _function_beginnings(text: str) -> list[str]:
    tree = read_python(text)
    if tree is None:
        return []
    lines = re.findall(r".*?(?:\r\n?|\n)|.+", text, re.DOTALL)  # as Python counts them
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    prompts = []
    for function in functions:
        first = function.body[0]
        decorators = getattr(first, "decorator_list", [])
        body_line = min([first.lineno, *(decorator.lineno for decorator in decorators)]) - 1
        before = lines[body_line].encode("utf-8")[: first.col_offset]
        if not before.strip():  # otherwise the body begins on the signature's line
            prompts.append("".join(lines[function.lineno - 1 : body_line]))
    return prompts


def parses(prompt: str, completion: str, *, is_ended: bool = False) -> bool | None:
    """Whether the function that a model went on with is Python; what the limit on its length cut off is forgiven.

    1. The function is over at the first line of the completion that is not blank and begins at column 0: it and what
       follows are left out. Then, and where the text ended by itself, the whole function must parse.
    2. Otherwise the limit cut the text. The last line is left out if it has no end. Of what is left, the last lines are
       left out one by one as long as the text is a correct beginning that lacks its end (an open bracket or string, a
       header without a block). It is a beginning, not an error, where Python's parser reads it to the end before it
       stumbles. A function that parses after that does, one with an error does not.
    3. If no statement is left then, nothing can be said: None. That is a docstring longer than the limit, mostly: of
       the standard library's own functions, cut after 128 bytes, two in three parse and all others are such.

    Args:
        prompt: the function's beginning, with its line end.
        completion: the text after it.
        is_ended: the text ended by itself (end of text), not by a limit on its length.

    Worked examples: over at "print"; an error before that; cut inside a bracket, after a whole statement and before
    any; an error that no end could repair; the same text, cut and ended.

    >>> parses("def f(x):\\n", "    return x\\n\\nprint(f(")
    True
    >>> parses("def f(x):\\n", "    return x)\\n\\nprint(f(")
    False
    >>> parses("def f(x):\\n", "    y = x\\n    return g(y,\\n        x")
    True
    >>> parses("def f(x):\\n", "    return g(x,\\n      ") is None
    True
    >>> parses("def f(x):\\n", "    y = x\\n    return g(y x,\\n")
    False
    >>> text = "    y = x\\n    if y:\\n        "
    >>> parses("def f(x):\\n", text), parses("def f(x):\\n", text, is_ended=True)
    (True, False)
    """
    if over := re.search(r"^\S", completion, re.MULTILINE):
        completion, is_ended = completion[: over.start()], True
    if is_ended:
        return read_python(prompt + completion) is not None
    lines = completion.split("\n")[:-1]
    while lines:
        text = prompt + "\n".join(lines) + "\n"
        if read_python(text) is not None:
            return True
        if not _lacks_its_end(text):
            return False
        lines.pop()
    return None


def _lacks_its_end(text: str) -> bool:
    """Whether lines could follow that make the text Python.

    >>> _lacks_its_end("x = (1,\\n"), _lacks_its_end("x = (1 2,\\n"), _lacks_its_end("x = 1 + \\\\\\n")
    (True, False, True)
    """
    if text.endswith("\\\n"):
        return True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return codeop.compile_command(text, symbol="exec") is None
    except UNREADABLE:
        return False
