"""`nextn generate`: continue texts, and show which tokens were drafted."""

from __future__ import annotations

import sys
from typing import cast

import nextn
from nextn.cli import generate_options as options
from nextn.cli import generate_output as output
from nextn.cli.console import interruptible, messages
from nextn.decoding import Decoder, DraftSettings, Request, SamplingConfig
from nextn.decoding.request import MTP
from nextn.decoding.resolve import resolve_verifier
from nextn.decoding.vocabulary import DraftVocabulary
from nextn.model.prepared import WeightForm


def generate(
    path: options.Model,
    prompt: options.Prompts = None,
    max_new_tokens: options.MaxNewTokens = 128,
    stop: options.Stop = None,
    ignore_eos: options.IgnoreEos = False,
    stream: options.Stream = False,
    show_drafts: options.ShowDrafts = False,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = 0,
    draft_length: options.DraftLengthText = None,
    drafter: options.Drafter = MTP,
    min_confidence: options.MinConfidence = None,
    draft_vocabulary: options.DraftVocabularyFile = None,
    verifier: options.Verifier = "auto",
    batch_size: options.BatchSize = 1,
    weights: options.Weights = "packed",
    compiled: options.Compiled = False,
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
) -> None:
    """Continue texts, losslessly: the output does not depend on what is drafted, unless a lossy verifier is asked for.

    Examples:

        nextn generate runs/demo -p "def read_file(path):" --show-drafts

        nextn generate runs/demo -p "import os" --temperature 0.8 --top-p 0.95 --seed 1

        nextn generate runs/demo -p "import os" -p "class A" --batch-size 2 --draft-length adaptive --stop "return"

        nextn generate runs/demo -p "def main(" --verifier typical:0.1,0.3 --draft-length 5
    """
    prompts, say = options.given_prompts(prompt), messages()
    sampling = options.with_effect(SamplingConfig(temperature, top_k, top_p, min_p, repetition_penalty))
    request = Request(max_new_tokens, sampling, seed, None if ignore_eos else "auto", stop or ())
    vocabulary = None if draft_vocabulary is None else DraftVocabulary.load(draft_vocabulary)
    rule, length = resolve_verifier(verifier, sampling), options.draft_length_of(draft_length)
    draft = DraftSettings(drafter, None, length, min_confidence, vocabulary, rule)
    if stream:
        options.check_stream(show_drafts, not rule.is_lossless, batch_size > 1 and len(prompts) > 1)
    options.check_drafter(draft)
    model = nextn.load(path, device=device, dtype=dtype)
    options.say_what_is_unexpected(model, draft, weights)
    draft, form = options.with_model(draft, device, dtype), cast(WeightForm, weights)
    decoder = Decoder(model, draft=draft, batch_size=batch_size, weights=form, compiled=compiled, say=say.print)
    if stream or (sys.stdout.isatty() and len(prompts) == 1 and rule.is_lossless and not show_drafts):
        with interruptible(say, "the text ends here"):
            output.print_stream(decoder, prompts, request)
        return
    with interruptible(say, "nothing was printed; --stream prints what is decoded at once"):
        result = decoder.generate(prompts, request)
    output.print_result(model, prompts, result, show_drafts)
    if show_drafts:
        output.print_statistics(say, result, length)
    if not rule.is_lossless:
        output.print_changes(say, result, rule, sampling.is_greedy)
