"""Weights of tokens as labels of MTP depths: all equal, rare tokens more, or content words more.

A depth's loss is then L_k = sum_i w_i CE_i / sum_i w_i, with w_i the weight of the label at position i. The weight of a
token depends on the token and the row it stands in, never on the depth, so it is shifted exactly as labels are. The
main loss (depth 0) is not weighted.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from nextn.config import ObjectiveConfig
from nextn.data.packing import PackedTokens
from nextn.data.tokenizers import Tokenizer
from nextn.errors import DataError

TokenImportance = Callable[[Tensor], Tensor]
"""input_ids int64 [B, T] -> weight of each token as a label, float32 [B, T], same device; unshifted, like labels."""

ENGLISH_FUNCTION_WORDS = {
    "articles": "a an the",
    "pronouns": "i you he she it we they me him her us them my your his its our their mine yours hers ours theirs "
    "myself yourself himself herself itself ourselves yourselves themselves this that these those "
    "who whom whose which what all any both each either neither none some such",
    "prepositions": "about above across after against along among around at before behind below beneath beside between "
    "beyond by despite down during except for from in inside into like near of off on onto out outside over per since "
    "through throughout to toward towards under until up upon via with within without",
    "conjunctions": "and but or nor so yet if because although though unless while whereas whether as than "
    "when where how why",
    "auxiliaries": "am is are was were be been being do does did have has had having can cannot could may might must "
    "shall should will would ought",
    "auxiliaries before or after an apostrophe": "isn aren wasn weren don doesn didn haven hasn hadn couldn shouldn "
    "wouldn ll ve",
    "particles": "not no there then too also",
}
"""English words that carry grammar rather than content, in lower case. Single letters left by an apostrophe (it's) are
not among them, because in code they are names."""

FUNCTION_WORDS = frozenset(
    word.lower().encode("ascii")
    for words in (*map(str.split, ENGLISH_FUNCTION_WORDS.values()), keyword.kwlist)
    for word in words
)
"""The English function words and Python's keywords, in lower case, as bytes."""

WORD = re.compile(rb"[0-9A-Za-z_\x80-\xff]+")
NOT_LETTERS = b"0123456789_"
SEPARATOR = b"\n"
"""Stands for a token without bytes (end of text) in the text of a row, so that no word reaches across it."""


def token_importance(
    config: ObjectiveConfig, tokenizer: Tokenizer | None, train: PackedTokens
) -> TokenImportance | None:
    """Build the function that weighs the tokens of a batch, as `objective.importance` says.

    `inverse_frequency`: the weight of `inverse_frequency_weights` of each token, counted over the training stream.
    `content_words`: `content_weight` for a token with a byte in a content word (`in_content_word`), 1 for all others:
    function words, numbers, punctuation, spaces, ends of text. The word is looked for in the text of the row, so all
    pieces of one word weigh the same; a word cut by the row's start or end is judged by what of it is in the row.
    It works on the CPU, so weigh a batch before it moves to the device.

    Args:
        config: `importance` and the settings of that kind.
        tokenizer: tells V and the bytes of each token.
        train: the stream that training rows are cut from.

    Returns:
        `TokenImportance`, or None iff `importance = "uniform"`.

    Raises:
        DataError: tokens are to be weighed and there is no tokenizer, or no training text to count them in.

    >>> from nextn.data import ByteTokenizer, Document, pack
    >>> tokenizer = ByteTokenizer()
    >>> row = torch.tensor([list(b"if x.y")])
    >>> train = pack([Document("a.txt", "if x.y")], tokenizer)
    >>> weigh = token_importance(ObjectiveConfig(importance="content_words"), tokenizer, train)
    >>> weigh(row).tolist()
    [[1.0, 1.0, 1.0, 2.0, 1.0, 2.0]]
    """
    if config.importance == "uniform":
        return None
    if tokenizer is None:
        raise DataError(f"objective.importance = {config.importance!r} needs a model with a tokenizer")
    if config.importance == "content_words":
        return _by_content(tokenizer, config.content_weight)
    counts = np.bincount(train.token_ids, minlength=tokenizer.vocab_size)
    return _by_token(inverse_frequency_weights(counts, config.importance_power, config.importance_max))


# --------------------------------------------------------------------------------------------------- inverse frequency


def inverse_frequency_weights(counts: np.ndarray, power: float, maximum: float) -> np.ndarray:
    """w(v) = min(c / share(v) ** power, maximum), with c such that the mean over all counted tokens is 1 uncapped.

    Args:
        counts: how often each token occurs in the training stream, int [V].
        power: 0 weighs all tokens 1; 1 gives every token that occurs the same total weight, before the cap.
        maximum: the cap, and the weight of a token that never occurs (unless `power` is 0).

    Returns:
        float32 [V].

    Raises:
        DataError: no token was counted.

    >>> inverse_frequency_weights(np.array([2, 2, 1, 0]), power=0.0, maximum=10.0).tolist()
    [1.0, 1.0, 1.0, 1.0]
    >>> [round(float(w), 3) for w in inverse_frequency_weights(np.array([3, 1, 0]), power=1.0, maximum=10.0)]
    [0.667, 2.0, 10.0]
    """
    if not counts.any():
        raise DataError(
            "objective.importance = 'inverse_frequency' counts the training tokens, and there are none; "
            "give a corpus with text, or set 'uniform'"
        )
    if power == 0:
        return np.ones(len(counts), dtype=np.float32)
    seen = counts > 0
    log_shares = np.log(counts[seen] / counts.sum())
    # Everything in logarithms: a large power of a small share overflows before it is scaled.
    log_mean = np.logaddexp.reduce((1 - power) * log_shares)
    weights = np.full(len(counts), maximum)
    weights[seen] = np.exp(np.minimum(-power * log_shares - log_mean, np.log(maximum)))
    return weights.astype(np.float32)


def _by_token(weights: np.ndarray) -> TokenImportance:
    """The weight of each token by its id alone; `weights` is float32 [V]."""
    table = torch.from_numpy(weights)

    def weigh(input_ids: Tensor) -> Tensor:
        nonlocal table
        table = table.to(input_ids.device)
        return table[input_ids]

    return weigh


# ------------------------------------------------------------------------------------------------------- content words


def in_content_word(text: bytes) -> np.ndarray:
    """Which bytes of a text lie in a content word, bool [n].

    A word is a maximal run of ASCII letters, digits and underscores, and of bytes from 0x80 on, which count as letters
    (so do typographic quotes and dashes). It is a content word if it has a letter and is not in `FUNCTION_WORDS`, in
    whatever case. An apostrophe ends a word.

    >>> in_content_word(b"If 12 ok").astype(int).tolist()
    [0, 0, 0, 0, 0, 0, 1, 1]
    """
    inside = np.zeros(len(text), dtype=bool)
    for match in WORD.finditer(text.lower()):
        word = match[0]
        if word not in FUNCTION_WORDS and word.strip(NOT_LETTERS):
            inside[match.start() : match.end()] = True
    return inside


def _by_content(tokenizer: Tokenizer, content_weight: float) -> TokenImportance:
    """`content_weight` for tokens with a byte in a content word, 1 for all others."""
    token_bytes = [tokenizer.token_bytes(token_id) or SEPARATOR for token_id in range(tokenizer.vocab_size)]
    num_bytes = np.array([len(piece) for piece in token_bytes])

    def weigh_row(row: np.ndarray) -> np.ndarray:
        inside = in_content_word(b"".join([token_bytes[token_id] for token_id in row.tolist()]))
        ends = num_bytes[row].cumsum()
        touches = np.logical_or.reduceat(inside, ends - num_bytes[row])
        return np.where(touches, np.float32(content_weight), np.float32(1.0))

    def weigh(input_ids: Tensor) -> Tensor:
        weights = np.stack([weigh_row(row) for row in input_ids.cpu().numpy()])
        return torch.from_numpy(weights).to(input_ids.device)

    return weigh
