"""Align inputs and labels with positions at every depth. No other module of nextn shifts tokens.

Tokens and positions are 0-based: t[0..T-1]. Depth k at position i reads hidden state h[k-1][i] and the embedding of
t[i+k], and predicts t[i+k+1]; depth 0 is the ordinary next-token head, which reads t[i].

    depth   may depend on   embeds    predicts   positions that exist
    0       t[0..i]         t[i]      t[i+1]     0..T-1   (the last one has no label)
    k       t[0..i+k]       t[i+k]    t[i+k+1]   0..T-1-k (the last one has no label)

Worked example, T = 6, tokens t = [A B C D E F], two packed documents [A B C D] and [E F], depth k = 1:

    position i          0   1   2   3   4
    hidden state        h0  h1  h2  h3  h4
    embedded t[i+1]     B   C   D   E   F
    label t[i+2]        C   D   -   -   -     i = 2: E is another document; i = 3: E and F are; i = 4: no t[6]

A label counts iff i+k+1 < T, the positions i..i+k+1 lie in one document, none of them is padding, and the label is not
`IGNORED`. Invalid labels come out as `IGNORED`, so that a loss needs nothing else.

While decoding, a row of n known tokens has trunk states for positions 0..n-1 at most; depth k then reads positions
`0..n-1-k` with known tokens (`num_final_positions`), and later ones with drafted tokens (`embedded_positions`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

Count = TypeVar("Count", int, Tensor)

IGNORED = -100
"""Label value that is neither predicted nor counted (the value torch's cross-entropy ignores)."""

PADDING_DOCUMENT = -1
"""Document id of padding: it is in no document, is never a label, and is not counted as expert load."""


@dataclass(frozen=True)
class DepthAlignment:
    """What one depth reads and predicts.

    Attributes:
        depth: k.
        embedded_ids: t[i+k], int64 [B, T-k].
        labels: t[i+k+1] where valid, else `IGNORED`, int64 [B, T-k].
        num_positions: T-k, how many positions the depth has.
    """

    depth: int
    embedded_ids: Tensor
    labels: Tensor

    @property
    def num_positions(self) -> int:
        """T-k; zero for a depth that reaches past the row."""
        return self.embedded_ids.shape[1]

    @property
    def valid(self) -> Tensor:
        """True where the position has a label that counts, bool [B, T-k]."""
        return self.labels != IGNORED

    def documents(self, document_ids: Tensor) -> Tensor:
        """Documents of this depth's positions, int64 [B, T-k], from those of the tokens, int64 [B, T].

        A position whose embedded token t[i+k] lies in another document (or in padding) than t[i] is padding at this
        depth: it has no label, and it must not count as expert load. In the worked example: [0 0 0 -1 1].
        """
        own, embedded = document_ids[:, : self.num_positions], document_ids[:, self.depth :]
        return own.masked_fill(own != embedded, PADDING_DOCUMENT)

    def at_labels(self, values: Tensor) -> Tensor:
        """Values of tokens, [B, T], at the positions that predict these tokens: values[i+k+1], 0 without a label.

        >>> align(torch.tensor([[10, 11, 12, 13]]), depth=1).at_labels(torch.tensor([[0.1, 0.2, 0.3, 0.4]])).tolist()
        [[0.30000001192092896, 0.4000000059604645, 0.0]]
        """
        shifted = values.new_zeros(self.labels.shape)
        shifted[:, : num_final_positions(values.shape[1], self.depth + 1)] = values[:, self.depth + 1 :]
        return shifted.masked_fill(~self.valid, 0)

    def rows(self, rows: slice) -> DepthAlignment:
        """The alignment of some rows of the batch, as views."""
        return DepthAlignment(self.depth, self.embedded_ids[rows], self.labels[rows])

    def cut(self, hidden: Tensor) -> Tensor:
        """The previous depth's states at this depth's positions.

        Args:
            hidden: [B, T-k+1, ...] from depth k-1 (for depth 0: [B, T, ...], returned whole).

        Returns:
            [B, T-k, ...]: h[k-1][i] for i = 0..T-1-k. Position i stays position i; only the end is cut.
        """
        return hidden[:, : self.num_positions]


def align(
    input_ids: Tensor, depth: int, labels: Tensor | None = None, document_ids: Tensor | None = None
) -> DepthAlignment:
    """Inputs and labels of one depth.

    Args:
        input_ids: tokens t, int64 [B, T].
        depth: k >= 0.
        labels: per token, itself or `IGNORED`, unshifted, int64 [B, T]; None takes `input_ids`.
        document_ids: document of each token, int64 [B, T], `PADDING_DOCUMENT` for padding; None: one document a row.

    Raises:
        ValueError: depth is negative or shapes differ.

    >>> align(torch.tensor([[10, 11, 12, 13]]), depth=1).embedded_ids.tolist()
    [[11, 12, 13]]
    >>> align(torch.tensor([[10, 11, 12, 13]]), depth=1).labels.tolist()
    [[12, 13, -100]]
    >>> align(torch.tensor([[10, 11, 12, 13]]), depth=1, document_ids=torch.tensor([[0, 0, 0, 1]])).labels.tolist()
    [[12, -100, -100]]
    """
    if depth < 0:
        raise ValueError(f"depth must be 0 or more, got {depth}")
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids must be [B, T], got shape {tuple(input_ids.shape)}")
    for name, other in (("labels", labels), ("document_ids", document_ids)):
        if other is not None and other.shape != input_ids.shape:
            raise ValueError(f"{name} has shape {tuple(other.shape)}, input_ids {tuple(input_ids.shape)}")
    labels = input_ids if labels is None else labels
    num_rows, row_length = input_ids.shape
    num_positions = num_final_positions(row_length, depth)
    num_labelled = num_final_positions(row_length, depth + 1)

    shifted = input_ids.new_full((num_rows, num_positions), IGNORED)
    shifted[:, :num_labelled] = labels[:, depth + 1 :]
    if document_ids is not None and num_labelled:
        # Equal ends mean one document: ids are constant within a document and never come back in a row.
        first, last = document_ids[:, :num_labelled], document_ids[:, depth + 1 :]
        together = (first == last) & (first != PADDING_DOCUMENT)
        shifted[:, :num_labelled] = shifted[:, :num_labelled].masked_fill(~together, IGNORED)
    return DepthAlignment(depth, embedded_ids=input_ids[:, depth:], labels=shifted)


def align_depths(
    input_ids: Tensor, num_depths: int, labels: Tensor | None = None, document_ids: Tensor | None = None
) -> tuple[DepthAlignment, ...]:
    """Inputs and labels of depths 0..K, computed once for a batch and handed on.

    Arguments and errors as of `align`; `num_depths` is K.

        tokens            A  B  C  D
        depth 0 embeds    A  B  C  D     labels   B  C  D  -
        depth 1 embeds    B  C  D        labels   C  D  -
        depth 2 embeds    C  D           labels   D  -

    >>> [aligned.labels.tolist() for aligned in align_depths(torch.tensor([[10, 11, 12, 13]]), num_depths=2)]
    [[[11, 12, 13, -100]], [[12, 13, -100]], [[13, -100]]]
    """
    return tuple(align(input_ids, depth, labels, document_ids) for depth in range(num_depths + 1))


def of_same_token(trunk_predictions: Tensor, depth: int) -> Tensor:
    """The trunk's predictions of the tokens that depth k predicts: depth 0's position i+k for depth k's position i.

    Args:
        trunk_predictions: of depth 0 at every position, [B, T, ...].
        depth: k >= 0.

    Returns:
        [B, T-k, ...]; both then speak about token t[i+k+1] at position i.

    >>> of_same_token(torch.tensor([[20, 21, 22, 23]]), depth=1).tolist()
    [[21, 22, 23]]
    """
    return trunk_predictions[:, depth:]


def count_labels(
    input_ids: Tensor, num_depths: int, labels: Tensor | None = None, document_ids: Tensor | None = None
) -> Tensor:
    """Valid labels of depths 0..K over the whole batch: the global denominators, int64 [K+1].

    >>> count_labels(torch.tensor([[1, 2, 3, 4]]), num_depths=2).tolist()
    [3, 2, 1]
    """
    return torch.stack([one.valid.sum() for one in align_depths(input_ids, num_depths, labels, document_ids)])


def num_final_positions(num_tokens: Count, depth: int) -> Count:
    """Positions of depth k whose embedded token t[i+k] is among the first `num_tokens` tokens: max(num_tokens - k, 0).

    `num_tokens` is one number or a tensor of them, int64 of any shape, and so is the result.

    A depth's cache keeps exactly these positions after verification: with tokens t[0..n-1] final, depth k's states at
    i = 0..n-1-k read final tokens only.

    >>> [num_final_positions(5, depth) for depth in (0, 1, 2)]
    [5, 4, 3]
    >>> num_final_positions(torch.tensor([5, 1]), depth=2).tolist()
    [3, 0]
    """
    return (num_tokens - depth).clamp(min=0) if isinstance(num_tokens, Tensor) else max(num_tokens - depth, 0)


def embedded_positions(positions: Tensor, depth: int) -> Tensor:
    """Index of the token that depth k embeds at each position i: i + k.

    >>> embedded_positions(torch.tensor([3, 4]), depth=2).tolist()
    [5, 6]
    """
    return positions + depth
