"""Functions' beginnings from held-out Python, and whether what a model adds to them parses."""

from __future__ import annotations

import ast
import bisect
import re
import textwrap
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nextn.data import Document
from nextn.study import code_quality
from nextn.study.code_quality import function_prompts, parses

SOURCES = [Document(str(module.__name__), Path(module.__file__).read_text()) for module in (textwrap, bisect, re)]

PROMPT = "def f(x):\n"
BODY = '''    """What it does,
    over two lines.
    """
    y = [
        x,
        "a",
    ]
    for z in y:
        if z:
            try:
                print(z + \\
                      1)
            except ValueError:
                pass
    return (y,
            x)
'''


def completions_of_people() -> list[tuple[str, str]]:
    """Each function of the sources, as its beginning and all of the file after it."""
    found = []
    for document in SOURCES:
        for prompt in function_prompts([document], 1000):
            start = document.text.index("\n" + prompt) + 1 + len(prompt)
            found.append((prompt, document.text[start:]))
    return found


WRITTEN = [*completions_of_people(), (PROMPT, BODY)]


# ----------------------------------------------------------------------------------------------------------- the rule


@settings(max_examples=300, deadline=None)
@given(written=st.sampled_from(WRITTEN), length=st.integers(0, 400))
def test_what_people_wrote_never_fails_to_parse_wherever_the_limit_cuts_it(written, length):
    prompt, text = written
    assert parses(prompt, text[:length]) is not False


def num_refused() -> int:
    """Cuts of BODY that count as errors."""
    return sum(parses(PROMPT, BODY[:length]) is False for length in range(len(BODY)))


def test_counting_what_the_limit_cut_off_as_an_error_is_caught(monkeypatch):
    assert num_refused() == 0
    monkeypatch.setattr(code_quality, "_lacks_its_end", lambda text: False)
    assert num_refused() > 50


@settings(max_examples=100, deadline=None)
@given(length=st.integers(0, len(BODY)))
def test_an_error_counts_wherever_the_limit_cuts_after_it(length):
    assert parses(PROMPT, "    y = x x\n" + BODY[:length]) is False


def test_forgiving_an_error_that_no_end_repairs_is_caught(monkeypatch):
    monkeypatch.setattr(code_quality, "_lacks_its_end", lambda text: True)
    assert parses(PROMPT, "    y = x\n    y = x x\n") is True  # should be False


@pytest.mark.parametrize("body", [BODY, "    return x\n", "    return x)\n", '    """Open\n', "\n\n", ""])
@pytest.mark.parametrize("rest", ["print(", "@", "\x00", "def g(:\n    x x\n", "# the end\n"])
def test_what_comes_after_the_function_has_no_say(body, rest):
    assert parses(PROMPT, body + rest) is parses(PROMPT, body, is_ended=True)


def test_reading_on_after_the_function_is_caught(monkeypatch):
    monkeypatch.setattr(code_quality.re, "search", lambda *_: None)
    assert parses(PROMPT, "    return x\nprint x\n") is False  # should be True


def test_a_function_without_any_statement_is_an_error_if_it_is_over_and_undecided_if_it_was_cut():
    assert parses(PROMPT, "    # later\n", is_ended=True) is False
    assert parses(PROMPT, "    # later\nx = 1\n") is False
    assert parses(PROMPT, "    # later\n") is None
    assert parses(PROMPT, "") is None
    assert parses(PROMPT, "    return x") is None  # a longer word may have been meant


def test_text_that_ended_by_itself_is_read_to_its_last_character():
    assert parses(PROMPT, "    return x", is_ended=True) is True
    assert parses(PROMPT, "    y = x\n    return (x", is_ended=True) is False


@pytest.mark.parametrize(
    "line", ["    x = '\x00'", "    x = 'open", "\tx = 1\n    y = 2", "    x = " + "(" * 500 + ")" * 500]
)
def test_text_that_python_refuses_in_unusual_ways_is_an_error(line):
    assert parses(PROMPT, line + "\n    return x\n") is False


def test_odd_escapes_in_sampled_text_give_no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert parses(PROMPT, "    y = '\\d' is x\n    z = (\n") is True


# -------------------------------------------------------------------------------------------------------- the prompts


def test_each_prompt_is_a_signature_up_to_its_line_end():
    for prompt in function_prompts(SOURCES, 1000):
        assert prompt.startswith(("def ", "async def "))
        (function,) = ast.parse(prompt + "    pass\n").body
        assert function.lineno == 1
        with pytest.raises(SyntaxError):
            ast.parse(prompt)


def test_all_top_level_functions_are_found_and_no_methods():
    source = '''class A:
    def method(self):
        return 1

@decorated(
    "twice")
async def first(a, b='\\n',
          c=3) -> int:  # a comment
    """Doc."""

def second(): return 1

def third(x,
    y): return (
        x)

def fourth():

    # a comment of the body
    @inner
    def nested():
        pass
'''
    expected = {
        "async def first(a, b='\\n',\n          c=3) -> int:  # a comment\n",
        "def fourth():\n\n    # a comment of the body\n",
    }
    assert set(function_prompts([Document("a.py", source)], 8)) == expected


@pytest.mark.parametrize("line_end", ["\r\n", "\r", "\n"])
def test_lines_end_as_python_ends_them(line_end):
    source = line_end.join(["x = '''\x0c\x1c\u2028'''", "def f():", "    'ü'; y = 1", ""])
    assert function_prompts([Document("a.py", source)], 8) == ("def f():" + line_end,)


def test_every_document_gives_a_prompt_before_any_gives_two():
    documents = [Document(f"{name}.py", "".join(f"def {name}{i}():\n    pass\n" for i in range(3))) for name in "abcd"]
    names = [prompt[4] for prompt in function_prompts(documents, 8)]
    assert sorted(names[:4]) == sorted(names[4:]) == list("abcd")


def test_taking_one_document_after_another_is_caught():
    documents = [Document(f"{name}.py", "".join(f"def {name}{i}():\n    pass\n" for i in range(3))) for name in "abcd"]
    broken = [prompt for document in documents for prompt in function_prompts([document], 8)][:4]
    assert len({prompt[4] for prompt in broken}) < 4


def test_prompts_are_the_same_every_time_and_another_seed_takes_others():
    assert function_prompts(SOURCES, 6) == function_prompts(SOURCES[::-1], 6)
    assert function_prompts(SOURCES, 6) != function_prompts(SOURCES, 6, seed=1)
    assert set(function_prompts(SOURCES, 1000)) == set(function_prompts(SOURCES, 1000, seed=1))


def test_prompts_that_do_not_fit_are_left_out():
    short = function_prompts(SOURCES, 1000, lambda prompt: len(prompt) < 30)
    assert set(short) == {prompt for prompt in function_prompts(SOURCES, 1000) if len(prompt) < 30}


@pytest.mark.parametrize("text", ["Once upon a time", "def f(x)\n    return x\n", "x = 1\n", "\x00", ""])
def test_text_without_python_functions_gives_no_prompts(text):
    assert function_prompts([Document("a.txt", text)], 8) == ()
