"""What a report holds: it survives JSON, contradictions are refused, and repetition is counted as defined."""

import dataclasses
import itertools
import json
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextn.errors import ConfigError
from nextn.evaluation import results
from nextn.evaluation.repetition import repeated_text_share
from nextn.report import schema
from tests.unit.report_example import example, sample

# ------------------------------------------------------------------------------------------------------------- schema


def test_a_report_survives_json_unchanged():
    report = example()
    assert schema.from_table(json.loads(json.dumps(schema.to_table(report), allow_nan=False))) == report


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (("title",), "report lacks title"),
        (("model", "num_mtp_parameters"), "report.model lacks num_mtp_parameters"),
        (("arms", 1, "speedup", "median"), r"report.arms\[1\].speedup lacks median"),
        (("training", "history", 0, "loss_per_depth"), r"history\[0\] \(train\) lacks loss_per_depth"),
    ],
)
def test_a_missing_key_is_named(path, message):
    table = json.loads(json.dumps(schema.to_table(example())))
    part = table
    for key in path[:-1]:
        part = part[key]
    del part[path[-1]]
    with pytest.raises(ConfigError, match=message):
        schema.from_table(table)


def test_an_unknown_key_is_named_with_the_nearest_known_one():
    table = json.loads(json.dumps(schema.to_table(example())))
    table["model"]["num_parameter"] = 1
    with pytest.raises(ConfigError, match=r"report.model.num_parameter.*num_parameters"):
        schema.from_table(table)


def test_speedup_is_the_median_of_paired_ratios_not_the_ratio_of_medians():
    plain, fast = (100.0, 200.0, 300.0), (300.0, 220.0, 300.0)
    assert results.Speedup.of_repeats(plain, fast) == results.Speedup(1.1, 1.0, 3.0)
    assert statistics.median(fast) / statistics.median(plain) == 1.5


@pytest.mark.parametrize(("plain", "fast"), [((), ()), ((1.0,), (1.0, 2.0))])
def test_speedup_needs_repeats_that_pair_up(plain, fast):
    with pytest.raises(ValueError, match="one by one"):
        results.Speedup.of_repeats(plain, fast)


@pytest.mark.parametrize(
    "change",
    [
        {"histogram": (1, 2, 3)},
        {"acceptance_conditional": (0.5,)},
        {"num_identical_outputs": None},
        {"speedup": results.Speedup(9.0, 9.0, 9.0)},
    ],
)
def test_an_arm_that_contradicts_itself_is_refused(change):
    with pytest.raises(ValueError):
        dataclasses.replace(example().arms[0], **change)


def test_a_sample_of_an_unknown_arm_is_refused():
    with pytest.raises(ValueError, match="bean search"):
        dataclasses.replace(example(), samples=(sample("bean search", "x", 0),))


@given(text=st.text(max_size=40), cuts=st.lists(st.integers(0, 160), max_size=20))
def test_pieces_of_any_split_of_the_bytes_join_to_the_text(text, cuts):
    data = text.encode("utf-8")
    bounds = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    tokens = [data[a:b] for a, b in itertools.pairwise(bounds)]
    pieces = results.token_texts(tokens, range(len(tokens)))
    assert "".join(piece.text for piece in pieces) == text


def test_bytes_that_are_not_utf8_show_as_replacement_characters():
    pieces = results.token_texts([b"a", b"\xff", b"b", b"\xc3"], [0, 1, 2, 3])
    assert [(piece.text, piece.depth) for piece in pieces] == [("a", 0), ("\ufffd", 1), ("b", 2), ("\ufffd", 3)]


# --------------------------------------------------------------------------------------------------------- repetition


def repeated_text_share_reference(text: str, n: int) -> float:
    """The definition, word for word."""
    repeated = set()
    for start in range(len(text) - n + 1):
        if any(text[earlier : earlier + n] == text[start : start + n] for earlier in range(start)):
            repeated |= set(range(start, start + n))
    return len(repeated) / len(text) if text else 0.0


@given(text=st.text(alphabet="ab", max_size=40), n=st.integers(1, 5))
def test_repeated_text_share_is_its_definition(text, n):
    assert repeated_text_share(text, n) == pytest.approx(repeated_text_share_reference(text, n))


def test_counting_repeated_ngrams_instead_of_covered_tokens_would_differ():
    text = "abcabcx"
    grams = [text[start : start + 3] for start in range(len(text) - 2)]
    share_of_grams = sum(gram in grams[:index] for index, gram in enumerate(grams)) / len(grams)
    assert repeated_text_share(text, 3) == pytest.approx(3 / 7)
    assert share_of_grams != pytest.approx(3 / 7)


def test_a_loop_is_mostly_repeated_and_fresh_text_is_not():
    assert repeated_text_share(list(b"def f(x):\n    return x\n" * 20)) > 0.9
    assert repeated_text_share(range(500)) == 0.0
    assert repeated_text_share([]) == 0.0
