"""A draft vocabulary: drafts come from the most frequent tokens only, so that the draft head is a small product.

Verification keeps the full vocabulary, so the output (or its distribution) stays what it is: a token outside is never
drafted and costs acceptance alone. V is the full vocabulary, D the draft vocabulary; a *local* id 0..D-1 is a position
in the latter.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from nextn.errors import CheckpointError, GenerationError
from nextn.files import read_json, write_text


@dataclass(frozen=True, eq=False)
class DraftVocabulary:
    """The tokens that may be drafted.

    Attributes:
        ids: token id of each local id, int64 [D], distinct, 0..V-1.
        vocab_size: V.

    Raises:
        GenerationError: no id, an id twice, an id that is not in the vocabulary, or ids that are not int64 [D].

    Of five tokens, 1 and 4 may be drafted:

    >>> vocabulary = DraftVocabulary(torch.tensor([1, 4]), 5)
    >>> vocabulary.to_full(torch.tensor([1, 0])).tolist()
    [4, 1]
    >>> vocabulary.spread(torch.tensor([0.75, 0.25])).tolist()
    [0.0, 0.75, 0.0, 0.0, 0.25]
    """

    ids: Tensor
    vocab_size: int

    def __post_init__(self) -> None:
        if self.ids.dtype != torch.int64 or self.ids.dim() != 1:
            raise GenerationError(
                f"a draft vocabulary is int64 [D], got {self.ids.dtype} of shape {tuple(self.ids.shape)}"
            )
        if len(self) == 0:
            raise GenerationError("a draft vocabulary needs at least one token, got none")
        _check_ids(self.ids, self.vocab_size)
        if len(self.ids.unique()) < len(self):
            raise GenerationError(
                f"a draft vocabulary names each token once; {len(self)} ids hold {len(self.ids.unique())} tokens"
            )

    def __len__(self) -> int:
        """D."""
        return len(self.ids)

    def to_full(self, local_ids: Tensor) -> Tensor:
        """Token ids of local ids, int64 of the same shape."""
        return self.ids.to(local_ids.device)[local_ids]

    def spread(self, probs: Tensor) -> Tensor:
        """Draft probabilities [..., D] over the full vocabulary, [..., V]: 0 for what is never drafted.

        The rejection rule compares draft and target token by token, so it needs them so.
        """
        full = probs.new_zeros(*probs.shape[:-1], self.vocab_size)
        return full.index_copy(-1, self.ids.to(probs.device), probs)

    def reduced_head(self, head: nn.Linear) -> nn.Linear:
        """A head with the rows (and biases) of these tokens, [D, C] of [V, C]; it shares no storage with `head`.

        Raises:
            GenerationError: `head` does not have V rows.
        """
        if head.out_features != self.vocab_size:
            raise GenerationError(
                f"the draft vocabulary is one of {self.vocab_size} tokens, and the output head has "
                f"{head.out_features} rows; it was made for another model"
            )
        with torch.device("meta"):  # no storage is filled with random numbers first
            reduced = nn.Linear(head.in_features, len(self), bias=head.bias is not None)
        rows = self.ids.to(head.weight.device)
        reduced.weight = nn.Parameter(head.weight.detach()[rows], head.weight.requires_grad)
        if head.bias is not None:
            reduced.bias = nn.Parameter(head.bias.detach()[rows], head.bias.requires_grad)
        return reduced

    def coverage(self, counts: Tensor) -> float:
        """Share of counted tokens that can be drafted: what acceptance cannot exceed on such text; `counts` is [V].

        >>> DraftVocabulary(torch.tensor([0, 2]), 3).coverage(torch.tensor([6, 1, 3]))
        0.9
        """
        return int(counts[self.ids].sum()) / int(counts.sum())

    def save(self, path: Path) -> None:
        """Write it as JSON: `{"vocab_size": V, "token_ids": [...]}`. CheckpointError where that cannot be."""
        write_text(path, json.dumps({"vocab_size": self.vocab_size, "token_ids": self.ids.tolist()}) + "\n")

    @classmethod
    def load(cls, path: Path) -> DraftVocabulary:
        """Read what `save` wrote. Raises CheckpointError when the file is missing, is not JSON or holds something else.

        Whether it fits a model is seen where it meets the model's head.
        """
        table = read_json(path)
        wanted = f'{path} holds no draft vocabulary, which is {{"vocab_size": V, "token_ids": [id, ...]}}'
        if not isinstance(table, dict) or not {"vocab_size", "token_ids"} <= table.keys():
            raise CheckpointError(wanted)
        vocab_size, ids = table["vocab_size"], table["token_ids"]
        if type(vocab_size) is not int or type(ids) is not list or not all(map(_is_int64, ids)):
            raise CheckpointError(f"{wanted} of whole numbers")
        try:
            return cls(torch.tensor(ids, dtype=torch.int64), vocab_size)
        except GenerationError as error:
            raise CheckpointError(f"{path}: {error}") from None


def token_counts(streams: Iterable[Sequence[int] | Tensor | np.ndarray], vocab_size: int) -> Tensor:
    """How often each token occurs in all streams together, int64 [V].

    Raises:
        GenerationError: a token id is not in 0..vocab_size-1.

    >>> token_counts([[0, 2, 2], torch.tensor([2])], 4).tolist()
    [1, 0, 3, 0]
    """
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for stream in streams:
        ids = torch.as_tensor(stream).long().cpu().flatten()
        _check_ids(ids, vocab_size)
        counts += ids.bincount(minlength=vocab_size)
    return counts


def most_frequent(counts: Tensor, size: int) -> Tensor:
    """The `size` tokens that occur most often, ids ascending, int64 [size]; of equally frequent ones the lower ids.

    Args:
        counts: occurrences by token id, int64 [V].
        size: D, 1..V.

    Raises:
        GenerationError: `size` is not in 1..V.

    >>> most_frequent(torch.tensor([3, 9, 3, 0]), 2).tolist()
    [0, 1]
    """
    if not 1 <= size <= len(counts):
        raise GenerationError(
            f"a draft vocabulary of {size} tokens; the model has {len(counts)}: take 1..{len(counts)}"
        )
    return counts.sort(descending=True, stable=True).indices[:size].sort().values


def _is_int64(value: object) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63


def _check_ids(ids: Tensor, vocab_size: int) -> None:
    """Raise GenerationError for a token id that is not in 0..vocab_size-1."""
    unknown = ids[(ids < 0) | (ids >= vocab_size)]
    if len(unknown):
        raise GenerationError(f"token id {int(unknown[0])} is not in the vocabulary, which has ids 0..{vocab_size - 1}")
