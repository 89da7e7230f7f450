"""Every contradiction between what is asked, and with the model, is refused before anything is computed."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from nextn import Decoder, DraftSettings, MTPConfig, MTPModel, Request, generate
from nextn.decoding import SamplingConfig
from nextn.decoding.resolve import resolve_draft, resolve_request
from nextn.decoding.vocabulary import DraftVocabulary
from nextn.errors import GenerationError

from ..lossless.conftest import TINY

MODELS: dict[str, MTPConfig] = {
    "one module": MTPConfig(num_depths=1),
    "two modules": MTPConfig(num_depths=2),
    "pre norm": MTPConfig(num_depths=1, trunk_hidden="pre_norm"),
    "parallel": MTPConfig(scheme="parallel", num_depths=2, trunk_hidden="pre_norm"),
    "no MTP": MTPConfig(num_depths=0),
}
VOCABULARY = DraftVocabulary(torch.arange(4), TINY.vocab_size)


@cache
def model(name: str) -> MTPModel:
    return MTPModel(TINY, MODELS[name]).initialize(0).eval()


DRAFTS: list[tuple[str, dict[str, Any], str]] = [
    ("two modules", {"drafter": "ngram"}, "unknown drafter 'ngram'; there are: mtp, prompt_lookup, or a model"),
    ("two modules", {"drafter": "prompt_lookup", "min_confidence": 0.5}, "about MTP drafts; the drafter is prompt_loo"),
    (
        "two modules",
        {"drafter": "prompt_lookup", "vocabulary": VOCABULARY},
        "about MTP drafts; the drafter is prompt_l",
    ),
    ("two modules", {"drafter": "prompt_lookup", "convention": "vllm"}, "about MTP drafts; the drafter is prompt_look"),
    ("two modules", {"drafter": model("no MTP"), "convention": "recycled"}, "the drafter is another model"),
    ("two modules", {"convention": "sglang"}, "unknown drafting 'sglang'; there are: as_trained, recycled"),
    ("one module", {"convention": "recycled", "min_confidence": 0.5}, "min_confidence needs drafting = 'as_trained'"),
    ("one module", {"convention": "vllm", "min_confidence": 0.5}, "emulates an engine eagerly"),
    ("one module", {"convention": "llamacpp", "vocabulary": VOCABULARY}, "emulates an engine eagerly"),
    ("one module", {"convention": "vllm", "compiled": True}, "emulates an engine eagerly"),
    ("parallel", {"convention": "vllm"}, "needs the sequential scheme"),
    ("two modules", {"convention": "recycled"}, "this model has 2 modules"),
    ("pre norm", {"convention": "vllm"}, "trained with trunk_hidden = pre_norm"),
    ("two modules", {"convention": "transformers", "length": 1}, "here 2; draft_length = 1 is not possible"),
    ("two modules", {"convention": "llamacpp"}, "runs exactly one MTP module, and this model has 2"),
    ("two modules", {"convention": "vllm", "length": 3}, "wants a multiple of the 2 stored modules"),
    ("two modules", {"convention": "sglang", "length": "adaptive"}, "unknown drafting 'sglang'"),
    (
        "one module",
        {"convention": "vllm", "length": "adaptive"},
        "drafts a fixed number of tokens, and draft_length = 'a",
    ),
    ("parallel", {"convention": "recycled", "length": "adaptive"}, "needs the sequential scheme"),
    ("two modules", {"convention": "recycled", "length": "adaptive"}, "this model has 2 modules"),
    ("two modules", {"length": -1}, "draft_length must be 0 .plain decoding. or more, got -1"),
    ("two modules", {"drafter": "prompt_lookup", "length": -1}, "draft_length must be 0 .plain decoding. or more"),
    ("two modules", {"length": "fast"}, "draft_length must be a number or 'adaptive', got 'fast'"),
    ("no MTP", {"length": 2}, "draft_length = 2, but this model has no MTP depths"),
    ("parallel", {"length": 3}, "the parallel scheme drafts one token per trained depth: at most 2"),
    ("two modules", {"length": "adaptive", "min_confidence": 0.5}, "chooses the length itself; leave one of them out"),
    ("two modules", {"length": 0, "min_confidence": 0.5}, "draft_length = 0 drafts nothing"),
    ("two modules", {"length": 2, "min_confidence": 1.0}, "min_confidence must lie between 0 and 1, both excluded"),
]


@pytest.mark.parametrize(("name", "settings", "message"), DRAFTS)
def test_draft_settings_that_contradict_each_other_or_the_model_are_refused(
    name: str, settings: dict[str, Any], message: str
):
    compiled = settings.get("compiled", False)
    draft = DraftSettings(**{key: value for key, value in settings.items() if key != "compiled"})
    with pytest.raises(GenerationError, match=message):
        resolve_draft(draft, model(name), compiled)
    with pytest.raises(GenerationError, match=message):
        Decoder(model(name), draft=draft, compiled=compiled)


REQUESTS: list[tuple[Request, str, list[Any], str]] = [
    (Request(max_new_tokens=0), "auto", [[1]], "max_new_tokens must be at least 1, got 0"),
    (Request(seed=-1), "auto", [[1]], "seed must be 0 or more, got -1"),
    (Request(seed=(1, -2)), "auto", [[1], [2]], "seed must be 0 or more, got -2"),
    (Request(seed=(1, 2)), "auto", [[1]], "there are 1 prompts and 2 seeds"),
    (Request(stop=("end",)), "auto", [[1]], "stop strings need a tokenizer"),
    (Request(stop="end"), "auto", [[1]], "stop is a list of strings"),
    (Request(), "sometimes", [[1]], "unknown verifier 'sometimes'; there are: auto, exact"),
    (Request(), "rejection", [[1]], "samples, but temperature = 0"),
    (Request(sampling=SamplingConfig(1.0)), "exact", [[1]], "is greedy, but temperature = 1.0"),
    (Request(), "exact:1", [[1]], "takes no parameters, got '1'"),
    (Request(), "typical:a", [[1]], "takes epsilon, delta, as in typical:0.09,0.3; got 'a'"),
    (Request(), "auto", ["text"], "prompt 0 is text, but the model has no tokenizer"),
    (Request(8), "auto", [[1], []], "prompt 1 is empty"),
    (Request(), "auto", [[1, TINY.vocab_size]], "holds token id 17; the vocabulary has ids 0..16"),
    (Request(max_new_tokens=64), "auto", [[1]], "exceeds the context of 64"),
]


@pytest.mark.parametrize(("request_", "verifier", "prompts", "message"), REQUESTS)
def test_requests_that_contradict_themselves_the_verifier_or_the_model_are_refused(
    request_: Request, verifier: str, prompts: list[Any], message: str
):
    with pytest.raises(GenerationError, match=message):
        resolve_request(request_, verifier, model("two modules"), prompts)
    decoder = Decoder(model("two modules"), draft=DraftSettings(verifier=verifier))
    for run in (decoder.generate, decoder.stream):
        with pytest.raises(GenerationError, match=message):
            run(prompts, request_)


def test_prompts_are_a_list():
    with pytest.raises(ValueError, match=r"got a single string; write \[prompt\]"):
        resolve_request(Request(), "auto", model("two modules"), "text")


def test_the_same_is_not_asked_twice():
    with pytest.raises(
        GenerationError, match="a DraftSettings is given, and keyword arguments of the same kind as wel"
    ):
        Decoder(model("two modules"), draft=DraftSettings(length=1), draft_length=2)
    decoder = Decoder(model("two modules"))
    for run in (decoder.generate, decoder.stream):
        with pytest.raises(GenerationError, match="a Request is given, and keyword arguments of the same kind as well"):
            run([[1]], Request(), temperature=1.0)


def test_what_was_left_out_is_filled_in():
    def resolved(name: str, **settings: Any) -> tuple[Any, Any]:
        draft, policy = resolve_draft(DraftSettings(**settings), model(name))
        return (draft.convention, draft.length, policy.longest)

    assert resolved("one module") == ("recycled", 3, 3)
    assert resolved("one module", min_confidence=0.5) == ("as_trained", 3, 3)
    assert resolved("two modules") == ("as_trained", 3, 3)
    assert resolved("parallel") == ("as_trained", 2, 2)
    assert resolved("parallel", length="adaptive") == ("as_trained", "adaptive", 2)
    assert resolved("no MTP") == ("as_trained", 0, 0)
    assert resolved("no MTP", drafter="prompt_lookup") == ("as_trained", 3, 3)
    rows, verifier = resolve_request(Request(8, SamplingConfig(0.5), (3, 4)), "auto", model("no MTP"), [[1], [2, 3]])
    assert verifier.name == "rejection"
    assert [(row.number, row.prompt_ids, row.seed, row.num_total) for row in rows] == [
        (0, [1], 3, 9),
        (1, [2, 3], 4, 10),
    ]


def test_keyword_arguments_and_the_two_objects_mean_the_same():
    prompts, subject = [[1, 2, 3], [4]], model("two modules")
    keywords: dict[str, Any] = {"max_new_tokens": 9, "temperature": 0.8, "top_k": 5, "seed": 7}
    request = Request(9, SamplingConfig(0.8, 5), 7)
    assert Request.of(**keywords) == request
    one = Decoder(subject, draft=DraftSettings(length=2)).generate(prompts, request)
    other = Decoder(subject, draft_length=2).generate(prompts, **keywords)
    third = generate(subject, prompts, draft_length=2, **keywords)
    assert one.token_ids == other.token_ids == third.token_ids
    assert one.stats == other.stats == third.stats
